"""What is installed, how it was built, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import backends, build_info, functional
from .errors import LabError, check_writable
from .machine import cpu_name

_LAB = {"rich": "rich", "matplotlib": "matplotlib", "jinja2": "jinja2", "scikit-learn": "sklearn", "numpy": "numpy"}
_WIDTHS = {"avx512f": "avx512", "avx2": "avx2"}


def info() -> dict[str, dict[str, object]]:
    """Facts about the library, torch and the machine, by section; plain data."""
    built = build_info()
    settings = {name: getattr(backends, name) for name in ("algorithm", "precision", "autotune")}
    return {
        "torch_convlab": {
            "version": built["version"],
            "compiler": f"{'g++ ' if str(built['compiler'])[:1].isdigit() else ''}{built['compiler']}",
            "C++": built["cpp_standard"],
            "OpenMP": built["openmp"] or "none",
            "debug build": built["debug"],
            "instruction set": built["instruction_set"],
            "CUDA kernels": cuda_kernels(),
            **settings,
            "algorithm cache": str(backends.cache_path),
        },
        "torch": {
            "version": torch.__version__,
            "C++ ABI": f"_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            "CUDA": torch.version.cuda or "none",
            "oneDNN": torch.backends.mkldnn.is_available(),
            "threads": torch.get_num_threads(),
        },
        "machine": {
            "CPU": cpu_name(),
            "cores": os.cpu_count(),
            "instruction sets": ", ".join(sorted(_cpu_sets())) or "not known",
            "GPUs": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
            "system": platform.platform(),
            "Python": platform.python_version(),
        },
    }


@dataclass(frozen=True)
class Check:
    """`mend` says what to do; empty if all is well. `severe`: results or speed suffer."""

    name: str
    found: str
    mend: str = ""
    severe: bool = False


def doctor() -> list[Check]:
    """Looks for what is missing or in the way, and says how to mend it."""
    return [_right_results(), _openmp(), _instruction_set(), _threads(), _debug(), _cuda(), *_packages(), *_cache(),
            _compiler()]  # fmt: skip


def cuda_kernels() -> bool:
    """Whether this build can compute on a GPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("convlab::convolution", "CUDA")


def _right_results() -> Check:
    """Every algorithm once, against float64."""
    torch.manual_seed(0)
    input, weight = torch.randn(1, 16, 9, 9), torch.randn(16, 16, 3, 3)
    exact = torch.nn.functional.conv2d(input.double(), weight.double(), padding=1)
    error = (functional.conv2d(input, weight, padding=1).double() - exact).abs().max() / exact.abs().max()
    if error < 1e-5:
        return Check("a 3x3 convolution", f"right, off by {error:.1e}")
    return Check(
        "a 3x3 convolution", f"WRONG, off by {error:.1e}", "build again: pip install --force-reinstall .", True
    )


def _openmp() -> Check:
    if build_info()["openmp"]:
        return Check("OpenMP", "built with it")
    return Check("OpenMP", "built without it: one thread only", "build with a compiler that has -fopenmp", True)


def _instruction_set() -> Check:
    used = str(build_info()["instruction_set"])
    best = next((name for flag, name in _WIDTHS.items() if flag in _cpu_sets()), "baseline")
    if used == best or best == "baseline":
        return Check("instruction set", used)
    capped = os.environ.get("ATEN_CPU_CAPABILITY")
    mend = f"unset ATEN_CPU_CAPABILITY, which is {capped}" if capped else "build on x86-64 with g++ 12 or newer"
    return Check("instruction set", f"{used}, but this CPU has {best}", mend, True)


def _threads() -> Check:
    threads, cores = (
        torch.get_num_threads(),
        len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    )
    if threads > cores:
        mend = f"torch.set_num_threads({cores}), or OMP_NUM_THREADS={cores}"
        return Check("threads", f"{threads} on {cores} usable core(s): they wait for each other", mend, True)
    return Check("threads", f"{threads} on {cores} usable core(s)")


def _debug() -> Check:
    if build_info()["debug"]:
        return Check("build", "with DEBUG=1: slow", "build again without DEBUG", True)
    return Check("build", "optimised")


def _cuda() -> Check:
    if not torch.cuda.is_available():
        return Check("CUDA", "no GPU, or a torch without CUDA: everything runs on the CPU")
    if cuda_kernels():
        return Check("CUDA", f"kernels for {torch.cuda.get_device_name()}")
    return Check(
        "CUDA", "a GPU, but this build has no kernels for it: torch computes there", "build with nvcc on the PATH"
    )


def _packages() -> list[Check]:
    checks = []
    for package in _LAB:
        try:
            checks.append(Check(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(package, "missing", "pip install 'torch_convlab[lab]'"))
    return checks


def _cache() -> list[Check]:
    path = Path(backends.cache_path)
    try:
        existed = path.parent.exists()
        check_writable(path)
        if not existed:
            path.parent.rmdir()
    except (LabError, OSError) as error:
        return [Check("algorithm cache", str(error), "set TORCH_CONVLAB_CACHE to a file that can be written")]
    if not path.exists():
        return [Check("algorithm cache", f"{path}: none yet (the verb tune writes it)")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = len(backends._read(path))
    if caught:
        return [Check("algorithm cache", str(caught[0].message), f"delete {path}, or run the verb tune again")]
    return [Check("algorithm cache", f"{path}: {count} choices")]


def _compiler() -> Check:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler and shutil.which("ninja"):
        return Check("tools to build it again", f"{compiler}, ninja")
    missing = " and ".join(name for name, found in (("c++", compiler), ("ninja", shutil.which("ninja"))) if not found)
    return Check("tools to build it again", f"{missing} missing", "needed only to build from source")


def _cpu_sets() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return set(_WIDTHS) & set(flags) | ({"avx512_bf16", "amx_tile"} & set(flags))
