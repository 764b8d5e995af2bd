"""Which algorithm computes a convolution: what each one says to it, expects to cost, borrows, and takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _C, algorithms, autograd, explain_convolution
from . import replay
from .exported import Convolution, export
from .machine import measure_machine
from .timing import interleave

PASSES = ("forward", "backward_input", "backward_weight")
_HOPELESS = 20.0  # times the cost of the cheapest: not measured


@dataclass(frozen=True)
class AlgorithmReport:
    """What one algorithm says to a problem. None: it refuses, or was not measured."""

    algorithm: str
    chosen: bool
    refusal: str | None
    cost: float | None  # expected, in multiply-adds of a perfectly running matrix product
    workspace: int | None  # bytes borrowed while it runs, by all threads together
    seconds: float | None  # median


@dataclass(frozen=True)
class Explanation:
    """One convolution and one pass of it; `names` are the layers that compute it."""

    names: list[str]
    problem: Convolution
    pass_: str
    format: str
    multiply_adds: int
    bytes: int  # input, weight and output, each once
    bound: float  # least seconds by the two roofs of this machine
    bound_by: str  # "arithmetic" or "memory"
    chosen: str
    algorithms: list[AlgorithmReport]


def explain(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    *,
    pass_: str = "forward",
    channels_last: bool = False,
    measure: bool = True,
    layer: str | None = None,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> list[Explanation]:
    """Every distinct convolution and linear layer of a model; see `explain_layer`.

    Args:
        layer: only those whose name begins so.

    Raises:
        LabError: the model cannot be exported.
    """
    program = export(model, torch.zeros(shape), name)
    kinds = replay.distinct(program, lambda step: step.convolution() is not None)
    if layer is not None:
        kinds = [kind for kind in kinds if any(each == layer or each.startswith(f"{layer}.") for each in kind.names)]
    options = {"pass_": pass_, "channels_last": channels_last, "measure": measure}
    return [explain_layer(kind.step.convolution(), names=kind.names, **options) for kind in track(kinds, "layers")]


def explain_layer(
    problem: Convolution,
    *,
    names: Iterable[str] = (),
    pass_: str = "forward",
    channels_last: bool = False,
    measure: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """What each algorithm says to one convolution, and how long it takes on random values.

    The forward pass of a transposed convolution is the backward-input pass of the convolution it is the adjoint of;
    that is what is explained then.
    """
    actual, calls = pass_calls(problem, pass_, channels_last, dtype)
    geometry = problem.geometry
    columns = problem.stride, problem.padding, problem.dilation, problem.groups
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    choice = explain_convolution(
        problem.input_size, problem.weight_size, *columns, pass_=actual, dtype=dtype, memory_format=memory_format
    )
    accepted = {name: verdict.cost for name, verdict in choice.verdicts.items() if verdict.refusal is None}
    cheapest = min(accepted.values())
    medians = {}
    if measure:
        tried = [name for name, cost in accepted.items() if cost <= _HOPELESS * cheapest or name == choice.chosen]
        timing = interleave({name: calls(name) for name in tried}, rounds=5)
        medians = {name: timing.median(name) for name in tried}
    rows = [
        AlgorithmReport(
            name,
            name == choice.chosen,
            choice.verdicts[name].refusal,
            accepted.get(name),
            workspace(problem, actual, name, channels_last) if name in accepted else None,
            medians.get(name),
        )
        for name in algorithms()
    ]
    size = torch.empty(0, dtype=dtype).element_size()
    bound, bound_by = measure_machine().bound(geometry.multiply_adds(), geometry.bytes(size))
    format_name = "channels_last" if channels_last else "NCHW"
    return Explanation(
        list(names), problem, actual, format_name, geometry.multiply_adds(), geometry.bytes(size), bound, bound_by,
        choice.chosen, rows,
    )  # fmt: skip


def workspace(problem: Convolution, pass_: str, algorithm: str, channels_last: bool) -> int:
    """Bytes that a float32 convolution borrows while it runs."""
    threads = torch.get_num_threads()
    shared, scratch = _C.workspace(
        problem.geometry, _C.Pass.__members__[pass_], algorithm, channels_last=channels_last, threads=threads
    )
    return shared + threads * scratch


def pass_calls(
    problem: Convolution, pass_: str, channels_last: bool, dtype: torch.dtype = torch.float32
) -> tuple[str, Callable[[str], Callable[[], Tensor]]]:
    """The pass that computes it (see `explain_layer`), and: algorithm -> a call of it on random values."""
    if problem.transposed and pass_ != "backward_weight":
        pass_ = "backward_input" if pass_ == "forward" else "forward"
    random = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(size, generator=random, dtype=dtype)
        if channels_last and tensor.dim() in (4, 5):
            kind = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
            tensor = tensor.contiguous(memory_format=kind)
        return tensor

    input, weight, output = (draw(size) for size in (problem.input_size, problem.weight_size, problem.output_size))
    rest = list(problem.stride), list(problem.padding), list(problem.dilation), problem.groups

    def call(algorithm: str):
        def run():
            with torch.inference_mode():
                if pass_ == "forward":
                    return autograd.convolution(input, weight, None, *rest, algorithm)
                if pass_ == "backward_input":
                    size = list(problem.input_size)
                    return autograd.convolution_backward_input(output, weight, None, size, *rest, algorithm)
                size = list(problem.weight_size)
                return autograd.convolution_backward_weight(output, input, size, *rest, algorithm)

        return run

    return pass_, call
