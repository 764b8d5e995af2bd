"""Time the CUDA kernels against torch's (cuDNN's) by CUDA events: ``python bench/gpu.py --out FOLDER``.

Ours is checked against float64 before it is timed. Contenders run by turns on random inputs, the L2 cache is
overwritten before each call, and the median of the rounds counts. torch runs with cudnn.benchmark in both memory
formats, and the better of the two is what ours is compared with. Results are written after every problem, and no
problem is begun after ``--seconds``.

``--smoke`` checks each problem once in small sizes and times nothing: for compute-sanitizer. ``--rehearse`` does
everything in small sizes, on any device, so that the script has run before a GPU is there: ``--device cpu``, or
``emulated``, which runs our CUDA kernels in the emulator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_problems import LIMITS, Problem, problems

import torch_convlab
import torch_convlab.functional as ours

ROOT = Path(__file__).parents[1]
ROUNDS, REPEATS = 9, 5


def tensors_of(problem: Problem, device: str, last: bool) -> list[torch.Tensor]:
    tensors = []
    for shape in problem.shapes:
        tensor = torch.randn(shape, device=device, dtype=torch.float32).to(problem.dtype)
        if len(shape) == 4:
            tensor = tensor.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        tensors.append(tensor.requires_grad_(problem.backward))
    return tensors


def gradient(output: torch.Tensor) -> torch.Tensor:
    """Of the output: small integers, exact in every dtype, that no normalization sums to zero."""
    values = torch.arange(output.numel(), device=output.device) % 7 - 2
    return values.view(output.shape).to(output.dtype)


def computed(problem: Problem, functional, tensors, grad=None) -> list[torch.Tensor]:
    output = problem.call(functional, *tensors)
    if not problem.backward:
        return [output]
    return [output, *torch.autograd.grad(output, tensors, gradient(output) if grad is None else grad)]


def check(problem: Problem, device: str, exact_device: str) -> float:
    """The largest relative error of ours against torch in float64, both formats. NaN if a result is."""
    worst = 0.0
    for last in (False, True):
        tensors = tensors_of(problem, device, last)
        exact = [tensor.detach().to(exact_device).double().requires_grad_(problem.backward) for tensor in tensors]
        for actual, expected in zip(computed(problem, ours, tensors), computed(problem, F, exact)):
            difference = actual.detach().to(exact_device).double() - expected.detach()
            error = (difference.norm() / expected.detach().norm().clamp_min(1e-12)).item()
            worst = error if error != error else max(worst, error)
    return worst


class CpuEvent:
    """torch.cuda.Event where there is no GPU."""

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return (end.at - self.at) * 1e3


def seconds(calls: dict[str, Callable], device: str, rounds: int) -> dict[str, float]:
    """Median device time of each call; contenders take turns, and a flush of the L2 cache comes before each."""
    cuda = device == "cuda"
    flush = torch.empty((128 << 20) if cuda else 1, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3 if cuda else 1):
            call()
    for _ in range(rounds):
        events = []
        for name, call in calls.items():
            for _ in range(REPEATS):
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) if cuda else CpuEvent() for _ in range(2))
                begin.record()
                call()
                end.record()
                events.append((name, begin, end))
        if cuda:
            torch.cuda.synchronize()
        for name in calls:
            spent = [begin.elapsed_time(end) / 1e3 for n, begin, end in events if n == name]
            times[name].append(statistics.median(spent))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(problem: Problem, device: str, rounds: int) -> dict:
    calls = {}
    for last in (False, True):
        tensors = tensors_of(problem, device, last)
        grad = gradient(computed(problem, F, tensors)[0].detach())
        for who, functional in (("ours", ours), ("torch", F)):
            calls[f"{who} {'NHWC' if last else 'NCHW'}"] = lambda f=functional, t=tensors, g=grad: computed(
                problem, f, t, g
            )
    times = seconds(calls, device, rounds)
    best = {who: min(time for name, time in times.items() if name.startswith(who)) for who in ("ours", "torch")}
    moved = problem.elements_moved * torch.finfo(problem.dtype).bits // 8
    return {
        "seconds": times,
        "ratio": best["torch"] / best["ours"],
        "TFLOP/s": 2 * problem.multiply_adds / best["ours"] / 1e12,
        "GB/s": moved / best["ours"] / 1e9,
    }


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy: the ceiling of everything that moves data."""
    source = torch.randn((1 << 28) if device == "cuda" else 1 << 16, device=device)
    target = torch.empty_like(source)
    spent = seconds({"copy": lambda: target.copy_(source)}, device, 3)["copy"]
    return 2 * source.numel() * source.element_size() / spent


