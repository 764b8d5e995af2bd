"""What a GPU adds to an operator: graphs, more than one device, bits that are the same in any order of threads, offsets
beyond int32.

Without a GPU, what can be is run in the emulator, where a seed for the order of threads stands for the scheduler.
"""

from __future__ import annotations

import contextlib

import emulator
import pytest
import torch
from helpers import FORMATS, in_format
from test_convolution import unwritten_zeros

import torch_convlab.functional as F

SIZE = (2, 8, 9, 11)
VECTOR = (8,)

# Each a function of tensors of these sizes.
OPERATORS = {
    **{
        f"conv2d {name}": (lambda x, w, b, a=name: F.conv2d(x, w, b, 1, 1, algorithm=a), SIZE, (8, 8, 3, 3), VECTOR)
        for name in ("naive", "implicit_gemm", "winograd", "direct")
    },
    "conv2d inner_product": (lambda x, w, b: F.conv2d(x, w, b, algorithm="inner_product"), SIZE, (8, 8, 1, 1), VECTOR),
    "conv2d strided": (lambda x, w: F.conv2d(x, w, None, 2, 1), SIZE, (8, 8, 3, 3)),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, None, 1, 1, groups=8), SIZE, (8, 1, 3, 3)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, None, 2), SIZE, (8, 4, 2, 2)),
    "linear": (F.linear, (5, 8), (6, 8), (6,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), SIZE),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), SIZE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), SIZE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 4), SIZE),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), SIZE, VECTOR, VECTOR),
    "batch_norm double backward": (
        lambda x, g, w: torch.autograd.grad(
            F.batch_norm_relu(x, None, None, w, None, training=True), x, g, create_graph=True
        )[0], SIZE, SIZE, VECTOR,
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
