"""Every convolution case x algorithm x pass x dtype x memory format, and the properties that cases do not show."""

from __future__ import annotations

import itertools
import math
import mmap

import helpers
import pytest
import torch
from cases import BY_NAME, CASES, DIVIDED, PASSES, SMALL
from helpers import (
    ALGORITHMS,
    ANY_GEOMETRY,
    DTYPES,
    FORMATS,
    KERNELS,
    NAIVE_LIMIT,
    assert_exact,
    assert_same_layout,
    assert_within,
    bound,
    call_convolution,
    check_pass,
    in_format,
    laid_out,
    operands,
    reference,
    refusal,
    run_pass,
    torch_convolution,
)

import torch_convlab
from torch_convlab import functional as F

# (case, algorithm, dtype, pass); "auto" runs one of the others, so float32 is enough of it.
PROBLEMS = [
    pytest.param(case, algorithm, dtype, pass_, id=f"{case}-{algorithm}-{str(dtype).removeprefix('torch.')}-{pass_}")
    for case in CASES
    for algorithm in ALGORITHMS
    for dtype in (DTYPES if algorithm != "auto" else [torch.float32])
    for pass_ in PASSES
    if (algorithm != "naive" or case.multiply_adds <= NAIVE_LIMIT) and not refusal(case, algorithm, pass_, dtype)
]
# One problem of each kind, for properties that need not be seen on every case.
KINDS = [
    BY_NAME[name]
    for name in (
        "pointwise", "pointwise_odd_pixels", "3x3_bias_batch1", "3x3_stride2_odd", "5x5_bias", "all_asymmetric",
        "groups2", "resnext_32x4",
        "depthwise_3x3_odd", "channels_17_to_33", "1d_wav2vec_k3_s2", "3d_asymmetric", "transposed_output_padding",
    )
]  # fmt: skip


def problems_of(cases, format=None):
    return [
        pytest.param(case, algorithm, pass_, id=f"{case}-{algorithm}-{pass_}")
        for case in cases
        for algorithm in ALGORITHMS
        for pass_ in PASSES
        if not refusal(case, algorithm, pass_, format=format)
    ]


