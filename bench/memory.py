"""The verb `memory`: what a training step keeps and needs at most, ours with and without recomputing, against torch's.

Three figures. *Kept*: bytes of tensors that the forward pass leaves allocated for backward. *Peak*: the most bytes of
tensors allocated during a step of forward and backward, beyond parameters and input. Both are the allocator's own
account, the same in every run. *Resident*: the most memory that the process has during its first two steps, beyond what
it had before there was a model, which counts parameters, scratch memory and what the allocator wastes too; each
contender has a process of its own.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import measure
import models
import torch
from layers import in_format
from measure import Result
from torch.profiler import ProfilerActivity, profile

import torch_convlab

CONTENDERS = ("torch", "ours", "ours recomputed")


def add_arguments(parser) -> None:
    parser.add_argument("--name", choices=models.MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=8)


def _model(name: str, who: str, batch: int, format: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = models.MODELS[name](torch.nn).train()
    if who != "torch":
        converted = torch_convlab.convert(copy.deepcopy(model))
        model = torch_convlab.fuse(converted, models.example(name, 1 if batch == 1 else 2), recompute="re" in who)
    input = in_format(models.example(name, batch), format)
    if format == "nhwc":
        model = model.to(memory_format=torch.channels_last if input.dim() == 4 else torch.channels_last_3d)
    return model, input


def _step(model: torch.nn.Module, input: torch.Tensor) -> Callable:
    def step():
        model.zero_grad(set_to_none=True)
        model(input).square().mean().backward()

    return step


def allocated(call: Callable) -> tuple[int, int]:
    """Bytes of tensors that `call` and its result leave allocated, and the most that were while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    left = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        left += event.nbytes()
        most = max(most, left)
    del result
    return left, most


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _figures(name: str, who: str, batch: int, format: str, threads: int) -> dict[str, int]:
    """In a process of its own."""
    torch.set_num_threads(threads)
    before = _resident("VmRSS")
    model, input = _model(name, who, batch, format)
    step = _step(model, input)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    step()
    step()
    resident = _resident("VmHWM") - before
    model.zero_grad(set_to_none=True)
    return {
        "kept_bytes": allocated(lambda: model(input).square().mean())[0],
        "peak_bytes": allocated(step)[1],
        "resident_bytes": resident,
    }


def run(options, progress) -> Result:
    name = f"memory-{options.name}-n{options.batch}"
    result = Result(name, ["contender", "kept, MB", "peak, MB", "resident, MB", "of torch's", "", "", "step, ms"])
    formats, records, calls = ("nchw", "nhwc"), {}, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for format in formats:
            for who in CONTENDERS:
                progress(f"{who} {format}")
                arguments = options.name, who, options.batch, format, options.threads
                records[f"{who} {format}"] = pool.apply(_figures, arguments)
    for format in formats:
        for who in CONTENDERS:
            calls[f"{who} {format}"] = _step(*_model(options.name, who, options.batch, format))
    progress("timing")
    timing = measure.interleave(calls, options.rounds, options.seconds)
    keys = ("kept_bytes", "peak_bytes", "resident_bytes")
    least = {key: min(records[f"torch {format}"][key] for format in formats) for key in keys}
    for who, record in records.items():
        record["milliseconds"] = timing.median(who) * 1e3
        result.rows.append([
            who, *(f"{record[key] / 1e6:.0f}" for key in keys), *(f"{record[key] / least[key]:.2f}" for key in keys),
            f"{record['milliseconds']:.1f}",
        ])  # fmt: skip
    result.summary = [f"{name}, {options.threads} threads; of torch's better format: kept, peak, resident"]
    for format in formats:
        ratio, low, high = timing.ratio(f"ours recomputed {format}", f"ours {format}")
        result.summary.append(f"recomputing costs, {format}: {ratio:.3f} of the step's time ({low:.3f}-{high:.3f})")
    result.data = {"name": name, "contenders": records}
    return result
