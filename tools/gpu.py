"""On a machine with a GPU: build the CUDA kernels, test them, look for memory errors, and time them against torch's.

    python tools/gpu.py --out FOLDER build test sanitize bench

Stages run in the order named; each prints how long it took, and a failure ends the run. Nothing is installed or
downloaded: the torch that is found is built against, in this folder. Meant to take under 9 minutes on 16 cores.

    build     setup.py build_ext with FORCE_CUDA=1
    test      the emulator's probes on the GPU, then the operators' tests with --device cuda
    sanitize  compute-sanitizer (memcheck, racecheck) over small problems of every kernel; skipped if it is missing
    bench     bench/gpu.py: device times by CUDA events, as JSON and a table in FOLDER
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATORS = ["tests/test_convolution.py", "tests/test_fused.py", "tests/test_pooling.py", "tests/test_normalization.py"]


def python(*arguments: str, seconds: int = 600, **environment: str) -> None:
    command = [sys.executable, *arguments]
    print("$", " ".join(command), flush=True)
    subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        timeout=seconds,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment},
    )


def build(out: Path) -> None:
    jobs = str(min(16, os.cpu_count() or 2))
    python(
        "setup.py", "-q", "build_ext", "--inplace", FORCE_CUDA="1", MAX_JOBS=jobs, TORCH_CUDA_ARCH_LIST=architecture()
    )
    python(
        "-c", "import torch_convlab as t; info = t.build_info(); print(info); assert info['cuda'], 'no CUDA kernels'"
    )


def architecture() -> str:
    """Of the first GPU, as TORCH_CUDA_ARCH_LIST spells it."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU is visible: nvidia-smi, CUDA_VISIBLE_DEVICES")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def test(out: Path) -> None:
    python("-m", "pytest", "-q", "--device", "cuda", "tests/test_emulator.py", seconds=120)
    python("-m", "pytest", "-q", "-x", "--device", "cuda", "-k", "not 2_to_31", *OPERATORS, seconds=300)


def sanitize(out: Path) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not tool:
        print("sanitize: SKIPPED, compute-sanitizer not found")
        return
    for check in ("memcheck", "racecheck"):
        command = [tool, f"--tool={check}", "--error-exitcode=1", sys.executable, str(ROOT / "bench/gpu.py"), "--smoke"]
        print("$", " ".join(command), flush=True)
        subprocess.run(
            command, cwd=ROOT, check=True, timeout=120, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )


def bench(out: Path) -> None:
    python("bench/gpu.py", "--out", str(out), seconds=240)


STAGES = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for results")
    options = parser.parse_args()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}; expected some of {', '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        print(f"== {stage} ==", flush=True)
        start = time.time()
        try:
            STAGES[stage](options.out.resolve())
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            sys.exit(f"== {stage}: FAILED after {time.time() - start:.0f} s: {error} ==")
        print(f"== {stage}: passed in {time.time() - start:.0f} s ==", flush=True)


if __name__ == "__main__":
    main()
