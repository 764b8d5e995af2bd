"""What this machine can do at most, measured now: arithmetic and memory traffic, the two roofs of a roofline."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import functional

_SIZE = 1024  # of the square matrices: large enough that their product runs at peak
_COPIED = 128 * 2**20  # bytes, more than any cache
_SECONDS = 0.3  # spent on each measurement


@dataclass(frozen=True)
class Machine:
    """Measured with `threads` threads, in float32; the best of several runs each."""

    cpu: str
    threads: int
    peak: float  # FLOP/s of float32 multiply-adds: those of the fastest of several products
    peak_of: str  # which one
    bandwidth: float  # bytes read and written per second by a copy

    def bound(self, multiply_adds: float, bytes: float) -> tuple[float, str]:
        """Least seconds for so much work, and which roof it meets: ``"arithmetic"`` or ``"memory"``.

        An algorithm that needs fewer multiplications, such as Winograd's, may be faster than the roof of arithmetic.
        """
        arithmetic, memory = 2 * multiply_adds / self.peak, bytes / self.bandwidth
        return (arithmetic, "arithmetic") if arithmetic >= memory else (memory, "memory")


_measured: dict[int, Machine] = {}


def measure_machine() -> Machine:
    """The two roofs for the present number of threads; measured once per process, in about 2 seconds."""
    threads = torch.get_num_threads()
    if threads not in _measured:
        speeds = {name: flops / _best(call) for name, (flops, call) in _products().items()}
        fastest = max(speeds, key=speeds.get)
        source = torch.ones(_COPIED // 4)
        target = torch.empty_like(source)
        copy = _best(lambda: target.copy_(source))
        _measured[threads] = Machine(cpu_name(), threads, speeds[fastest], fastest, 2 * _COPIED / copy)
    return _measured[threads]


def _products() -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> FLOPs and a call of: the product of two large matrices, also as a 1x1 convolution, and a 3x3 convolution.

    No library and no shape is the fastest on every CPU; the best of them comes near to what the multiply-add units do.
    """
    left, right, product = (torch.randn(_SIZE, _SIZE) for _ in range(3))
    filters = right.view(_SIZE, _SIZE, 1, 1)
    image = left.view(1, 1, _SIZE, _SIZE).permute(0, 3, 1, 2)  # rows are the pixels of a channels_last image
    small, filters3 = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
    squares, square3 = 2 * _SIZE**3, 2 * 64 * 64 * 9 * 56 * 56

    def ours(input: torch.Tensor, weight: torch.Tensor, padding: int) -> Callable[[], object]:
        return lambda: functional.conv2d(input, weight, padding=padding, algorithm="implicit_gemm")

    return {
        "torch.mm": (squares, lambda: torch.mm(left, right, out=product)),
        "torch.conv2d, 1x1": (squares, lambda: torch.conv2d(image, filters)),
        "torch_convlab.conv2d, 1x1": (squares, ours(image, filters, 0)),
        "torch.conv2d, 3x3": (square3, lambda: torch.conv2d(small, filters3, padding=1)),
        "torch_convlab.conv2d, 3x3": (square3, ours(small, filters3, 1)),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best(call: Callable[[], object]) -> float:
    """Least seconds of a call, over a while; of the processor with one thread, as in `timing.interleave`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < _SECONDS:
        before = clock()
        call()
        times.append(clock() - before)
    return min(times)
