"""Bad input: the exception type torch raises, before anything is computed, in words that say what to change."""

from __future__ import annotations

import re

import helpers
import pytest
import torch
from helpers import run_python

import torch_convlab
from torch_convlab import functional as F


def tensor(*size, dtype=torch.float32):
    """Ones that take four bytes, whatever the size: an error that comes late would need the memory first."""
    return torch.ones(1, dtype=dtype).expand(size)


IMAGE, FILTERS = tensor(1, 4, 5, 5), tensor(6, 4, 3, 3)

# name: (arguments, keywords, what the message must say)
WRONG_CONV2D = {
    "input_1d": ((tensor(5), FILTERS), {}, r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d.*\[5\]"),
    "input_5d": ((tensor(1, 1, 4, 5, 5), FILTERS), {}, r"conv2d, but got input of size: \[1, 1, 4, 5, 5\]"),
    "weight_3d": ((IMAGE, tensor(6, 4, 3)), {}, r"3-dimensional weight \[6, 4, 3\].*input of size \[1, 4, 5, 5\]"),
    "channels": ((IMAGE, tensor(6, 5, 3, 3)), {}, r"input\[1, 4, 5, 5\] to have 5 channels, but got 4 channels"),
    "channels_of_groups": ((IMAGE, FILTERS), {"groups": 2}, r"groups=2.*to have 8 channels, but got 4"),
    "no_filters": ((IMAGE, tensor(0, 4, 3, 3)), {}, r"weight to be at least 1 at dimension 0.*\[0, 4, 3, 3\]"),
    "groups_do_not_divide": ((IMAGE, tensor(3, 2, 3, 3)), {"groups": 2}, r"divisible by 2.*\[3, 2, 3, 3\]"),
    "groups_0": ((IMAGE, FILTERS), {"groups": 0}, r"groups.*greater than 0.*groups=0"),
    "groups_negative": ((IMAGE, FILTERS), {"groups": -1}, r"groups=-1"),
    "groups_float": ((IMAGE, FILTERS), {"groups": 1.0}, r"'groups' must be an integer.*groups=1.0"),
    "bias_size": ((IMAGE, FILTERS, tensor(5)), {}, r"bias to be 1-dimensional with 6 elements.*\[5\]"),
    "bias_2d": ((IMAGE, FILTERS, tensor(6, 1)), {}, r"bias to be 1-dimensional with 6 elements.*\[6, 1\]"),
    "weight_dtype": ((IMAGE, FILTERS.double()), {}, r"Input type \(Float\) and weight type \(Double\)"),
    "weight_bfloat16": ((IMAGE, FILTERS.bfloat16()), {}, r"Input type \(Float\) and weight type \(BFloat16\)"),
    "bias_dtype": ((IMAGE, FILTERS, tensor(6).double()), {}, r"Input type \(Float\) and bias type \(Double\)"),
    "stride_0": ((IMAGE, FILTERS), {"stride": 0}, r"non-positive stride is not supported.*stride=\[0, 0\]"),
    "stride_negative": ((IMAGE, FILTERS), {"stride": (1, -1)}, r"stride=\[1, -1\]"),
    "stride_length": ((IMAGE, FILTERS), {"stride": (1, 1, 1)}, r"stride.*list of 2 values.*stride=\[1, 1, 1\]"),
    "stride_empty": ((IMAGE, FILTERS), {"stride": ()}, r"stride.*list of 2 values.*stride=\[\]"),
    "stride_float": ((IMAGE, FILTERS), {"stride": 1.5}, r"'stride' must be an integer.*stride=1.5"),
    "stride_string": ((IMAGE, FILTERS), {"stride": "2"}, r"'stride' must be an integer.*stride='2'"),
    "stride_none": ((IMAGE, FILTERS), {"stride": None}, r"'stride' must be an integer.*stride=None"),
    "padding_negative": ((IMAGE, FILTERS), {"padding": -1}, r"negative padding.*padding=\[-1, -1\]"),
    "padding_length": ((IMAGE, FILTERS), {"padding": (1, 1, 1)}, r"padding.*list of 2.*padding=\[1, 1, 1\]"),
    "padding_float": ((IMAGE, FILTERS), {"padding": (0.5, 1)}, r"'padding' must be an integer.*padding=0.5"),
    "padding_word": ((IMAGE, FILTERS), {"padding": "full"}, r"'full', expected 'valid' or 'same'"),
    "same_with_stride": ((IMAGE, FILTERS), {"padding": "same", "stride": 2}, r"padding='same'.*stride=\[2, 2\]"),
    "padding_overflows": ((IMAGE, FILTERS), {"padding": 2**62}, r" below .*padding=\[4611686018427387904"),
    "dilation_0": ((IMAGE, FILTERS), {"dilation": 0}, r"dilation should be greater than zero.*dilation=\[0, 0\]"),
    "dilation_0_same": ((IMAGE, FILTERS), {"dilation": 0, "padding": "same"}, r"dilation=\[0, 0\]"),
    "dilation_length": ((IMAGE, FILTERS), {"dilation": (1, 2, 3)}, r"dilation=\[1, 2, 3\]"),
    "kernel_over_input": ((IMAGE, tensor(6, 4, 6, 3)), {}, r"\(5 x 5\). Kernel size: \(6 x 3\).* can't"),
    "kernel_0": ((IMAGE, tensor(6, 4, 0, 3)), {}, r"kernel size should be greater than zero.*\[6, 4, 0, 3\]"),
    "weight_none": ((IMAGE, None), {}, r"'weight' must be Tensor, not NoneType"),
    "input_list": (([[1.0]], FILTERS), {}, r"'input' must be Tensor, not list"),
    "bias_number": ((IMAGE, FILTERS, 1.0), {}, r"'bias' must be Tensor, not float"),
    "bool": ((IMAGE.bool(), FILTERS.bool()), {}, r"not implemented for 'Bool' \(expected float32"),
    "unknown_keyword": ((IMAGE, FILTERS), {"strides": 1}, r"'strides'"),
}  # fmt: skip
# name: (function, arguments, keywords, what the message must say)
WRONG_CONVOLUTIONS = {
    **{name: ("conv2d", *row) for name, row in WRONG_CONV2D.items()},
    "input_of_conv3d": ("conv3d", (tensor(4, 5, 5), tensor(4, 3, 3, 3, 3)), {}, r"Expected 4D .* or 5D .* \[4, 5, 5\]"),
    "1d_stride": ("conv1d", (tensor(1, 4, 9), tensor(6, 4, 3)), {"stride": (1, 1)}, r"list of 1 .*stride=\[1, 1\]"),
    "1d_input": ("conv1d", (IMAGE[None], tensor(6, 4, 3)), {}, r"Expected 2D \(unbatched\) or 3D"),
    "transposed_channels": ("conv_transpose2d", (IMAGE, tensor(3, 4, 3, 3)), {}, r"to have 3 channels, but got 4"),
    "transposed_groups": ("conv_transpose2d", (IMAGE, tensor(4, 3, 3, 3)), {"groups": 3}, r"divisible by 3.*\[4, 3"),
    "transposed_bias": ("conv_transpose2d", (IMAGE, tensor(4, 2, 3, 3), tensor(4)), {}, r"with 2 elements.*\[4\]"),
    "transposed_dtype": ("conv_transpose2d", (IMAGE, FILTERS[:4].double()), {}, r"Input type .* and weight type"),
    "transposed_stride": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"stride": 0}, r"stride=\[0, 0\]"),
    "transposed_padding": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"padding": -1}, r"padding=\[-1, -1\]"),
    "transposed_padding_word": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"padding": "same"}, r"padding='same'"),
    "transposed_dilation": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"dilation": 0}, r"dilation=\[0, 0\]"),
    "transposed_too_small": (
        "conv_transpose2d", (tensor(1, 4, 1, 1), FILTERS[:4]), {"padding": 2},
        r"\(1 x 1\). Calculated output size per channel: \(-1 x -1\). Output size is too small",
    ),
    "output_padding": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"output_padding": 1}, r"=\[1, 1\], stride=\[1"),
    "output_padding_negative": ("conv_transpose2d", (IMAGE, FILTERS[:4]), {"output_padding": -1}, r"=\[-1, -1\]"),
    "output_padding_length": (
        "conv_transpose2d", (IMAGE, FILTERS[:4]), {"stride": 3, "output_padding": (1, 1, 1)},
        r"output_padding.*list of 2 values.*output_padding=\[1, 1, 1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CONVOLUTIONS)
def test_convolutions(name):
    function, arguments, keywords, message = WRONG_CONVOLUTIONS[name]
    with pytest.raises(Exception) as expected:
        getattr(torch.nn.functional, function)(*arguments, **keywords)
    with pytest.raises(Exception) as actual:
        getattr(F, function)(*arguments, **keywords)
    assert actual.type is expected.type, f"{actual.value!r}; torch: {expected.value!r}"
    assert re.search(message, str(actual.value), re.DOTALL), str(actual.value)


@pytest.mark.parametrize("name", [name for name, row in WRONG_CONV2D.items() if row[1]])
def test_fake_tensors_raise_the_same(name):
    """The fake kernel shares the checks, so a compiled model fails with the same words."""
    function, arguments, keywords, message = WRONG_CONVOLUTIONS[name]
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(Exception, match=re.compile(message, re.DOTALL)),
    ):
        getattr(F, function)(*arguments, **keywords)


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="unknown algorithm 'fast', expected one of: auto, naive"):
        F.conv2d(IMAGE, FILTERS, algorithm="fast")