KIND_PROBLEMS = problems_of(KINDS, "channels_first")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case, algorithm, dtype, pass_", PROBLEMS)
def test_pass(case, algorithm, dtype, pass_, format):
    if refusal(case, algorithm, pass_, dtype, format=format):
        with pytest.raises(RuntimeError, match="cannot compute this convolution"):
            run_pass(case, pass_, algorithm, **laid_out(case, dtype, format))
        return
    actual = run_pass(case, pass_, algorithm, **laid_out(case, dtype, format))
    check_pass(case, pass_, algorithm, dtype, actual)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_are_used(algorithm):
    """No algorithm refuses everything, or there would be no tests of it; the general ones refuse nothing."""
    if helpers.KERNELS == "cuda" and algorithm == "strassen":
        pytest.skip("strassen has kernels for the CPU alone")
    refused = [(case, pass_) for case in KINDS for pass_ in PASSES if refusal(case, algorithm, pass_)]
    for pass_ in PASSES:
        if (algorithm, pass_) != ("strassen", "backward_weight"):
            assert len([each for each in refused if each[1] == pass_]) < len(KINDS)
    assert algorithm not in ANY_GEOMETRY or not refused
    for case, pass_ in refused:  # what explain_convolution says is what the operators do
        with pytest.raises(RuntimeError, match="cannot compute this convolution"):
            run_pass(case, pass_, algorithm, **operands(case, torch.float32))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_layer(case, format):
    """Values, dtypes, shapes and strides of output and of all three gradients, through autograd, as torch's."""
    results = []
    for function in (F, torch.nn.functional):
        tensors = laid_out(case, torch.float32, format)
        leaves = [tensors[name].requires_grad_() for name in ("input", "weight", "bias") if tensors[name] is not None]
        output = call_convolution(function, case, tensors["input"], tensors["weight"], tensors["bias"])
        output.backward(tensors["grad_output"])
        results.append([output, *(leaf.grad for leaf in leaves)])
    names = ("output", "grad_input", "grad_weight", "grad_bias")
    for name, ours, theirs in zip(names, *results):
        if case.dims == 3 and format == "channels_last" and ours.dim() == 5:
            # Always; torch's answer depends on which of its three implementations it takes for the size and dtype.
            assert ours.is_contiguous(memory_format=torch.channels_last_3d), f"{case} {name}: strides {ours.stride()}"
        else:
            assert_same_layout(ours, theirs, f"{case} {name}")
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case, algorithm, pass_", problems_of((*KINDS, *DIVIDED)))
def test_same_bits_for_every_thread_count(case, algorithm, pass_, format):
    for dtype in (torch.float32, torch.bfloat16):
        if refusal(case, algorithm, pass_, dtype, format=format):
            continue
        tensors = laid_out(case, dtype, format)
        results = []
        for threads in (1, 2, 3, 4, 2):
            torch.set_num_threads(threads)
            results.append(run_pass(case, pass_, algorithm, **tensors))
        assert all(torch.equal(results[0], other) for other in results[1:])


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an offset, with gaps, every axis permuted: no two neighbours in memory belong together."""
    order = list(reversed(range(tensor.dim())))
    room = tensor.new_full([2 * tensor.shape[axis] + 1 for axis in order], float("nan"))
    view = room[tuple(slice(1, None, 2) for _ in order)].permute(*order)
    view.copy_(tensor)
    assert tensor.numel() <= 1 or not view.is_contiguous()
    return view


@pytest.mark.parametrize("case, algorithm, pass_", KIND_PROBLEMS)
def test_scattered_views(case, algorithm, pass_):
    tensors = {
        name: value if value is None else scattered(value) for name, value in operands(case, torch.float32).items()
    }
    check_pass(case, pass_, algorithm, torch.float32, run_pass(case, pass_, algorithm, **tensors))


@pytest.mark.parametrize("what", ["batch", "channels", "pixels", "everything"])
@pytest.mark.parametrize("case, algorithm, pass_", KIND_PROBLEMS)
def test_expanded_views(case, algorithm, pass_, what):
    """Zero strides; every reduction over a broadcast gradient, `output.sum().backward()`, is one."""
    axes = {"batch": [0], "channels": [1], "pixels": range(2, case.dims + 2), "everything": range(case.dims + 2)}[what]
    views = {}
    for name, value in operands(case, torch.float32).items():
        value = None if value is None else value.round()
        if value is not None and value.dim() > 1:
            value = value[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(value.dim()))].expand_as(
                value
            )
            assert all(value.stride(axis) == 0 or value.shape[axis] == 1 for axis in axes)
        views[name] = value
    double = {name: None if value is None else value.double().contiguous() for name, value in views.items()}
    expected = run_pass(case, pass_, "naive", **double)
    assert_exact(algorithm, run_pass(case, pass_, algorithm, **views), expected, f"{case} {pass_}")


@pytest.mark.parametrize("case", [case for case in KINDS if case.input[0] > 1], ids=str)
def test_unbatched(case):
    tensors = operands(case, torch.float32)
    sample = tensors["input"][1].clone().requires_grad_()
    output = call_convolution(F, case, sample, tensors["weight"], tensors["bias"])
    expected = torch_convolution(case, sample.detach(), tensors["weight"], tensors["bias"])
    assert_same_layout(output, expected, str(case))
    allowed = bound("auto", torch.float32, case.reduction("forward"), reference(case, torch.float32)["forward"], 1)[1]
    assert_within(output.detach(), reference(case, torch.float32)["forward"][1], allowed, str(case))
    (gradient,) = torch.autograd.grad(output, sample, tensors["grad_output"][1])
    expected = reference(case, torch.float32)["backward_input"]
    allowed = bound("auto", torch.float32, case.reduction("backward_input"), expected, 1)[1]
    assert_within(gradient, expected[1], allowed, str(case))


def unwritten_zeros(*size: int) -> torch.Tensor:
    """bfloat16 zeros that take no memory until they are written: pages of a private anonymous mapping."""
    memory = mmap.mmap(-1, 2 * math.prod(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(size)


@pytest.mark.parametrize("algorithm", ANY_GEOMETRY)
def test_more_elements_than_int32_counts(algorithm):
    stride, length = 4096, 2**31 + 4 * 4096
    input = unwritten_zeros(1, 1, length)
    input[..., -20000:] = torch.randint(-4, 5, (20000,)).bfloat16()
    weight = torch.tensor([[[1.0, 2.0, -3.0, 5.0]]], dtype=torch.bfloat16)
    output = F.conv1d(input, weight, stride=stride, algorithm=algorithm)
    windows = input.view(-1, stride)[:, :4].double()
    assert output.shape[-1] == len(windows)
    expected = windows @ weight.flatten().double()
    assert expected[-4:].abs().sum() > 0
    assert torch.equal(output.flatten().double(), expected.bfloat16().double())

    grad = torch.zeros_like(output)
    grad[..., -3:] = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    parameters = [stride], [0], [1], 1, algorithm
    actual = torch_convlab.autograd.convolution_backward_weight(grad, input, [1, 1, 4], *parameters)
    expected = windows[-3:].T @ grad.flatten()[-3:].double()
    assert torch.equal(actual.flatten().double(), expected.bfloat16().double())


@pytest.mark.parametrize("algorithm", ANY_GEOMETRY)
def test_planes_further_apart_than_int32_counts(algorithm):
    """The same for the offset of a channel, in both memory formats."""
    side = 27_000  # three planes: 2.19e9 elements
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    for format in FORMATS:
        if format == "channels_first":
            input = unwritten_zeros(1, 3, side, side)
        else:
            input = unwritten_zeros(1, side, side, 3).permute(0, 3, 1, 2)
        last = (side - 1) // 1000 * 1000
        input[0, :, last, last] = torch.tensor([3.0, 5.0, 7.0], dtype=torch.bfloat16)
        output = F.conv2d(input, weight, stride=1000, algorithm=algorithm)
        assert output[0, 0, -1, -1].item() == 3 + 10 + 28
        assert output.count_nonzero() == 1


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (4, 3)], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding, kernel, dilation):
    for dims in (1, 2, 3):
        sizes = (kernel,) * dims if isinstance(kernel, int) else (*kernel, 2)[:dims]
        input = torch.randn(2, 4, *(11, 9, 10)[:dims], requires_grad=True)
        weight = torch.randn(6, 2, *sizes)
        results = []
        for functional in (F, torch.nn.functional):
            output = getattr(functional, f"conv{dims}d")(input, weight, padding=padding, dilation=dilation, groups=2)
            (gradient,) = torch.autograd.grad(output.square().sum(), input)
            results.append((output, gradient))
        for ours, theirs in zip(*results):
            assert_same_layout(ours, theirs, f"{dims}-D")
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes(dims, mode, padding):
    name = f"Conv{dims}d"
    theirs = getattr(torch.nn, name)(4, 6, 3 + dims % 2, padding=padding, padding_mode=mode)
    ours = getattr(torch_convlab.nn, name)(4, 6, 3 + dims % 2, padding=padding, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    input = torch.randn(2, 4, *(9, 8, 7)[:dims], requires_grad=True)
    results = []
    for layer in (ours, theirs):
        output = layer(input)
        results.append((output, *torch.autograd.grad(output.square().sum(), (input, layer.weight, layer.bias))))
    for actual, expected in zip(*results):
        assert_same_layout(actual, expected, name)
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_size_of_transposed_layers(dims):
    name = f"ConvTranspose{dims}d"
    theirs = getattr(torch.nn, name)(4, 6, 3, stride=2, padding=1)
    ours = getattr(torch_convlab.nn, name)(4, 6, 3, stride=2, padding=1)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(2, 4, *(5, 4, 3)[:dims])
    for size in ([9, 7, 5][:dims], [10, 8, 6][:dims], [2, 6, *[10, 7, 6][:dims]]):
        expected = theirs(input, output_size=size)
        actual = ours(input, output_size=size)
        assert_same_layout(actual, expected, name)
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="output size"):
        ours(input, output_size=[30] * dims)


def test_output_padding_of_a_stride_or_more():
    """Dilation allows it; such an output is longer than that of any convolution of the input's length."""
    input, weight = torch.randn(2, 4, 7, 8, requires_grad=True), torch.randn(4, 3, 3, 2, requires_grad=True)
    results = []
    for functional in (F, torch.nn.functional):
        output = functional.conv_transpose2d(
            input, weight, stride=(1, 2), padding=2, output_padding=(2, 4), dilation=(3, 5)
        )
        results.append((output, *torch.autograd.grad(output.square().sum(), (input, weight))))
    for ours, theirs in zip(*results):
        assert_same_layout(ours, theirs, "conv_transpose2d")
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.skipif(KERNELS == "cuda", reason="on the CPU alone")
def test_kernels_as_large_as_the_map_are_fully_connected_layers():
    """Whatever the formats of input and weight."""
    case = BY_NAME["kernel_is_input"]
    tensors = operands(case, torch.float32)
    expected = reference(case, torch.float32)["forward"]
    for input_format, weight_format in itertools.product(FORMATS, FORMATS):
        input, weight = in_format(tensors["input"], input_format), in_format(tensors["weight"], weight_format)
        for algorithm in ("auto", "implicit_gemm", "inner_product"):
            output = F.conv2d(input, weight, tensors["bias"], algorithm=algorithm)
            assert (output - expected).abs().max() < 1e-6 * expected.abs().max()
    choice = torch_convlab.explain_convolution(case.input, case.weight)
    assert choice.chosen == "inner_product"


