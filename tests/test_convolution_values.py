"""Which numbers come out: NaN and infinity, rounding, overflow, exact sums of integers, long sums."""

from __future__ import annotations

import helpers
import pytest
import torch
from cases import BY_NAME
from helpers import (
    ALGORITHMS,
    ANY_GEOMETRY,
    FACTOR,
    FORMATS,
    KERNELS,
    assert_exact,
    in_format,
    laid_out,
    refusal,
    run_pass,
)

from torch_convlab import functional as F


def special(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Which elements are NaN, +Inf and -Inf."""
    return [tensor.isnan(), tensor == float("inf"), tensor == float("-inf")]


POISONED = (
    "pointwise",
    "pointwise_blocks",
    "3x3_valid_batch3",
    "3x3_stride2_odd",
    "grouped_stride2",
    "depthwise_3x3_odd",
    "1d_k3",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name, algorithm",
    [(name, algorithm) for name in POISONED for algorithm in ALGORITHMS if not refusal(BY_NAME[name], algorithm)],
)
def test_nan_and_inf_propagate(name, algorithm, format, dtype):
    """A special value reaches the elements that read it; where tiles are transformed, their neighbours too."""
    case = BY_NAME[name]
    for value in (float("nan"), float("inf"), float("-inf")):
        for pass_, poisoned in (
            ("forward", "input"), ("backward_input", "grad_output"), ("backward_weight", "grad_output"),
        ):  # fmt: skip
            if refusal(case, algorithm, pass_, dtype, format=format):
                continue
            tensors = laid_out(case, dtype, format)
            at = tuple(size // 2 for size in tensors[poisoned].shape)
            tensors[poisoned][at] = value
            double = {key: None if tensor is None else tensor.double() for key, tensor in tensors.items()}
            expected = run_pass(case, pass_, "naive", **double)
            assert not expected.isfinite().all() and expected.isfinite().any()
            actual = run_pass(case, pass_, algorithm, **tensors)
            if algorithm in FACTOR or algorithm == "auto":
                assert (~actual.isfinite() | expected.isfinite()).all()
            else:
                assert all(torch.equal(*pair) for pair in zip(special(actual), special(expected)))


@pytest.mark.skipif(helpers.KERNELS == "cuda", reason="strassen has kernels for the CPU alone")
def test_strassen_keeps_images_apart():
    """Pixels are added to partners of their own image: no digit depends on the rest of the batch, not even on NaN."""
    for size in ((7, 7), (15, 13)):
        input = torch.randn(3, 64, *size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(96, 64, 1, 1)
        alone = F.conv2d(input[1:2], weight, algorithm="strassen")
        input[0], input[2] = 1e30, float("nan")
        assert torch.equal(F.conv2d(input, weight, algorithm="strassen")[1:2], alone)


def test_nan_and_inf_as_torch():
    """The naive algorithm, which judges the others above, agrees with torch; so do special weights and biases."""
    input, weight, bias = torch.randn(2, 3, 7, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    for tensor in (input, weight, bias):
        for value in (float("nan"), float("inf"), float("-inf")):
            keep, tensor.view(-1)[1] = tensor.view(-1)[1].clone(), value
            expected = torch.nn.functional.conv2d(input, weight, bias)
            for algorithm in ("naive", "implicit_gemm"):
                actual = F.conv2d(input, weight, bias, algorithm=algorithm)
                assert all(torch.equal(*pair) for pair in zip(special(actual), special(expected)))
            tensor.view(-1)[1] = keep


def test_overflow_of_16_bit_results_is_inf():
    for dtype, large in ((torch.float16, 60000.0), (torch.bfloat16, 3e38)):
        input, weight = torch.full((1, 2, 3, 3), large, dtype=dtype), torch.ones(1, 2, 1, 1, dtype=dtype)
        assert torch.equal(F.conv2d(input, weight), torch.full((1, 1, 3, 3), float("inf"), dtype=dtype))
        assert torch.equal(F.conv2d(input, -weight), torch.full((1, 1, 3, 3), float("-inf"), dtype=dtype))


def test_rounding_to_16_bits_is_to_nearest_even():
    """Halfway sums: 1 + 2^-k rounds down to the even neighbour, the next odd value's half rounds up."""
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.finfo(dtype).eps / 2
        input = torch.tensor([[[1.0, half], [1 + 2 * half, half]]], dtype=dtype).view(2, 2, 1, 1)
        weight = torch.ones(1, 2, 1, 1, dtype=dtype)
        for algorithm in ANY_GEOMETRY:
            output = F.conv2d(input, weight, algorithm=algorithm)
            assert output.flatten().tolist() == [1.0, 1 + 4 * half]


@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (2, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shift_invariance(algorithm, shift):
    """Lecture item L6: shift(conv(x)) is conv(shift(x)), exactly, away from the border."""
    if helpers.KERNELS == "cuda" and algorithm == "strassen":
        pytest.skip("strassen has kernels for the CPU alone")
    down, right = shift
    input = torch.randint(-8, 9, (2, 8, 20, 24)).float()  # sums of small integers are exact
    groups = 8 if algorithm == "depthwise" else 1
    size = 1 if algorithm in ("inner_product", "strassen") else 3
    filters = 8
    if algorithm == "strassen":
        input, filters = input.repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last), 64
    weight = torch.randint(-8, 9, (filters, input.shape[1] // groups, size, size)).float()
    shifted = torch.roll(input, (down, right), (2, 3))
    if algorithm == "strassen":
        shifted = shifted.contiguous(memory_format=torch.channels_last)
    before = F.conv2d(input, weight, padding=size // 2, groups=groups, algorithm=algorithm)
    after = F.conv2d(shifted, weight, padding=size // 2, groups=groups, algorithm=algorithm)
    inner = after[:, :, down + 1 : -1, right + 1 : -1]
    expected = torch.roll(before, (down, right), (2, 3))[:, :, down + 1 : -1, right + 1 : -1]
    assert not torch.equal(before, after)
    assert_exact(algorithm, inner, expected, "conv(shift(x))")


@pytest.mark.parametrize("channels, filters, groups", ((16, 16, 16), (2, 8, 1)), ids=("depthwise", "few_channels"))
@pytest.mark.parametrize("format", FORMATS)
def test_weight_gradient_of_many_pixels_stays_near_float64(channels, filters, groups, format):
    """Sums over 200,000 pixels in chains that start from zero: one running sum would be off by 2e-6."""
    if KERNELS == "cuda":
        pytest.skip("a bound of the CPU's kernels")
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(16, channels, 112, 112, generator=generator)
    grad_output = torch.randn(16, filters, 112, 112, generator=generator)
    size = [filters, channels // groups, 3, 3]
    rest = [1, 1], [1, 1], [1, 1], groups, "auto"
    expected = torch.ops.convlab.convolution_backward_weight(grad_output.double(), input.double(), size, *rest)
    tensors = in_format(grad_output, format), in_format(input, format)
    actual = torch.ops.convlab.convolution_backward_weight(*tensors, size, *rest)
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()
