"""What a GPU adds to an operator: graphs, so nothing that waits for the device, more than one device, bits that are the
same in any order of threads, offsets beyond int32.

Without a GPU, what can be is run in the emulator, where a seed for the order of threads stands for the scheduler.
"""

from __future__ import annotations

import contextlib
import re

import emulator
import pytest
import torch
from helpers import FORMATS, ROOT, in_format
from test_convolution import unwritten_zeros
from torch.profiler import profile

import torch_convlab.functional as F

OPS = torch.ops.convlab
SIZE = (2, 8, 9, 11)
VECTOR = (8,)


def first_gradient(output, input, grad):
    return torch.autograd.grad(output, input, grad, create_graph=True)[0]


# Each a function of tensors of these sizes, differentiable by all of them. Together they are every operator.
OPERATORS = {
    **{
        f"conv2d {name}": (lambda x, w, b, a=name: F.conv2d(x, w, b, 1, 1, algorithm=a), SIZE, (8, 8, 3, 3), VECTOR)
        for name in ("naive", "implicit_gemm", "winograd", "direct")
    },
    "conv2d inner_product": (lambda x, w, b: F.conv2d(x, w, b, algorithm="inner_product"), SIZE, (8, 8, 1, 1), VECTOR),
    "conv2d strided": (lambda x, w: F.conv2d(x, w, None, 2, 1), SIZE, (8, 8, 3, 3)),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, None, 1, 1, groups=8), SIZE, (8, 1, 3, 3)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, None, 2), SIZE, (8, 4, 2, 2)),
    "convolution_fused": (
        lambda x, w: x + w.sum() + OPS.convolution_fused(
            *(t.detach() for t in (x, w, w[0, :, 0, 0], x)), None, 0.0, 6.0, [1, 1], [1, 1], [1, 1], 1, "auto"
        ), SIZE, (8, 8, 3, 3),
    ),
    "linear": (F.linear, (5, 8), (6, 8), (6,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), SIZE),
    "max_pool2d indices": (lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0], SIZE),
    "max_pool2d double backward": (lambda x, g: x * first_gradient(F.max_pool2d(x, 3, 2, 1), x, g), SIZE, (2, 8, 5, 6)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), SIZE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), SIZE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 4), SIZE),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), SIZE, VECTOR, VECTOR),
    "batch_norm eval": (lambda x, w, b: F.batch_norm(x, x.new_zeros(8), x.new_ones(8), w, b), SIZE, VECTOR, VECTOR),
    "batch_norm_statistics": (lambda x: x * OPS.batch_norm_statistics(x.detach())[0].view(8, 1, 1), SIZE),
    "batch_norm double backward": (
        lambda x, g, w: first_gradient(F.batch_norm_relu(x, None, None, w, None, training=True), x, g),
        SIZE, SIZE, VECTOR,
    ),
    "batch_norm_add_relu": (
        lambda x, y, w, b: F.batch_norm_add_relu(x, y, None, None, w, b, training=True), SIZE, SIZE, VECTOR, VECTOR,
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), SIZE, VECTOR, VECTOR),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (11,), w, b), SIZE, (11,), (11,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (11,), w), SIZE, (11,)),
}  # fmt: skip

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def float32_digits():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def operands(name: str, format: str, device: str = "cpu") -> list[torch.Tensor]:
    tensors = [torch.randn(size, device="cpu") for size in OPERATORS[name][1:]]
    return [(in_format(t, format) if t.dim() == 4 else t).to(device).requires_grad_() for t in tensors]


