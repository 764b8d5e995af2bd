"""The CUDA kernels on the CPU: builds csrc/cuda with csrc/emulator, and lets operators run them.

``torch.ops.convlab_emulated`` has every operator of ``torch.ops.convlab``: the same schema, checks and launch, but the
kernels are those for the GPU, one fiber per CUDA thread. CXX in the environment names the compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_convlab
from torch_convlab import _C

ROOT = Path(__file__).parents[1]
SANITIZE = os.environ.get("CONVLAB_EMULATOR_SANITIZE", "")
FLAGS = "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wno-unknown-pragmas"

NINJA = """\
builddir = {build}
rule compile
  command = {compiler} {flags} $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared -pthread {link_flags} $in -o $out
"""


def compile_library(name: str, sources: list[Path], flags: str = "") -> Path:
    """Build a shared library of `sources` and the emulator with ninja; compile only what changed."""
    build = ROOT / "build" / f"emulator{SANITIZE and '-' + SANITIZE}" / name
    build.mkdir(parents=True, exist_ok=True)
    sanitizer = f"-fsanitize={SANITIZE} -fno-omit-frame-pointer" if SANITIZE else ""
    rules = NINJA.format(
        build=build, compiler=os.environ.get("CXX", "g++"), flags=f"{FLAGS} {flags}", link_flags=sanitizer
    )
    library, objects = build / f"{name}.so", []
    scheduler = ROOT / "csrc/emulator/scheduler.cpp"
    for source in [*sources, scheduler]:
        objects.append(build / f"{source.name}.o")
        rules += f"build {objects[-1]}: compile {source}\n"
        # The scheduler switches stacks, which the sanitizers are told of instead of instrumenting it.
        rules += (
            f"  flags = {('-DCONVLAB_TSAN' if SANITIZE == 'thread' else '') if source == scheduler else sanitizer}\n"
        )
    rules += f"build {library}: link {' '.join(map(str, objects))}\n"
    (build / "build.ninja").write_text(rules)
    ninja = Path(sys.executable).with_name("ninja")
    command = [str(ninja) if ninja.exists() else "ninja", "-f", str(build / "build.ninja"), "-j", "2"]
    # A sanitizer that is loaded ahead of Python is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return library


def supported() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"


@functools.cache
def load() -> ctypes.CDLL:
    """The emulated kernels, built if need be, known to the operators, and with their own operators registered."""
    if not supported():
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    path = compile_library("kernels", sorted((ROOT / "csrc/cuda").glob("*.cu")))
    _C.load_emulator(str(path))
    register_operators()
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def emulated(seed: int = 0, workers: int = 2, wide: bool = False):
    """While active, operators on CPU tensors run the CUDA kernels. `seed` shuffles the order of threads; 0 keeps it.
    `wide`: indices have 64 bits, also where 32 are enough."""
    library = load()
    library.convlab_emulator_configure(seed, workers)
    library.convlab_emulator_widen_indices(wide)
    launches = library.convlab_emulator_launches
    launches.restype = ctypes.c_int64
    before = launches()
    _C.set_emulating(True)
    try:
        yield lambda: launches() - before  # how many kernels have run since
    finally:
        _C.set_emulating(False)


def register_operators() -> None:
    library = torch.library.Library("convlab_emulated", "DEF")
    register_operators.library = library  # operators live as long as it does

    def emulate(operator):
        def call(*arguments):
            with emulated():
                return operator(*arguments)

        return call

    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("convlab::"):
            name = schema.name.removeprefix("convlab::")
            library.define(str(schema).removeprefix("convlab::"))
            library.impl(name, emulate(getattr(torch.ops.convlab, name).default), "CPU")


assert torch_convlab  # importing it registers the operators