def test_no_input_channels():
    """A sum over nothing, plus the bias. torch answers with an output of no channels, which breaks the size formula."""
    bias = torch.tensor([1.0, -2.0, 3.0])
    output = F.conv2d(torch.zeros(2, 0, 5, 6), torch.zeros(3, 0, 3, 3), bias, padding=1)
    assert torch.equal(output, bias.view(1, 3, 1, 1).expand(2, 3, 5, 6))
    assert torch.equal(F.conv2d(torch.zeros(2, 0, 5, 6), torch.zeros(3, 0, 3, 3)), torch.zeros(2, 3, 3, 4))


def test_no_input_pixels():
    """All padding: zero, plus the bias. torch refuses an axis of length 0; the size formula has an answer."""
    bias = torch.tensor([1.0, -2.0])
    output = F.conv2d(torch.zeros(2, 3, 0, 4), torch.ones(2, 3, 3, 3), bias, padding=2)
    assert torch.equal(output, bias.view(1, 2, 1, 1).expand(2, 2, 2, 6))


def test_inputs_are_left_alone():
    for case in KINDS:
        tensors = {
            name: None if value is None else value.clone() for name, value in operands(case, torch.float32).items()
        }
        for algorithm in ALGORITHMS:
            for pass_ in PASSES:
                if not refusal(case, algorithm, pass_, format="channels_first"):
                    run_pass(case, pass_, algorithm, **tensors)
        for name, value in operands(case, torch.float32).items():
            assert value is None or torch.equal(tensors[name], value)