def computed(name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of its sum of squares."""
    output = OPERATORS[name][0](*tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, output.detach())]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_every_operator_is_among_them():
    with profile() as record:
        for name in OPERATORS:
            computed(name, operands(name, "channels_last"))
    ran = {event.key for event in record.key_averages()}
    known = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("convlab::")}
    assert len(known) > 20 and known - ran == {"convlab::convolution_pack"}  # which has nothing to do on CUDA


def test_nothing_waits_for_the_device():
    """The host side may ask for attributes and errors, and launch; it must not synchronise, allocate or copy."""
    sources = [path.read_text() for folder in ("cuda", "ops") for path in (ROOT / "csrc" / folder).iterdir()]
    calls = {name for text in sources for name in re.findall(r"\b(cu(?:da)?[A-Z]\w*)\s*\(", text)}
    assert calls == {"cudaFuncSetAttribute", "cudaGetLastError", "cudaGetErrorString"}
    waiting = r"\.item\b|\.cpu\(|_local_scalar_dense|nonzero|[sS]ynchronize\("
    python = [path.read_text() for path in (ROOT / "torch_convlab/autograd").glob("*.py")]
    python += [path.read_text() for path in (ROOT / "torch_convlab/functional").glob("*.py")]
    assert not [found for text in sources + python for found in re.findall(waiting, text)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_in_any_order(name, format):
    tensors = operands(name, format)
    with emulator.emulated(seed=0, workers=1):
        expected = computed(name, tensors)
    with emulator.emulated(seed=7):
        assert_same_bits(computed(name, tensors), expected)


@on_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_same_bits_on_a_gpu(name, format):
    tensors = operands(name, format, "cuda")
    expected = computed(name, tensors)
    for _ in range(5):
        assert_same_bits(computed(name, tensors), expected)


@on_gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_graph(name, format):
    """Every operator is captured, with its backward pass, and replayed on other numbers. A launch on another stream
    than the current one, or anything that waits for the device, would be an error."""
    tensors = operands(name, format, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        computed(name, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = computed(name, tensors)
    for result in results:
        result.fill_(float("nan"))
    with torch.no_grad():
        for tensor in tensors:
            tensor.neg_()
    graph.replay()
    assert_same_bits(results, computed(name, tensors))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATORS)
def test_on_another_device(name):
    """Kernels run where the tensors are, not where the current device is."""
    tensors = operands(name, "channels_last", "cuda:1")
    expected = computed(name, [tensor.detach().to("cuda:0").requires_grad_() for tensor in tensors])
    assert_same_bits([result.to("cuda:0") for result in computed(name, tensors)], expected)


def far_zeros(channels: int, side: int, format: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """On the CPU they take no memory until they are written."""
    shape = (1, channels, side, side) if format == "channels_first" else (1, side, side, channels)
    zeros = unwritten_zeros(*shape) if device == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
    return zeros if format == "channels_first" else zeros.permute(0, 3, 1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("format", FORMATS)
def test_offsets_beyond_int32(format, device):
    """2.15e9 elements, of which few are read; int32 would not find the last."""
    channels, step, last = 8, 4000, 16_000
    input = far_zeros(channels, last + 400, format, torch.bfloat16, device)
    values = torch.arange(1, channels + 1, dtype=torch.bfloat16, device=device)
    input[0, :, last, last] = values
    weight = in_format(torch.ones(2, channels, 1, 1, dtype=torch.bfloat16, device=device), format)
    grad = in_format(torch.ones(1, 2, 5, 5, dtype=torch.bfloat16, device=device), format)
    with emulator.emulated() if device == "cpu" else contextlib.nullcontext():
        for algorithm in ("naive", "implicit_gemm", "direct"):
            parameters = [step, step], [0, 0], [1, 1], 1, algorithm
            output = torch.ops.convlab.convolution(input, weight, None, *parameters)
            assert output[0, :, 4, 4].tolist() == [36, 36] and output.count_nonzero() == 2
            gradient = torch.ops.convlab.convolution_backward_weight(grad, input, [2, channels, 1, 1], *parameters)
            assert torch.equal(gradient, values.view(1, -1, 1, 1).expand_as(gradient))
        for pool in (F.max_pool2d, F.avg_pool2d):
            output = pool(input, 1, step)
            assert torch.equal(output[0, :, 4, 4], values) and output.count_nonzero() == channels


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("format", FORMATS)
def test_statistics_beyond_int32(format, device):
    """Of 2.15e9 elements the last pixel alone is not zero: 10 seconds in the emulator, and nothing is written."""
    side, channels = 16_400, 8
    input = far_zeros(channels, side, format, torch.bfloat16, device)
    values = 256.0 * torch.arange(1, channels + 1, device=device)
    input[0, :, -1, -1] = values.bfloat16()
    with emulator.emulated() if device == "cpu" else contextlib.nullcontext():
        mean, variance = torch.ops.convlab.batch_norm_statistics(input)
    # The last steps are in double and rounded once to float32.
    torch.testing.assert_close(mean, values / side**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, values.square() / side**2, rtol=1e-6, atol=0)


COUNTED_IN_32_BITS = [name for name in OPERATORS if "norm" in name or "pool" in name]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", COUNTED_IN_32_BITS)
def test_indices_of_64_bits(name, format):
    """Kernels that choose the width of their indices by the size compute the same with the other one."""
    tensors = operands(name, format)
    with emulator.emulated():
        expected = computed(name, tensors)
    with emulator.emulated(wide=True):
        assert_same_bits(computed(name, tensors), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("format", FORMATS)
def test_batch_norm_beyond_int32(format, device):
    """Forward, backward and double backward of 2.15e9 elements, of which the last pixel alone is not zero. For the
    emulator they are too many: it computes 1.3e6 in the same way."""
    side, channels = 16_400 if device == "cuda" else 400, 8
    input, grad = (far_zeros(channels, side, format, torch.bfloat16, device) for _ in range(2))
    values = torch.arange(1, channels + 1, device=device).bfloat16()
    input[0, :, -1, -1] = values
    grad[0, :, -1, -1] = 1
    with emulator.emulated(wide=True) if device == "cpu" else contextlib.nullcontext():
        x, g = input.detach().requires_grad_(), grad.detach().requires_grad_()
        output = F.batch_norm_add_relu(x, input, None, None, training=True, eps=1.0)
        first = first_gradient(output, x, g)
        (second,) = torch.autograd.grad(first, g, grad)
    # Among so many pixels one moves neither mean nor variance by what bfloat16 shows; ReLU stops all the others.
    for actual, expected in ((output, 2 * values), (first, torch.ones_like(values)), (second, torch.ones_like(values))):
        assert torch.equal(actual[0, :, -1, -1], expected) and (actual.abs() > 1e-3).sum() == channels


@on_gpu
@pytest.mark.parametrize("format", FORMATS)
def test_winograd_beyond_int32(format):
    """The last pixel alone is not zero, and in the output its neighbours."""
    side = 16_400
    input = far_zeros(8, side, format, torch.float32, "cuda")
    input[0, :, -1, -1] = 1
    output = F.conv2d(input, torch.ones(8, 8, 3, 3, device="cuda"), None, 1, 1, algorithm="winograd")
    assert (output[0, :, -2:, -2:] - 8).abs().max() < 1e-4
    output[0, :, -4:, -4:] = 0  # a tile, over which the transforms spread their rounding
    assert output.count_nonzero() == 0
