"""Builds the one extension module, torch_convlab._C, against the installed torch.

Environment: MAX_JOBS (parallel compilations), DEBUG=1 (-O0 -g), USE_CUDA=0 (never build CUDA kernels),
FORCE_CUDA=1 (fail if they cannot be built), TORCH_CUDA_ARCH_LIST (as torch reads it; without it, the GPUs found
here, or 8.0 and 9.0).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
DEBUG = os.environ.get("DEBUG", "0") == "1"
SANITIZE = os.environ.get("SANITIZE", "")  # for example "address,undefined"

COMPILE_FLAGS = [
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-falign-loops=64",  # where the short loop of a register tile starts is left to chance otherwise
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-attributes",
    "-Wno-maybe-uninitialized",  # raised inside gcc 12's own AVX-512 intrinsics
    *(["-O0", "-g"] if DEBUG else ["-O3", "-g0"]),
]
LINK_FLAGS = ["-fopenmp", *([] if DEBUG else ["-s"])]
if SANITIZE:
    # Every load of the kernels is checked: as calls, and without the checks that hardly find what the address sanitizer
    # does not (null), or what x86 allows (alignment), or that there is nothing of (vptr). Else it builds for
    # over half an hour.
    COMPILE_FLAGS += [
        f"-fsanitize={SANITIZE}",
        "-fno-sanitize=null,alignment,object-size,vptr",
        "--param=asan-instrumentation-with-call-threshold=0",
        "-fno-omit-frame-pointer",
        "-O1",
        "-g1",
    ]
    LINK_FLAGS = ["-fopenmp", f"-fsanitize={SANITIZE}"]


class BuildExtension(cpp_extension.BuildExtension):
    """Builds in a fixed folder, so that installing again in place (pip install -e .) compiles only what changed."""

    def initialize_options(self):  # once more in an editable installation, which forgets what setup() was told
        super().initialize_options()
        self.build_temp = f"build/{sys.implementation.cache_tag}"


def first_line(command: list[str]) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return output.strip().splitlines()[0] if output.strip() else ""


def cuda_toolkit() -> str | None:
    """Where CUDA's compiler, headers and libraries are; None if there is no nvcc.

    The nvcc on the PATH may be a script that calls another one elsewhere, which says where it lives.
    """
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return named
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return None
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True)
    top = re.search(r"\bTOP=(\S+)", plan.stdout + plan.stderr)
    return os.path.normpath(top[1]) if top else str(Path(nvcc).resolve().parents[1])


def cuda_decision() -> tuple[bool, str]:
    """Whether to build CUDA kernels, and why."""
    use, force = os.environ.get("USE_CUDA", "1"), os.environ.get("FORCE_CUDA", "0") == "1"
    toolkit = cuda_toolkit()
    if use == "0":
        return False, "USE_CUDA=0"
    if torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    elif not toolkit:
        reason = "nvcc not found"
    else:
        cpp_extension.CUDA_HOME = toolkit
        return True, f"CUDA {torch.version.cuda}, {toolkit}"
    if force:
        sys.exit(f"FORCE_CUDA=1, but CUDA kernels cannot be built: {reason}")
    return False, reason


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def main() -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    cxx_sources = [
        *sources("csrc/*.cpp"),
        *sources("csrc/ops/*.cpp"),
        *sources("csrc/cuda/*.cpp"),
        *sources("csrc/cpu/baseline/*.cpp"),
        *(sources("csrc/cpu/a[mv]x*/*.cpp") if x86 else []),
    ]
    cuda_sources = sources("csrc/cuda/*.cu")
    with_cuda, cuda_reason = cuda_decision()

    compiler = os.environ.get("CXX", "c++")
    found = [
        ("C++ compiler", first_line([compiler, "--version"])),
        ("ninja", first_line([shutil.which("ninja") or "ninja", "--version"])),
        ("torch", torch.__version__),
        ("OpenMP", "-fopenmp" if torch.backends.openmp.is_available() else ""),
        ("instruction sets", "baseline, avx2, avx512, avx512_bf16, amx (chosen at run time)" if x86 else "baseline"),
    ]
    print("torch_convlab build" + (" (DEBUG)" if DEBUG else ""))
    for what, value in found:
        print(f"  {'✓' if value else '✗'} {what}: {value or 'not found'}")
    print(f"  {'✓' if with_cuda else '✗'} CUDA: {cuda_reason}", flush=True)

    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    setup(
        ext_modules=[
            extension(
                "torch_convlab._C",
                cxx_sources + (cuda_sources if with_cuda else []),
                define_macros=[("CONVLAB_WITH_CUDA", None)] if with_cuda else [],
                extra_compile_args={"cxx": COMPILE_FLAGS, "nvcc": ["-O3", "-std=c++17", "-lineinfo"]},
                extra_link_args=LINK_FLAGS,
            )
        ],
        cmdclass={"build_ext": BuildExtension},
    )


if __name__ == "__main__":
    main()
