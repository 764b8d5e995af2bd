"""The verb `overhead`: what one call costs on a tensor so small that there is nothing to compute.

Microseconds per call of a function, or of a module, in three modes: without gradients, the forward pass that records
for autograd, and that followed by the backward pass (`torch.autograd.grad` of every operand).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
import torch.nn.functional as F
from measure import Result

import torch_convlab.functional as ours
import torch_convlab.nn

MODES = ("no grad", "grad forward", "forward + backward")
IMAGE, FILTER = (1, 1, 4, 4), (1, 1, 3, 3)


@dataclass(frozen=True)
class Call:
    """`theirs` and `ours` are functions of tensors of these sizes."""

    name: str
    sizes: tuple[tuple[int, ...], ...]
    theirs: Callable
    ours: Callable


def _module(name: str, *arguments) -> Call:
    theirs, mine = getattr(torch.nn, name)(*arguments), getattr(torch_convlab.nn, name)(*arguments)
    mine.load_state_dict(theirs.state_dict())
    return Call(f"nn.{name}", (IMAGE,), theirs, mine)


def _calls() -> list[Call]:
    torch.manual_seed(0)
    statistics = torch.zeros(1), torch.ones(1)
    return [
        Call("conv2d", (IMAGE, FILTER), F.conv2d, ours.conv2d),
        Call("conv2d, bias", (IMAGE, FILTER, (1,)), F.conv2d, ours.conv2d),
        _module("Conv2d", 1, 1, 3),
        Call("conv_transpose2d", (IMAGE, FILTER), F.conv_transpose2d, ours.conv_transpose2d),
        Call("linear", ((1, 4), (4, 4), (4,)), F.linear, ours.linear),
        Call("max_pool2d", (IMAGE,), lambda x: F.max_pool2d(x, 2), lambda x: ours.max_pool2d(x, 2)),
        Call("avg_pool2d", (IMAGE,), lambda x: F.avg_pool2d(x, 2), lambda x: ours.avg_pool2d(x, 2)),
        Call(
            "batch_norm, training", (IMAGE, (1,), (1,)),
            lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
            lambda x, w, b: ours.batch_norm(x, None, None, w, b, True),
        ),
        Call(
            "batch_norm, evaluation", (IMAGE, (1,), (1,)),
            lambda x, w, b: F.batch_norm(x, *statistics, w, b),
            lambda x, w, b: ours.batch_norm(x, *statistics, w, b),
        ),
    ]  # fmt: skip


def _contenders(call: Call, mode: str) -> dict[str, Callable]:
    operands = [torch.randn(size, requires_grad=mode != "no grad") for size in call.sizes]
    grad_output = torch.randn_like(call.theirs(*operands))
    if mode != "forward + backward":
        return {"torch": lambda: call.theirs(*operands), "ours": lambda: call.ours(*operands)}
    return {
        "torch": lambda: torch.autograd.grad(call.theirs(*operands), operands, grad_output),
        "ours": lambda: torch.autograd.grad(call.ours(*operands), operands, grad_output),
    }


def add_arguments(parser) -> None:
    parser.add_argument("--filter", default="", help="only calls whose name contains this")
    parser.add_argument("--mode", choices=MODES, action="append", help="may be given several times (default all)")


def run(options, progress) -> Result:
    result = Result("overhead", ["call", "mode", "torch us", "ours us", "ours/torch", "quartiles"])
    records = []
    for call in _calls():
        if options.filter not in call.name:
            continue
        for mode in options.mode or MODES:
            with torch.set_grad_enabled(mode != "no grad"):
                contenders = _contenders(call, mode)
                try:
                    torch.testing.assert_close(contenders["ours"](), contenders["torch"](), atol=1e-5, rtol=1e-5)
                except AssertionError as difference:
                    result.failed = True
                    progress(f"WRONG {call.name}, {mode}: {difference}")
                timing = measure.interleave(contenders, options.rounds, options.seconds)
            theirs, mine = (timing.median(name) * 1e6 for name in ("torch", "ours"))
            ratio, low, high = timing.ratio("ours", "torch")
            result.rows.append(
                [call.name, mode, f"{theirs:.1f}", f"{mine:.1f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"]
            )
            records.append(
                {"call": call.name, "mode": mode, "microseconds": {"torch": theirs, "ours": mine},
                 "ratio": ratio, "ratio_quartiles": [low, high]}
            )  # fmt: skip
            progress("  ".join(result.rows[-1]))
    result.summary = [f"overhead, {torch.get_num_threads()} threads: microseconds per call, median of the rounds"]
    result.data = {"name": "overhead", "calls": records}
    return result
