"""What this machine can do at most, measured now: arithmetic and memory traffic, the two roofs of a roofline."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_SIZE = 1536  # of the square matrices: large enough that their product runs at peak, 14 MB each
_COPIED = 128 * 2**20  # bytes, more than any cache
_SECONDS = 0.6  # spent on each of the two


@dataclass(frozen=True)
class Machine:
    """Measured with `threads` threads, in float32; the best of several runs each."""

    cpu: str
    threads: int
    peak: float  # FLOP/s of torch's own matrix product ("sgemm peak"): no kernel does more plain multiply-adds
    bandwidth: float  # bytes read and written per second by a copy

    def bound(self, multiply_adds: float, bytes: float) -> tuple[float, str]:
        """Least seconds for so much work, and which roof it meets: ``"arithmetic"`` or ``"memory"``.

        An algorithm that needs fewer multiplications, such as Winograd's, may be faster than the roof of arithmetic.
        """
        arithmetic, memory = 2 * multiply_adds / self.peak, bytes / self.bandwidth
        return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


_measured: dict[int, Machine] = {}


def measure_machine() -> Machine:
    """The two roofs for the present number of threads; measured once per process, in about 1.5 seconds."""
    threads = torch.get_num_threads()
    if threads not in _measured:
        left, right = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
        product, source = torch.empty(_SIZE, _SIZE), torch.ones(_COPIED // 4)
        target = torch.empty_like(source)
        gemm = _best(lambda: torch.mm(left, right, out=product))
        copy = _best(lambda: target.copy_(source))
        _measured[threads] = Machine(cpu_name(), threads, 2 * _SIZE**3 / gemm, 2 * _COPIED / copy)
    return _measured[threads]


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best(call) -> float:
    call()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < _SECONDS:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)
