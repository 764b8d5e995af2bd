"""Compile every CUDA kernel for sm_80 and sm_90a, and check what the compiler made of it. No GPU is needed.

Fails if a kernel spills registers, keeps arrays in local memory, takes more registers than its cap, or if its machine
code lacks an instruction that it was written for: the product of tensor cores, an asynchronous copy, a wide load. That
last check needs nvdisasm or cuobjdump (on PyPI: nvidia-cuda-nvdisasm). Where a tool is missing the checks that need it
are skipped, and the last line says so.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"]

# Registers per thread: 65536 of a multiprocessor over the threads that should be resident, at least 512. The first
# pattern found in the kernel's name counts.
REGISTER_CAPS = {
    "Gemm<": 255,  # one block of 256 threads: sums, fragments and addresses stay in registers
    "reduce_": 255,  # float64 and the widest vectors; those of float32 are near 128
    "": 128,
}
# Bytes that a kernel may spill, with the reason.
SPILLS_ALLOWED = {
    "_backward<": 96,  # pooling: addresses of the three axes, once a thread and outside of the inner loop
    "_forward<double": 48,  # the same
    "reduce_": 96,  # normalization: constants of the widest vectors, outside of the loop
    "depthwise_pixels<": 96,  # addresses and sizes, outside of the loops over taps; so are the next two
    "direct_pixels<": 64,
    "weight_rows<": 48,
    "write_double<double": 16,  # second derivative of batch norm: constants of the channel, loaded once a thread
    "naive_": 160,  # the definition, in 64 bits: nobody waits for it
}
# What the machine code of the kernels whose names match must hold.
INSTRUCTIONS = {
    r"Gemm<": r"HMMA",
    r"Gemm<\w+, \S+ true,": r"LDGSTS",  # cp.async, where operands are copied 16 bytes at a time
    r"(inner_products|sums_of_filters)<\w+, [248],": r"LDG\.E\.\S*128",  # weights
    r"(depthwise_pixels|direct_pixels|weight_rows)<\w+, 4,": r"LDG\.E\.\S*(64|128)",  # vectors of four channels
}


# What it must not hold.
FORBIDDEN = {
    # Winograd's matrices are constants: no table in local memory, no float64.
    r"(transform|write)_(tiles|weights)\b": r"LDL|F2F|DFMA|DADD|DMUL",
}


@dataclass
class Kernel:
    source: str
    architecture: str
    symbol: str
    name: str = ""
    registers: int = 0
    spilled: int = 0
    arrays: int = 0  # bytes of local memory that are no spills

    def faults(self) -> list[str]:
        cap = next(cap for pattern, cap in REGISTER_CAPS.items() if pattern in self.name)
        allowed = next((most for pattern, most in SPILLS_ALLOWED.items() if pattern in self.name), 0)
        faults = []
        if self.registers > cap:
            faults.append(f"{self.registers} registers, cap {cap}")
        if self.arrays > 16:  # what calls of the compiler's own functions take
            faults.append(f"{self.arrays} bytes of arrays in local memory")
        if self.spilled > allowed:
            faults.append(f"{self.spilled} bytes spilled, {allowed} allowed")
        return faults


def parse(log: str, source: str, architecture: str) -> list[Kernel]:
    """The kernels that ``ptxas -v`` tells of."""
    kernels = []
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append(Kernel(source, architecture, match[1]))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].spilled = int(match[2]) + int(match[3])
            kernels[-1].arrays = int(match[1]) - int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(match[1])
    names = subprocess.run(["c++filt"], input="\n".join(k.symbol for k in kernels), capture_output=True, text=True)
    for kernel, name in zip(kernels, names.stdout.splitlines()):
        kernel.name = (
            name.replace("(anonymous namespace)::", "").replace("convlab::cuda::", "").replace("convlab::", "")
        )
    return kernels


def compile_source(nvcc: str, source: Path, architecture: str, out: Path) -> tuple[Path, str]:
    """The cubin of a source and what the compiler said, kept from the last time if no source is newer."""
    cubin, log = out / f"{source.stem}.{architecture}.cubin", out / f"{source.stem}.{architecture}.log"
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h")]
    newest = max(path.stat().st_mtime for path in (source, Path(__file__), *headers))
    if not (cubin.exists() and log.exists() and min(cubin.stat().st_mtime, log.stat().st_mtime) > newest):
        target = f"arch={ARCHITECTURES[architecture]},code={architecture}"
        command = [nvcc, *FLAGS, "-gencode", target, "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        log.write_text(done.stdout + done.stderr)
    return cubin, log.read_text()


def host_faults() -> list[str]:
    """What the C++ compiler says to the host side of a build with CUDA, which torch without CUDA never compiles."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return []
    sources = [ROOT / "csrc/library.cpp", ROOT / "csrc/cuda/device.cpp"]
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-DCONVLAB_WITH_CUDA", *include, *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    return [done.stderr] if done.returncode else []