def algorithms(problem: Problem) -> list[str]:
    """What computes each pass of a convolution."""
    if problem.convolution is None or problem.algorithm != "auto":
        return [problem.algorithm] if problem.convolution else []
    passes = ("forward", "backward_input", "backward_weight") if problem.backward else ("forward",)
    explain = torch_convlab.explain_convolution
    arguments = {**problem.convolution, "dtype": problem.dtype, "device": "cuda"}
    return [explain(**arguments, pass_=pass_).chosen for pass_ in passes]


def environment(device: str) -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit,
        "copy GB/s": copy_bandwidth(device) / 1e9,
    }


def table(results: list[dict]) -> str:
    lines = [f"{'problem':60} {'ours us':>9} {'torch us':>9} {'ratio':>6} {'TFLOP/s':>8} {'GB/s':>6}  algorithms"]
    for row in results:
        if "seconds" not in row:
            lines.append(f"{row['problem']:60} FAILED: {row['failure']}")
            continue
        best = {w: min(t for n, t in row["seconds"].items() if n.startswith(w)) * 1e6 for w in ("ours", "torch")}
        lines.append(
            f"{row['problem']:60} {best['ours']:9.1f} {best['torch']:9.1f} {row['ratio']:6.2f} "
            f"{row['TFLOP/s']:8.1f} {row['GB/s']:6.0f}  {' '.join(row['algorithms'])}"
        )
    return "\n".join(lines) + "\n"


def run(options) -> list[dict]:
    """The results of all problems that there was time for; a problem that fails says how, and the next one begins."""
    device = "cpu" if options.device == "emulated" else options.device
    small, timed = options.smoke or options.rehearse, not options.smoke
    exact_device = "cpu" if small else device
    begin, results = time.monotonic(), []
    record = environment(device) if timed else {}
    name = (record.get("gpu") or options.device).lower().replace(" ", "-")
    for problem in problems(small):
        if time.monotonic() - begin > options.seconds:
            print(f"{problem.name}: LEFT OUT, {options.seconds} s are over", flush=True)
            continue
        row = {"problem": problem.name, "dtype": str(problem.dtype), "algorithms": algorithms(problem)}
        results.append(row)
        try:
            row["error"] = check(problem, device, exact_device)
            if not row["error"] <= LIMITS[problem.dtype]:
                raise ValueError(f"relative error {row['error']:.3g}, limit {LIMITS[problem.dtype]}")
            row |= compare(problem, device, 1 if small else ROUNDS) if timed else {}
        except (RuntimeError, ValueError) as error:
            row["failure"] = str(error).splitlines()[0]
        print(f"{problem.name}: {row.get('failure') or row.get('ratio') or row['error']}", flush=True)
        if timed:
            (options.out / f"gpu-{name}.json").write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
            (options.out / f"gpu-{name}.txt").write_text(table(results))
    return results


def emulated():
    sys.path.insert(0, str(ROOT / "tests"))
    import emulator

    return emulator.emulated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--smoke", action="store_true", help="small sizes, each problem checked once, no timing")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, everything else as ever")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "emulated"))
    parser.add_argument("--seconds", type=float, default=200, help="no problem is begun after so long")
    options = parser.parse_args()
    if options.device != "cuda" and not (options.smoke or options.rehearse):
        parser.error("timing needs a GPU; --device cpu and emulated go with --smoke or --rehearse")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with emulated() if options.device == "emulated" else contextlib.nullcontext():
        results = run(options)
    if not options.smoke:
        print(table(results))
    if any("failure" in row for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