def test_refusal_says_why():
    """Asking for an algorithm that cannot do it is an error with the reason, never a silent change of algorithm."""
    for algorithm in set(torch_convlab.algorithms()) & {"winograd"}:
        with pytest.raises(
            RuntimeError, match=f"algorithm='{algorithm}' cannot compute this convolution: .*stride is 1x3x3"
        ):
            F.conv2d(IMAGE, FILTERS, stride=3, algorithm=algorithm)


@pytest.mark.skipif(helpers.KERNELS == "cuda", reason="strassen has kernels for the CPU alone")
def test_strassen_says_what_it_needs():
    image, weight = torch.ones(1, 64, 4, 4).contiguous(memory_format=torch.channels_last), torch.ones(64, 64, 1, 1)
    F.conv2d(image, weight, algorithm="strassen")
    for reason, call in {
        "strassen needs channels_last": lambda: F.conv2d(image.contiguous(), weight, algorithm="strassen"),
        "strassen computes in float32 and float64": lambda: F.conv2d(
            image.bfloat16(), weight.bfloat16(), algorithm="strassen"
        ),
        "strassen needs one group, but groups is 2": lambda: F.conv2d(
            image, torch.ones(64, 32, 1, 1), groups=2, algorithm="strassen"
        ),
        "reads 64 and writes 36": lambda: F.conv2d(image, torch.ones(36, 64, 1, 1), algorithm="strassen"),
        "strassen needs images of several lines": lambda: F.conv2d(image[:, :, :1, :1], weight, algorithm="strassen"),
        "strassen needs a 1x1 kernel": lambda: F.conv2d(image, torch.ones(64, 64, 3, 3), algorithm="strassen"),
        "not of the weight": lambda: (
            F.conv2d(image, weight.clone().requires_grad_(), algorithm="strassen").sum().backward()
        ),
    }.items():
        with pytest.raises(RuntimeError, match=reason):
            call()


