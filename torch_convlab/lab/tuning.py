"""Measures the algorithms for every convolution of a model and keeps the fastest, for `torch_convlab.backends`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import _C, backends, explain_convolution
from . import replay
from .choices import PASSES, pass_calls
from .errors import check_writable
from .exported import export


@dataclass(frozen=True)
class Tuned:
    """One pass of one convolution in one memory format."""

    names: list[str]
    pass_: str
    format: str
    expected: str  # what the cost model takes
    before: str | None  # what the cache said; None: nothing
    chosen: str  # what was the fastest
    seconds: dict[str, float]  # of each algorithm that was tried

    @property
    def changed(self) -> bool:
        return self.chosen != (self.before or self.expected)

    @property
    def gain(self) -> float | None:
        """How many times faster than what would have been taken before; None if that was not worth measuring."""
        before = self.seconds.get(self.before or self.expected)
        return before and before / self.seconds[self.chosen]


@dataclass(frozen=True)
class Tuning:
    model: str
    input_size: tuple[int, ...]
    threads: int
    cache: str
    entries: list[Tuned]


def tune(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    *,
    passes: Iterable[str] = PASSES,
    cache: str | Path | None = None,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> Tuning:
    """Measures every distinct convolution of `model`, in both memory formats, and writes the cache file.

    What is found holds for these sizes, this number of threads, float32 and this machine. Processes that set
    ``torch_convlab.backends.autotune = True`` load it.

    Args:
        cache: the file (default: ``backends.cache_path``).

    Raises:
        LabError: the model cannot be exported, or the file cannot be written.
    """
    path = check_writable(Path(cache or backends.cache_path))
    program = export(model, torch.zeros(shape), name)
    kinds = replay.distinct(program, lambda step: step.convolution() is not None)
    work = [(kind, pass_, channels_last) for kind in kinds for pass_ in passes for channels_last in _formats(kind)]
    outside, settings = backends.tuned(), _C.settings()
    backends.clear()
    backends.load(path)
    before = backends.tuned()
    backends.clear()
    try:
        # Not through backends.autotune, which would load and, when the process ends, save the user's own cache.
        _C.set_settings("auto", settings[1], True)
        entries = [entry for each in track(work, "measuring") if (entry := _tune(*each, before)) is not None]
        backends.save(path)
    finally:
        _C.set_settings(*settings)
        _C.set_tuned_table({**outside, **backends.tuned()})
    return Tuning(name, tuple(shape), torch.get_num_threads(), str(path), entries)


def _formats(kind: replay.Distinct) -> tuple[bool, ...]:
    """Whether channels_last; the rows of a linear layer always are."""
    if kind.step.is_linear:
        return (True,)
    return (False, True) if len(kind.step.convolution().input_size) == 4 else (False,)


def _tune(kind: replay.Distinct, pass_: str, channels_last: bool, before: dict) -> Tuned | None:
    problem = kind.step.convolution()
    actual, call = pass_calls(problem, pass_, channels_last)
    known = set(backends.tuned())
    call("auto")()
    new = set(backends.tuned()) - known
    columns = problem.stride, problem.padding, problem.dilation, problem.groups
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    expected = explain_convolution(
        problem.input_size, problem.weight_size, *columns, pass_=actual, memory_format=memory_format
    ).chosen
    format_name = "channels_last" if channels_last else "NCHW"
    if not new:  # measured already under another name: a 1x1 convolution and a linear layer, say
        return None
    key = new.pop()
    chosen, seconds = backends.tuned()[key]
    return Tuned(kind.names, pass_, format_name, expected, before.get(key, (None,))[0], chosen, seconds)
