"""Times ours and torch's in turns, round after round, so that a change of the machine's speed hits all alike."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert import convert, revert


def formats(dimensions: int) -> dict[str, torch.memory_format]:
    """The memory formats of a tensor of so many dimensions, by name."""
    if dimensions == 4:
        return {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    if dimensions == 5:
        return {"NCDHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
    return {"contiguous": torch.contiguous_format}


FORMATS = formats(4)


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, by contestant."""

    task: str
    seconds: dict[str, list[float]]

    def median(self, contestant: str) -> float:
        return statistics.median(self.seconds[contestant])

    def ratio(self, contestant: str, baseline: str) -> tuple[float, float, float]:
        """How many times faster than `baseline`: median and the middle half (quartiles) of the rounds' ratios."""
        ratios = [base / own for own, base in zip(self.seconds[contestant], self.seconds[baseline])]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high

    def spread(self, contestant: str) -> tuple[float, float]:
        """The middle half (quartiles) of the rounds' seconds."""
        low, _, high = statistics.quantiles(self.seconds[contestant], n=4, method="inclusive")
        return low, high

    def best(self, owner: str) -> str:
        """The faster of one owner's contestants, which are called ``<owner> <format>``."""
        return min((name for name in self.seconds if name.startswith(owner)), key=self.median)


def interleave(
    contestants: dict[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.01, task: str = ""
) -> Timing:
    """Seconds per call of every contestant, in turns: one round of each, repeated within it for about `seconds`.

    Wall time; with one thread the process's CPU time, in which other processes do not count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in contestants.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, min(10000, round(seconds / max(clock() - start, 1e-7))))
    result: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(rounds):
        for name in order:
            start = clock()
            for _ in range(repeats[name]):
                contestants[name]()
            result[name].append((clock() - start) / repeats[name])
        order = order[1:] + order[:1]
    return Timing(task, result)


def time_model(
    model: nn.Module, inputs: Tensor, rounds: int = 7, on_round: Callable[[], None] = lambda: None
) -> list[Timing]:
    """Inference and training step (forward, backward, SGD) of `model`, by this library and by torch, in both formats.

    The model is copied for every contestant; the first call of each is not counted.
    """
    contestants = {}
    for format_name, memory_format in formats(inputs.dim()).items():
        for owner, change in (("ours", convert), ("torch", revert)):
            twin = change(copy.deepcopy(model))
            if memory_format is not torch.contiguous_format:
                twin = twin.to(memory_format=memory_format)
            contestants[f"{owner} {format_name}"] = twin, inputs.to(memory_format=memory_format)
    tasks = {"inference": _inference, "training step": _training_step}
    timings = []
    for task, prepare in tasks.items():
        calls = {name: prepare(*contestant) for name, contestant in contestants.items()}
        seconds = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
            on_round()
        timings.append(Timing(task, seconds))
    return timings


def _inference(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    model.eval()

    def call() -> None:
        with torch.inference_mode():
            model(inputs)

    return call


def _training_step(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(inputs).square().mean().backward()
        optimizer.step()

    return call
