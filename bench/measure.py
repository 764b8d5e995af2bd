"""Timing by turns: contenders run interleaved in one process, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import torch_convlab


@dataclass
class Result:
    """What a verb returns: a table, lines under it, and the data of the result file."""

    name: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    data: dict = field(default_factory=dict)
    failed: bool = False


@dataclass
class Timing:
    """Seconds per call of every contender, one entry per round."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def best(self, names: list[str]) -> str:
        return min(names, key=self.median)

    def ratio(self, reference: str, ours: str) -> tuple[float, float, float]:
        """Median and quartiles over the rounds of reference time / our time: above 1, ours is faster."""
        ratios = sorted(a / b for a, b in zip(self.rounds[reference], self.rounds[ours]))
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return middle, low, high


def interleave(contenders: dict[str, Callable], rounds: int, seconds: float) -> Timing:
    """Time each contender once per round, repeating it within a round for about `seconds`.

    Wall time, or this process's CPU time when torch runs on one thread: other processes do not count there.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in contenders.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, min(10000, round(seconds / max(clock() - start, 1e-7))))
    result: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        order = list(contenders)
        order = order[index % len(order) :] + order[: index % len(order)]
        for name in order:
            call, count = contenders[name], repeats[name]
            if count > 1:
                call()  # the first call of a turn finds the others' data in the caches
            start = clock()
            for _ in range(count):
                call()
            result[name].append((clock() - start) / count)
    return Timing(result)


def geomean(values) -> float:
    return statistics.geometric_mean(values)


def _first(path: str, key: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def environment() -> dict[str, object]:
    """What a result file must say to be read later."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    # The results that one benchmark leaves do not make the next one's code another.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    commit = git("describe", "--always") + ("-dirty" if changed else "")
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cpu_family": _first("/proc/cpuinfo", "cpu family"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": {key: os.environ[key] for key in os.environ if key.startswith("MALLOC_")} or "default",
        "python": platform.python_version(),
        **torch_convlab.build_info(),
    }