def disassembler() -> list[str] | None:
    """A command that disassembles a cubin: from the PATH, or from NVIDIA's packages for Python."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for tool, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        if found := shutil.which(tool) or next(map(str, packages.glob(f"**/bin/{tool}")), None):
            return [found, *options]
    return None


def code_faults(disassemble: list[str], cubin: Path, kernels: list[Kernel]) -> list[str]:
    """What the machine code of these kernels, all those of a cubin, lacks, and what it should not hold."""
    wanted, unwanted = (
        {k.symbol: [i for name, i in rules.items() if re.search(name, k.name)] for k in kernels}
        for rules in (INSTRUCTIONS, FORBIDDEN)
    )
    if not any(wanted.values()) and not any(unwanted.values()):
        return []
    done = subprocess.run([*disassemble, str(cubin)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(disassemble)} {cubin}: {done.stderr}")
    found, function = {symbol: set() for symbol in wanted}, ""
    for line in done.stdout.splitlines():
        if match := re.search(r"Function : (\S+)|^\.text\.(\S+):", line.strip()):
            function = match[1] or match[2]
        elif function in found:
            found[function].update(i for i in wanted[function] + unwanted[function] if re.search(i, line))
    faults = []
    for k in kernels:
        faults += [f"{k.name} ({k.architecture}): no {i}" for i in wanted[k.symbol] if i not in found[k.symbol]]
        faults += [f"{k.name} ({k.architecture}): has {i}" for i in unwanted[k.symbol] if i in found[k.symbol]]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    parser.add_argument("--verbose", action="store_true", help="list every kernel")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if not nvcc:
        print("cuda-check: SKIPPED, nvcc not found")
        return
    out = ROOT / "build/cuda-check"
    out.mkdir(parents=True, exist_ok=True)
    # The largest first, or the last to finish would leave the other cores idle.
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    print(f"cuda-check: {len(jobs)} compilations, 2 minutes on 2 cores the first time", flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: compile_source(nvcc, *job, out), jobs))
    disassemble = disassembler()
    kernels, failures = [], host_faults()
    for (source, architecture), (cubin, log) in zip(jobs, results):
        found = parse(log, source.name, architecture)
        kernels += found
        failures += code_faults(disassemble, cubin, found) if disassemble else []
    for kernel in kernels:
        failures += [f"{kernel.source} {kernel.architecture} {kernel.name}: {fault}" for fault in kernel.faults()]
        if options.verbose:
            print(f"{kernel.architecture:7} {kernel.registers:4} registers {kernel.spilled:4} spilled  {kernel.name}")
    unused = [
        name for name in (*INSTRUCTIONS, *FORBIDDEN) if not any(re.search(name, kernel.name) for kernel in kernels)
    ]
    failures += [f"no kernel is called {name}" for name in unused]
    checked = "as expected" if disassemble else "NOT CHECKED, no nvdisasm or cuobjdump"
    if failures:
        sys.exit("\n".join(failures))
    print(
        f"cuda-check: {len(kernels)} kernels for {', '.join(ARCHITECTURES)}: registers and spills in bounds, "
        f"machine code {checked}"
    )


if __name__ == "__main__":
    main()
