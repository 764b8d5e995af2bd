"""The roofline: how fast each layer runs against what this machine can do at its arithmetic intensity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import replay
from .exported import export
from .layers import multiply_adds, traffic
from .machine import Machine, measure_machine
from .timing import interleave


@dataclass(frozen=True)
class Point:
    """Layers of one kind, in inference by this library."""

    names: list[str]
    operation: str
    multiply_adds: int
    bytes: int
    seconds: float
    bound: float  # least seconds
    bound_by: str  # "arithmetic" or "memory"

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return 2 * self.multiply_adds / self.bytes

    @property
    def speed(self) -> float:
        """FLOP per second, counted as the definition counts them, whatever the algorithm computes."""
        return 2 * self.multiply_adds / self.seconds


@dataclass(frozen=True)
class Roofline:
    model: str
    input_size: tuple[int, ...]
    format: str
    machine: Machine
    points: list[Point]


def roofline(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    *,
    channels_last: bool = False,
    rounds: int = 5,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> Roofline:
    """Times every layer that this library computes, and both roofs of the machine, in the same run.

    Raises:
        LabError: the model cannot be exported.
    """
    program, machine, points = export(model, torch.zeros(shape), name), measure_machine(), []
    kinds = replay.distinct(program, lambda step: replay.computed_by_us(step) or replay.is_our_operator(step))
    for kind in track(kinds, "layers"):
        choices = list(replay.step_formats(kind.step).values())
        arguments, keywords = replay.operands(program, kind.step, choices[-1 if channels_last else 0])
        call = replay.forward(kind.step, arguments, keywords, "ours")
        seconds = interleave({"ours": call}, rounds).median("ours")
        work, moved = multiply_adds(kind.step), traffic(kind.step, program)
        points.append(Point(kind.names, kind.step.operation, work, moved, seconds, *machine.bound(work, moved)))
    return Roofline(name, tuple(shape), "channels_last" if channels_last else "NCHW", machine, points)


def roofline_figure(result: Roofline):
    """A `matplotlib.figure.Figure`: FLOP/s over FLOP/byte, both logarithmic, of the layers with multiply-adds."""
    from matplotlib.figure import Figure

    points = [point for point in result.points if point.multiply_adds]
    machine = result.machine
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ridge = machine.peak / machine.bandwidth
    left = min([ridge / 8, *(point.intensity / 2 for point in points)])
    right = max([ridge * 8, *(point.intensity * 2 for point in points)])
    axes.plot([left, ridge, right], [left * machine.bandwidth, machine.peak, machine.peak], color="#888", label="roofs")
    axes.annotate(
        f"peak {machine.peak / 1e9:.0f} GFLOP/s ({machine.peak_of})", (right, machine.peak), ha="right", va="bottom"
    )
    middle = (left * ridge) ** 0.5
    axes.annotate(
        f"copy {machine.bandwidth / 1e9:.1f} GB/s", (middle, middle * machine.bandwidth), ha="right", va="bottom"
    )
    kinds = sorted({point.operation for point in points})
    for kind, marker in zip(kinds, "osD^vP*Xph"):
        these = [point for point in points if point.operation == kind]
        axes.scatter(
            [point.intensity for point in these], [point.speed for point in these],
            s=[20 + 30 * len(point.names) for point in these], marker=marker, alpha=0.7, label=kind,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP per second",
        title=f"{result.model}, input {'x'.join(map(str, result.input_size))}, {machine.threads} thread(s), "
        f"{result.format}",
    )  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="best", title="area: number of layers")
    return figure


def save_roofline(result: Roofline, path: str | Path) -> Path:
    """The figure as PNG, SVG or PDF, by the ending of `path`."""
    roofline_figure(result).savefig(path, dpi=150)
    return Path(path)
