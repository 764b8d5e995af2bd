"""Ours against torch in both memory formats, layer by layer and the whole model, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from . import replay
from .exported import export
from .layers import multiply_adds
from .timing import Timing, interleave, time_model

_TOLERANCE = 1e-4  # a speed of wrong results is none


@dataclass(frozen=True)
class Speed:
    """Median seconds by format; `ratio` is the better of torch's divided by the better of ours, round by round."""

    ours: dict[str, float]
    torch: dict[str, float]
    ratio: float
    low: float  # quartiles of the ratio
    high: float


@dataclass(frozen=True)
class LayerSpeed:
    """Layers of one kind (`names`), timed once."""

    names: list[str]
    operation: str
    output_size: tuple[int, ...]
    multiply_adds: int
    error: float  # largest difference of the outputs / largest output
    speed: Speed


@dataclass(frozen=True)
class Benchmark:
    """`layers` are those that this library computes; `seconds_elsewhere` is what is left of an inference in torch."""

    model: str
    input_size: tuple[int, ...]
    threads: int
    train: bool
    layers: list[LayerSpeed]
    tasks: dict[str, Speed]  # of the whole model: "inference", "training step"


def bench(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    *,
    train: bool = False,
    rounds: int = 7,
    whole: bool = True,
    by_layer: bool = True,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> Benchmark:
    """Times `model` by this library and by torch, in both memory formats.

    Args:
        train: layers forward with backward instead of inference.
        rounds: how often each contestant has its turn; medians are taken over them.
        whole, by_layer: what to time.
        track: wraps the loop over the layers, to show progress.

    Raises:
        LabError: the model cannot be exported.
    """
    program = export(model, torch.zeros(shape), name)
    layers = []
    found = replay.distinct(program, replay.computed_by_us) if by_layer else []
    for kind in track(found, "layers"):
        layers.append(_layer(program, kind, train, rounds))
    tasks = {}
    if whole:
        for timing in time_model(model, torch.randn(shape), rounds):
            tasks[timing.task] = _speed(timing)
    return Benchmark(name, tuple(shape), torch.get_num_threads(), train, layers, tasks)


def _layer(program, kind: replay.Distinct, train: bool, rounds: int) -> LayerSpeed:
    step, contestants = kind.step, {}
    prepare = replay.forward_backward if train else replay.forward
    for format_name, memory_format in replay.step_formats(step).items():
        arguments, keywords = replay.operands(program, step, memory_format)
        for owner in ("ours", "torch"):
            contestants[f"{owner} {format_name}"] = prepare(step, arguments, keywords, owner)
    outputs = {name: _first(replay.forward(step, arguments, keywords, name)()) for name in ("ours", "torch")}
    scale = max(outputs["torch"].abs().max().item(), 1e-30)
    error = (outputs["ours"] - outputs["torch"]).abs().max().item() / scale
    timing = interleave(contestants, rounds)
    speed = _speed(timing) if error <= _TOLERANCE else Speed({}, {}, float("nan"), float("nan"), float("nan"))
    return LayerSpeed(kind.names, step.operation, tuple(step.output.shape), multiply_adds(step), error, speed)


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _speed(timing: Timing) -> Speed:
    medians = {
        owner: {name.partition(" ")[2]: timing.median(name) for name in timing.seconds if name.startswith(owner)}
        for owner in ("ours", "torch")
    }
    ratio, low, high = timing.ratio(timing.best("ours"), timing.best("torch"))
    return Speed(medians["ours"], medians["torch"], ratio, low, high)


def geometric_mean(layers: list[LayerSpeed]) -> float:
    """Of the ratios, every layer counted as often as it appears."""
    return statistics.geometric_mean([layer.speed.ratio for layer in layers for _ in layer.names])
