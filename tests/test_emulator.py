"""The emulator that runs CUDA kernels on the CPU: what it computes, and the bugs that it must catch.

Every probe in emulator_kernels/probes.cu is a correct kernel into which an argument plants a bug. With --device cuda
the correct ones run on the GPU instead: each primitive of csrc/cuda/simt.h, the GPU against the same expectations.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess

import emulator
import pytest
import torch

SEEDS = (0, 1, 2, 3)


@functools.cache
def probes(device: str) -> ctypes.CDLL:
    source = emulator.ROOT / "tests/emulator_kernels/probes.cu"
    if device == "cuda":
        library = emulator.ROOT / "build/probes-cuda.so"
        library.parent.mkdir(exist_ok=True)
        command = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-o", library, source]
        subprocess.run(list(map(str, command)), check=True)
    elif emulator.supported():
        library = emulator.compile_library("probes", [source])
    else:
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    loaded = ctypes.CDLL(str(library))
    loaded.probe_error.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def device(request) -> str:
    return "cuda" if request.config.option.device == "cuda" else "cpu"


def run(name: str, device: str, seed: int, tensors, *numbers: int) -> str:
    """Run a probe on tensors, all of which are copied to the device and back; its error message, empty for none."""
    library = probes(device)
    if device == "cpu":
        library.convlab_emulator_configure(seed, 2)
    on_device = [tensor.to(device) for tensor in tensors]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in on_device]
    code = getattr(library, f"probe_{name}")(*pointers, *numbers, ctypes.c_void_p(0))
    if device == "cuda" and code == 0:
        torch.cuda.synchronize()
    for tensor, there in zip(tensors, on_device):
        tensor.copy_(there)
    return library.probe_error(code).decode() if code else ""


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def sums(device, seed, bug=0):
    x, y = normal(5 * 128), torch.full((5 * 128,), float("nan"))
    error = run("sum_blocks", device, seed, (x, y), 5, bug)
    expected = x.double().view(5, 128).sum(1, keepdim=True).expand(5, 128)
    return error, torch.allclose(y.double().view(5, 128), expected, atol=1e-4)


def copies(device, seed, bug=0):
    x, y = normal(1024 + 4)[:1024], torch.full((1024,), float("nan"))
    error = run("copy", device, seed, (x, y), bug)
    return error, torch.equal(x, y)


def products(device, seed, bug=0, dtype=torch.bfloat16):
    a, b, y = normal(16, 16, dtype=dtype), normal(8, 16, dtype=dtype), torch.full((16, 8), float("nan"))
    error = run(f"multiply_{str(dtype).removeprefix('torch.')}", device, seed, (a, b, y), bug)
    return error, torch.allclose(y.double(), a.double() @ b.double().T, atol=1e-4)


def shuffles(device, seed, bug=0):
    x, y = normal(32), torch.full((32,), float("nan"))
    error = run("shuffle", device, seed, (x, y), bug)
    return error, torch.allclose(y.double(), x.double().sum().expand(32), atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probe", [sums, copies, products, shuffles], ids=lambda probe: probe.__name__)
def test_correct_kernels(probe, seed, device):
    assert probe(device, seed) == ("", True)


def test_products_in_float16(device):
    assert products(device, 0, dtype=torch.float16) == ("", True)


def test_products_of_transposed_operands(device):
    a, b, y = normal(16, 16, dtype=torch.bfloat16), normal(16, 8, dtype=torch.bfloat16), torch.empty(16, 8)
    assert run("multiply_transposed", device, 0, (a, b, y), 0) == ""
    torch.testing.assert_close(y.double(), a.double().T @ b.double(), atol=1e-4, rtol=1e-4)


def test_products_in_tf32(device):
    """Operands keep 10 bits of mantissa, rounded to nearest: halfway cases of 11 bits tell rounding from truncation."""
    a, b, y = normal(16, 8), normal(8, 8), torch.empty(16, 8)
    a[0, 0], a[1, 1] = 1 + 2.0**-11, 1 + 2.0**-10 + 2.0**-11
    assert run("multiply_tf32", device, 0, (a, b, y), 0) == ""

    def rounded(tensor):
        bits = tensor.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    assert rounded(a)[0, 0] == 1 + 2.0**-10 and not torch.equal(rounded(a), a)
    torch.testing.assert_close(y.double(), rounded(a).double() @ rounded(b).double(), atol=2e-6, rtol=1e-6)


def test_impossible_launches_are_errors(device):
    assert "invalid" in run("too_many_threads", device, 0, (normal(32), normal(32)), 0)


# What the emulator says of each planted bug; None: it says nothing, but the result is wrong for any seed.
BUGS = {
    "missing barrier": (sums, 1, None),
    "index outside of shared memory": (sums, 2, "of a shared array's dimension of 128"),
    "read outside of global memory": (sums, 3, "access to element 640 of an array of 640 in global memory"),
    "wrong index": (sums, 4, None),
    "short wait for asynchronous copies": (copies, 1, None),
    "asynchronous copies without a barrier": (copies, 2, None),
    "misaligned asynchronous copy": (copies, 3, "misaligned access of 16 bytes"),
    "missing warp barrier": (products, 1, None),
    "lane missing from a collective": (products, 2, "deadlock"),
    "divergent barrier": (shuffles, 1, "deadlock"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, seed, device):
    if device == "cuda":
        pytest.skip("only correct kernels run on a GPU")
    probe, number, message = BUGS[bug]
    error, right = probe("cpu", seed, number)
    if message is None:
        assert error == "" and not right
    else:
        assert message in error and "in block (" in error
        assert probe("cpu", seed) == ("", True)  # the next launch is not harmed


# A bug that each sanitizer must end the process for; tools/sanitize.py asks for it.
FOR_SANITIZERS = {"thread": (sums, 1), "address": (sums, 5)}


@pytest.mark.skipif(not emulator.SANITIZE, reason="without a sanitizer nobody reports it")
def test_planted_for_the_sanitizer():
    probe, number = FOR_SANITIZERS[emulator.SANITIZE]
    probe("cpu", 1, number)