@pytest.mark.parametrize("case", ["channels", "bias_size", "stride_0", "weight_dtype", "kernel_over_input"])
def test_raised_before_computing(case):
    """With an output of 2^50 elements, anything but the check would run out of memory or time."""
    input, weight = tensor(2**20, 4, 2**15, 2**15), tensor(2, 4, 3, 3)
    wrong = {
        "channels": lambda: F.conv2d(input, tensor(2, 5, 3, 3)),
        "bias_size": lambda: F.conv2d(input, weight, tensor(3)),
        "stride_0": lambda: F.conv2d(input, weight, stride=0),
        "weight_dtype": lambda: F.conv2d(input, weight.double()),
        "kernel_over_input": lambda: F.conv2d(input, tensor(2, 4, 2**16, 3)),
    }
    message = {
        "channels": "5 channels", "bias_size": "bias", "stride_0": "stride", "weight_dtype": "type",
        "kernel_over_input": "Kernel size",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message[case]):
        wrong[case]()


def test_out_of_memory_is_an_exception():
    with pytest.raises(RuntimeError, match=r"(?i)memory|allocate|overflow"):
        F.conv2d(tensor(2**20, 4, 2**15, 2**15), tensor(2, 4, 3, 3))


@pytest.mark.parametrize("operator", ["backward_input", "backward_weight"])
def test_operators_check_the_gradient(operator):
    """Called by hand, the gradient operators refuse a gradient of the wrong size, which the kernels would read."""
    rest = [1, 1], [0, 0], [1, 1], 1, "auto"
    wrong = torch.ones(1, 6, 4, 3)
    with pytest.raises(RuntimeError, match=r"expected grad_output of size \[1, 6, 3, 3\].*\[1, 6, 4, 3\]"):
        if operator == "backward_input":
            torch.ops.convlab.convolution_backward_input(wrong, torch.ones(6, 4, 3, 3), None, [1, 4, 5, 5], *rest)
        else:
            torch.ops.convlab.convolution_backward_weight(wrong, torch.ones(1, 4, 5, 5), [6, 4, 3, 3], *rest)


def test_errors_leave_no_state():
    """After any number of errors the next call is right: in a fresh process, because threads keep scratch memory."""
    run_python(
        "import torch, torch_convlab, test_errors as t\n"
        "for name in t.WRONG_CONVOLUTIONS:\n"
        "    try: t.test_convolutions(name)\n"
        "    except BaseException as error: raise SystemExit(f'{name}: {error}')\n"
        "x, w = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)\n"
        "torch.testing.assert_close(t.F.conv2d(x, w), torch.nn.functional.conv2d(x, w), atol=1e-4, rtol=1e-4)\n"
    )
