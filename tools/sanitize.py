"""Run the CUDA kernels in the emulator under a sanitizer: ``python tools/sanitize.py address thread``.

The kernels are built with the sanitizer, the emulator beneath them is not: it switches stacks. The sanitizer's library
is loaded ahead of Python's, which knows nothing of it; that is why leaks are not looked for. First a kernel with a
planted bug runs, which the sanitizer must report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
PLANTED = "planted_for_the_sanitizer"
REPORTED = 66  # exit code of a process that a sanitizer ends
# The emulator's own kernels, every operator and algorithm with its gradients, and, of the rest, odd shapes.
TESTS = ["tests/test_emulator.py", "tests/test_device.py", "tests/test_cuda.py"]
SELECTED = {
    "address": "correct_kernels or products or same_bits or map_1x1 or multiplier2-direct or k31-depthwise "
    "or gaps-2x3x9x11 or channels_5_to_3",
    "thread": "correct_kernels or products or same_bits",
}


def run(sanitizer: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run(
        [compiler, f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "CONVLAB_EMULATOR_SANITIZE": sanitizer,
        "LD_PRELOAD": str(Path(found).resolve()),
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0:exitcode={REPORTED}",
        "TSAN_OPTIONS": f"report_bugs=1:halt_on_error=1:exitcode={REPORTED}:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
    }
    pytest = [sys.executable, "-m", "pytest", "-x", "-q"]
    planted = [*pytest, TESTS[0], "-k", PLANTED]
    code = subprocess.run(planted, env=environment, cwd=ROOT, capture_output=True).returncode
    if code != REPORTED:
        sys.exit(f"{sanitizer} sanitizer: expected exit code {REPORTED} for a planted bug, but got {code}")
    print(f"{sanitizer} sanitizer: the planted bug was reported", flush=True)
    command = [*pytest, *TESTS, "-k", SELECTED[sanitizer]]
    print(f"{sanitizer} sanitizer: {' '.join(command)}", flush=True)
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sanitizer", nargs="+", choices=LIBRARIES)
    for sanitizer in parser.parse_args().sanitizer:
        run(sanitizer)


if __name__ == "__main__":
    main()
