"""On a machine with a GPU: build the CUDA kernels, test them, look for memory errors, and time them against torch's.

    python tools/gpu.py --out FOLDER build test bench sanitize

Stages run in the order named; each prints how long it took and leaves its log in FOLDER. A failed build ends the run,
any other failure is told at the end. Nothing is installed or downloaded: the torch that is found is built against, in
this folder. Meant for 16 cores; no stage goes on after 9 minutes.

    build     setup.py build_ext with FORCE_CUDA=1, for the GPU that is there
    test      the emulator's probes on the GPU, then the operators' tests with --device cuda, side by side
    bench     bench/gpu.py: device times by CUDA events, as JSON and a table in FOLDER
    sanitize  compute-sanitizer (memcheck, racecheck) over small problems of every kernel; skipped if it is missing
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The tests of the operators, their gradients, fusion and models; those of the lab and the package stay on the CPU.
OPERATORS = [
    "convolution", "fused", "linear", "pooling", "pooling_backward", "pooling_layers", "normalization",
    "normalization_layers", "normalization_derivatives", "normalization_double_backward", "autograd", "errors", "fuse",
    "fuse_epilogues", "recompute", "models", "device",
]  # fmt: skip
NEEDED = {
    "build": ["torch", "setuptools", "ninja"],
    "test": ["torch", "pytest", "numpy"],
    "sanitize": ["torch"],
    "bench": ["torch"],
}
TOOLKIT = "/usr/local/cuda/bin"
SECONDS, START = 540, time.monotonic()


def left() -> float:
    """Seconds that are left for the stages."""
    return max(1.0, SECONDS - (time.monotonic() - START))


def python(log: Path, *arguments: str, seconds: int, before=(), **environment: str) -> None:
    """Run Python with these arguments, its output in `log`; raises if it fails or takes longer than `seconds`."""
    command = [*before, sys.executable, *arguments]
    print("$", " ".join(command), flush=True)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    environment["PATH"] = os.pathsep.join([environment["PATH"], TOOLKIT])
    with log.open("a") as file:
        try:
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            subprocess.run(command, cwd=ROOT, check=True, timeout=min(seconds, left()), env=environment, **output)
        finally:
            file.flush()
            print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)


def build(out: Path) -> None:
    log, jobs = out / "build.log", str(min(16, os.cpu_count() or 2))
    environment = {"FORCE_CUDA": "1", "MAX_JOBS": jobs, "TORCH_CUDA_ARCH_LIST": architecture()}
    python(log, "setup.py", "-q", "build_ext", "--inplace", seconds=360, **environment)
    loaded = "import torch_convlab as t; info = t.build_info(); print(t.__file__, info); assert info['cuda']"
    python(log, "-c", loaded, seconds=60)


def architecture() -> str:
    """Of the first GPU, as TORCH_CUDA_ARCH_LIST spells it."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU is visible: nvidia-smi, CUDA_VISIBLE_DEVICES")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def test(out: Path) -> None:
    def run(name: str) -> bool:
        tests = ["-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "--tb=short", "--device", "cuda"]
        try:
            python(logs[name], *tests, "-k", "not than_int32 and not 2_to_31", f"tests/test_{name}.py", seconds=240)
        except subprocess.SubprocessError as error:
            print(f"tests/test_{name}.py: FAILED: {error}", flush=True)
            return False
        return True

    logs = {name: out / f"test-{name}.part" for name in ["emulator", *OPERATORS]}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        passed = list(pool.map(run, logs))
    with (out / "test.log").open("a") as whole:
        for log in logs.values():
            whole.write(log.read_text(errors="replace"))
            log.unlink()
    if not all(passed):
        raise subprocess.SubprocessError(f"{passed.count(False)} of {len(passed)} test files failed")


def sanitize(out: Path) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    if not tool:
        print("sanitize: SKIPPED, compute-sanitizer not found")
        return
    for check in ("memcheck", "racecheck"):
        before = (tool, f"--tool={check}", "--error-exitcode=1")
        smoke = ("bench/gpu.py", "--smoke", "--seconds", "60")
        python(out / "sanitize.log", *smoke, before=before, seconds=100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def bench(out: Path) -> None:
    seconds = min(150, max(0, left() - 30))  # no problem is begun after so long
    python(out / "bench.log", "bench/gpu.py", "--out", str(out), "--seconds", f"{seconds:.0f}", seconds=240)


STAGES = {"build": build, "test": test, "bench": bench, "sanitize": sanitize}


def missing(stages: list[str]) -> list[str]:
    modules = dict.fromkeys(module for stage in stages for module in NEEDED[stage])
    return [module for module in modules if importlib.util.find_spec(module) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for results and logs")
    options = parser.parse_args()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}; expected some of {', '.join(STAGES)}")
    if absent := missing(options.stages):
        parser.error(f"{sys.executable} has no {', '.join(absent)}: install them, or name the stages to do without")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for stage in options.stages:
        print(f"== {stage} ==", flush=True)
        start = time.time()
        try:
            STAGES[stage](out)
        except (subprocess.SubprocessError, OSError) as error:
            failures.append(f"{stage}: FAILED after {time.time() - start:.0f} s: {error}")
            print(f"== {failures[-1]} ==", flush=True)
            if stage == "build":
                break
        else:
            print(f"== {stage}: passed in {time.time() - start:.0f} s ==", flush=True)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
