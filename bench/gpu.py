"""Time the CUDA kernels against torch's (cuDNN's) by CUDA events: ``python bench/gpu.py --out FOLDER``.

Ours is checked against float64 before it is timed. Contenders run by turns on random inputs, the L2 cache is
overwritten before each call, and the median of the rounds counts. torch runs with cudnn.benchmark in both memory
formats, and the better of the two is what ours is compared with. ``--smoke`` runs each problem once on small sizes
and times nothing: for compute-sanitizer, or, with ``--device cpu``, to see that this script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import torch_convlab.functional as ours

ROUNDS, REPEATS = 9, 5


@dataclass
class Problem:
    """`call(functional, *tensors)` computes it with torch.nn.functional or torch_convlab.functional."""

    name: str
    shapes: list[tuple[int, ...]]
    call: Callable
    bytes_moved: Callable  # of the element size: what must be read and written at least
    multiply_adds: int = 0
    dtype: torch.dtype = torch.bfloat16
    tolerance: float = 2e-2
    backward: bool = False


def convolution(name, n, c, size, k, kernel, stride=1, groups=1, backward=False, dtype=torch.bfloat16, tf32=False):
    padding = kernel // 2
    shapes = [(n, c, size, size), (k, c // groups, kernel, kernel)]
    out = (size + 2 * padding - kernel) // stride + 1
    elements = n * c * size**2 + n * k * out**2 + k * c // groups * kernel**2
    return Problem(
        f"{name} {n}x{c}x{size}x{size}->{k} k{kernel} s{stride} g{groups}",
        shapes,
        lambda f, x, w: f.conv2d(x, w, None, stride, padding, 1, groups),
        lambda size: elements * size * (2 if backward else 1),
        n * k * out**2 * (c // groups) * kernel**2 * (2 if backward else 1),
        dtype,
        {torch.float32: 2e-3 if tf32 else 2e-5}.get(dtype, 2e-2),
        backward,
    )


def batch_norm(f, x, w, b):
    return f.batch_norm(x, None, None, w, b, training=True)


def problems(smoke: bool) -> list[Problem]:
    n = 2 if smoke else 64
    list_ = []
    for backward in (False, True):
        what = "backward" if backward else "forward"
        for c, size, k, kernel, stride in (
            (64, 56, 64, 3, 1), (128, 28, 128, 3, 1), (256, 14, 256, 3, 1), (512, 7, 512, 3, 1),
            (256, 56, 64, 1, 1), (512, 28, 1024, 1, 2), (3, 224, 64, 7, 2),
        ):  # fmt: skip
            if smoke:
                c, size, k = min(c, 16), min(size, 9), min(k, 24)
            list_.append(convolution(f"conv {what}", n, c, size, k, kernel, stride, backward=backward))
        for c, size, groups in ((128, 56, 128), (128, 56, 32)):
            if smoke:
                c, size, groups = 16, 9, groups // 8
            list_.append(convolution(f"grouped {what}", n, c, size, c, 3, groups=groups, backward=backward))
        c, size = (16, 9) if smoke else (128, 28)
        list_.append(convolution(f"conv float32 {what}", n, c, size, c, 3, backward=backward, dtype=torch.float32))
        for c, size in ((16, 9),) if smoke else ((64, 112), (256, 56), (2048, 7)):
            shape, elements = (n, c, size, size), n * c * size**2
            norm, pool = elements * (5 if backward else 3), elements * 5 // 4 * (2 if backward else 1)
            list_ += [
                Problem(f"batch norm {what} {shape}", [shape, (c,), (c,)], batch_norm, lambda s, e=norm: e * s,
                        backward=backward),
                Problem(f"max pool {what} {shape}", [shape], lambda f, x: f.max_pool2d(x, 3, 2, 1),
                        lambda s, e=pool: e * s, backward=backward),
                Problem(f"average pool {what} {shape}", [shape], lambda f, x: f.avg_pool2d(x, 3, 2, 1),
                        lambda s, e=pool: e * s, backward=backward),
            ]  # fmt: skip
    return list_


def tensors_of(problem: Problem, device: str, last: bool) -> list[torch.Tensor]:
    tensors = []
    for shape in problem.shapes:
        tensor = torch.randn(shape, device=device, dtype=torch.float32).to(problem.dtype)
        if len(shape) == 4:
            tensor = tensor.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        tensors.append(tensor.requires_grad_(problem.backward))
    return tensors


def gradient(problem: Problem, tensors) -> torch.Tensor:
    """Of the output: small integers, exact in every dtype, that no normalization sums to zero."""
    with torch.no_grad():
        output = problem.call(F, *tensors)
    values = torch.arange(output.numel(), device=output.device) % 7 - 2
    return values.view(output.shape).to(output.dtype)


def computed(problem: Problem, functional, tensors, grad) -> list[torch.Tensor]:
    output = problem.call(functional, *tensors)
    if not problem.backward:
        return [output]
    return [output, *torch.autograd.grad(output, tensors, grad)]


def check(problem: Problem, device: str) -> float:
    """The largest relative error of ours against float64; raises above the tolerance."""
    worst = 0.0
    for last in (False, True):
        tensors = tensors_of(problem, device, last)
        exact = [tensor.detach().cpu().double().requires_grad_(problem.backward) for tensor in tensors]
        grad = gradient(problem, tensors)
        results = computed(problem, ours, tensors, grad), computed(problem, F, exact, grad.cpu().double())
        for actual, expected in zip(*results):
            error = ((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
            worst = max(worst, error)
            if not error <= problem.tolerance:
                raise SystemExit(f"{problem.name}: relative error {error:.3g}, tolerance {problem.tolerance}")
    return worst


def seconds(calls: dict[str, Callable]) -> dict[str, float]:
    """Median device time of each call; contenders take turns, and a flush of the L2 cache comes before each."""
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        events = []
        for name, call in calls.items():
            for _ in range(REPEATS):
                flush.zero_()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                events.append((name, begin, end))
        torch.cuda.synchronize()
        for name in calls:
            spent = [begin.elapsed_time(end) / 1e3 for n, begin, end in events if n == name]
            times[name].append(statistics.median(spent))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(problem: Problem, device: str) -> dict:
    error = check(problem, device)
    calls = {}
    for last in (False, True):
        tensors = tensors_of(problem, device, last)
        grad = gradient(problem, tensors)
        for who, functional in (("ours", ours), ("torch", F)):
            calls[f"{who} {'NHWC' if last else 'NCHW'}"] = lambda f=functional, t=tensors, g=grad: computed(
                problem, f, t, g
            )
    times = seconds(calls)
    best = {who: min(time for name, time in times.items() if name.startswith(who)) for who in ("ours", "torch")}
    size = torch.finfo(problem.dtype).bits // 8
    return {
        "problem": problem.name,
        "dtype": str(problem.dtype),
        "error": error,
        "seconds": times,
        "ratio": best["torch"] / best["ours"],
        "TFLOP/s": 2 * problem.multiply_adds / best["ours"] / 1e12,
        "GB/s": problem.bytes_moved(size) / best["ours"] / 1e9,
    }


def report(results: list[dict], out: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version(), "commit": commit, "results": results}  # fmt: skip
    (out / f"gpu-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"{'problem':60} {'ours us':>9} {'torch us':>9} {'ratio':>6} {'TFLOP/s':>8} {'GB/s':>6}"]
    for row in results:
        best = {w: min(t for n, t in row["seconds"].items() if n.startswith(w)) * 1e6 for w in ("ours", "torch")}
        lines.append(
            f"{row['problem']:60} {best['ours']:9.1f} {best['torch']:9.1f} {row['ratio']:6.2f} "
            f"{row['TFLOP/s']:8.1f} {row['GB/s']:6.0f}"
        )
    (out / f"gpu-{name}.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="small sizes, each problem once, no timing")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only with --smoke")
    options = parser.parse_args()
    if options.device == "cpu" and not options.smoke:
        parser.error("timing needs a GPU; --device cpu goes with --smoke")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    results = []
    for problem in problems(options.smoke):
        if options.smoke:
            print(f"{problem.name}: error {check(problem, options.device):.2g}", flush=True)
        else:
            results.append(compare(problem, options.device))
            print(f"{problem.name}: {results[-1]['ratio']:.2f}", flush=True)
    if not options.smoke:
        report(results, options.out)


if __name__ == "__main__":
    main()
