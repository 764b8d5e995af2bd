"""Build torch_convlab with its CUDA kernels against a torch without CUDA, and load it: ``python tools/cuda_build.py``.

For machines with nvcc but no GPU: setup.py decides, nvcc compiles, the linker links and Python imports what a machine
with a GPU would. Torch is told, in that process alone, that it has CUDA; its two CUDA libraries, of which the kernels
need no symbol, are empty ones. Works in a copy of the tree under build/cuda-build; 6 minutes on 2 cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("csrc", "torch_convlab", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
import re, runpy, subprocess, sys
import torch
torch.version.cuda = re.search(r"release ([0-9.]+)", subprocess.check_output(["nvcc", "--version"], text=True))[1]
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
# Every operator has a CUDA kernel, and asks for a GPU only where it needs one.
LOAD = """
import torch, torch_convlab
assert torch_convlab.build_info()["cuda"], torch_convlab.build_info()
names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("convlab::")]
missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
assert len(names) > 20 and not missing, missing
output = torch_convlab.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))
assert torch.equal(output, torch.full((1, 1, 2, 2), 9.0))
print(f"cuda-build: {torch_convlab.__file__} has {len(names)} operators for CUDA")
"""


def main() -> None:
    if not shutil.which("nvcc"):
        print("cuda-build: SKIPPED, nvcc not found")
        return
    copy, libraries = ROOT / "build/cuda-build", ROOT / "build/cuda-build/libraries"
    libraries.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy2(source, target)
    for name in ("c10_cuda", "torch_cuda"):
        command = ["c++", "-shared", "-x", "c", "/dev/null", "-o", str(libraries / f"lib{name}.so")]
        subprocess.run(command, check=True)
    paths = os.pathsep.join([str(libraries), os.environ.get("LIBRARY_PATH", "")])
    environment = {
        **os.environ,
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0"),
        "LIBRARY_PATH": paths,
        "LD_LIBRARY_PATH": os.pathsep.join([str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]),
    }
    for code in (BUILD, LOAD):
        subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, check=True)


if __name__ == "__main__":
    main()
