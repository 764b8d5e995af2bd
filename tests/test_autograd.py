"""Derivatives of every order and mode, of operators that are called one by one.

An operator's gradient can be right while its double backward is silently zero; only gradgradcheck and forward mode
see that, so each operator goes through all of them.
"""

from __future__ import annotations

import inspect
import sys

import helpers
import pytest
import torch
from cases import BY_NAME
from helpers import FORMATS, call_convolution, in_format
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import torch_convlab
from torch_convlab import autograd
from torch_convlab import functional as F

# (dimensions, groups, kernel, stride, padding, dilation): small, odd, and every parameter at work.
PROBLEMS = {
    "1d": (1, 1, (3,), (2,), (1,), (1,)),
    "2d": (2, 1, (3, 2), (2, 1), (1, 2), (1, 2)),
    "2d_grouped": (2, 2, (2, 2), (1, 1), (0, 1), (1, 1)),
    "2d_depthwise": (2, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3d": (3, 2, (2, 1, 2), (1, 2, 1), (1, 0, 0), (1, 1, 2)),
    "3x3": (2, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "pointwise": (2, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}
COUNTED = ("3x3_stride2", "all_asymmetric", "1d_k3", "3d_asymmetric", "depthwise_3x3", "transposed_output_padding")
OPERATORS = ("convolution", "convolution_backward_input", "convolution_backward_weight")


def draw(*size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype, requires_grad=True)


def arguments_of(operator: str, problem: str, format: str = "channels_first", dtype=torch.float64, algorithm="auto"):
    """Arguments of an operator in the order of its schema; the tensors are leaves that require gradients."""
    dims, groups, kernel, stride, padding, dilation = PROBLEMS[problem]
    spatial = (5, 4, 3)[:dims]
    input, weight = draw(2, 4, *spatial, dtype=dtype), draw(4, 4 // groups, *kernel, dtype=dtype)
    function = getattr(torch.nn.functional, f"conv{dims}d")
    output = function(input, weight, None, stride, padding, dilation, groups)
    grad_output = torch.randn_like(output, requires_grad=True)
    input, weight, grad_output = (
        in_format(tensor.detach(), format).requires_grad_() for tensor in (input, weight, grad_output)
    )
    rest = list(stride), list(padding), list(dilation), groups, algorithm
    if operator == "convolution":
        return (input, weight, draw(4, dtype=dtype), *rest)
    if operator == "convolution_backward_input":
        return (grad_output, weight, draw(4, dtype=dtype), list(input.shape), *rest)
    return (grad_output, input, list(weight.shape), *rest)


def over_tensors(operator: str, arguments):
    """The operator's entry as a function of its tensors alone, and those tensors."""
    entry = getattr(autograd, operator)
    count = sum(isinstance(argument, torch.Tensor) for argument in arguments)
    return lambda *tensors: entry(*tensors, *arguments[count:]), arguments[:count]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("operator", OPERATORS)
class TestDerivatives:
    def test_gradcheck(self, operator, problem, format):
        function, tensors = over_tensors(operator, arguments_of(operator, problem, format))
        assert gradcheck(function, tensors, fast_mode=True, check_forward_ad=True, check_batched_grad=True)

    def test_gradgradcheck(self, operator, problem, format):
        function, tensors = over_tensors(operator, arguments_of(operator, problem, format))
        assert gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)

    def test_double_backward_is_not_zero(self, operator, problem, format):
        """The defect that gradcheck cannot see, looked for directly."""
        function, tensors = over_tensors(operator, arguments_of(operator, problem, format))
        output = function(*tensors)
        gradients = torch.autograd.grad(output, tensors[:2], torch.randn_like(output), create_graph=True)
        for gradient, other in zip(gradients, reversed(tensors[:2])):
            (second,) = torch.autograd.grad(gradient.square().sum(), other, retain_graph=True)
            assert second.abs().max() > 0


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, problem):
    """Schema, autograd registration, fake tensors (strides too) and dynamic shapes, by torch's own checker."""
    op = getattr(torch.ops.convlab, operator).default
    for format in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            arguments = arguments_of(operator, problem, format, dtype)
            torch.library.opcheck(op, arguments)
            without_bias = tuple(
                None if index == 2 and isinstance(argument, torch.Tensor) else argument
                for index, argument in enumerate(arguments)
            )
            torch.library.opcheck(op, without_bias)


@pytest.mark.parametrize("operator", OPERATORS)
def test_functions_follow_their_schema(operator):
    """A Function's arguments are the operator's, in order: what `entry` relies on. And every formula is documented."""
    name = "".join(part.capitalize() for part in operator.split("_"))
    function = getattr(autograd, name)
    schema = getattr(torch.ops.convlab, operator).default._schema
    assert list(inspect.signature(function.forward).parameters) == [argument.name for argument in schema.arguments]
    assert "Backward" in function.__doc__ or "derivative" in function.__doc__


@pytest.mark.parametrize("algorithm", [name for name in torch_convlab.algorithms() if name not in ("strassen", "amx")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_stay_with_the_algorithm(operator, algorithm):
    """Forward and backward with a named algorithm equal those of the naive one."""
    if helpers.KERNELS == "cuda" and algorithm in ("implicit_gemm", "winograd"):
        pytest.skip(f"{algorithm} does not compute in float64 on CUDA")
    named = {"winograd": "3x3", "depthwise": "2d_depthwise", "inner_product": "pointwise"}
    problem = named.get(algorithm, "2d")
    results = []
    for name in (algorithm, "naive"):
        torch.manual_seed(1)
        function, tensors = over_tensors(operator, arguments_of(operator, problem, algorithm=name))
        output = function(*tensors)
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_only_wanted_gradients_are_computed():
    """Which operators ran in backward, for every choice of leaves."""
    for wanted in ((True, False), (False, True), (True, True)):
        input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
        input.requires_grad_(wanted[0])
        weight.requires_grad_(wanted[1])
        with torch.profiler.profile() as profile:
            F.conv2d(input, weight).sum().backward()
        ran = {event.name for event in profile.events()}
        assert ("convlab::convolution_backward_input" in ran) == wanted[0]
        assert ("convlab::convolution_backward_weight" in ran) == wanted[1]


@pytest.mark.parametrize("dims", (2, 3))
def test_input_gradient_through_one_channel_keeps_the_memory_format(dims):
    """Strides of a tensor with one channel say nothing of its format, and those of a 1x1 weight neither."""
    format = torch.channels_last if dims == 2 else torch.channels_last_3d
    input = torch.randn(2, 8, *(5, 6, 7)[:dims]).contiguous(memory_format=format).requires_grad_()
    weight = torch.randn(1, 8, *[1] * dims)
    output = getattr(F, f"conv{dims}d")(input, weight)
    for grad_output in (torch.ones_like(output), torch.ones(output.shape), torch.ones(1).expand(output.shape)):
        (gradient,) = torch.autograd.grad(output, input, grad_output, retain_graph=True)
        assert gradient.is_contiguous(memory_format=format), grad_output.stride()
        torch.testing.assert_close(gradient, weight.expand_as(input), rtol=0, atol=0)


def test_no_graph_without_need():
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    assert F.conv2d(input, weight).grad_fn is not None
    assert not F.conv2d(input, weight.detach()).requires_grad
    with torch.no_grad():
        assert not F.conv2d(input, weight).requires_grad
    with torch.inference_mode():
        assert F.conv2d(input, weight).is_inference()


def enters_the_autograd_kernel(compute) -> bool:
    """Whether `compute` calls the Python function of `torch.library.register_autograd`."""
    files = set()
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    try:
        compute()
    finally:
        sys.setprofile(None)
    return torch._library.autograd.__file__ in files


def test_the_autograd_kernel_is_passed_by():
    """It would double the time of a small call."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    arguments = input, weight, None, [1, 1], [0, 0], [1, 1], 1, "auto"
    assert enters_the_autograd_kernel(lambda: torch.ops.convlab.convolution(*arguments))
    assert not enters_the_autograd_kernel(lambda: F.conv2d(input, weight))
    input.requires_grad_()
    weight.requires_grad_()
    assert not enters_the_autograd_kernel(lambda: F.conv2d(input, weight).sum().backward())
    assert weight.grad is not None


class Wrapped(torch.Tensor):
    """A tensor that stands for another, which operators then see: only that one wants a gradient."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_subclass(cls, torch.zeros_like(inner))
        self.inner = inner
        return self

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if isinstance(function, torch._ops.OpOverload):
            arguments = [value.inner if isinstance(value, cls) else value for value in arguments]
        return super().__torch_function__(function, types, arguments, options)


def test_torch_function_may_differentiate():
    """Where no operand asks for a gradient the kernel is called below autograd, but not past a __torch_function__."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    wrapped = Wrapped(weight)
    assert not wrapped.requires_grad
    (actual,) = torch.autograd.grad(F.conv2d(input, wrapped).sum(), weight)
    (expected,) = torch.autograd.grad(torch.nn.functional.conv2d(input, weight).sum(), weight)
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)


def test_saved_tensor_hooks():
    """Input and weight are saved, the bias is not, and what unpacking returns is what backward uses."""
    input, weight, bias = draw(2, 3, 5, 5), draw(4, 3, 3, 3), draw(4)
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: 2 * tensor):
        output = F.conv2d(input, weight, bias)
    assert packed == [tuple(input.shape), tuple(weight.shape)]
    actual = torch.autograd.grad(output.sum(), (input, weight, bias))
    expected = torch.autograd.grad(torch.nn.functional.conv2d(input, weight, bias).sum(), (input, weight, bias))
    for index, factor in enumerate((2, 2, 1)):
        torch.testing.assert_close(actual[index], factor * expected[index])


def test_a_changed_operand_is_noticed():
    input, weight = draw(1, 2, 5, 5), draw(3, 2, 3, 3)
    output = F.conv2d(input, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("case", [BY_NAME[name] for name in COUNTED], ids=str)
def test_flop_counts(case):
    """Every pass is twice the multiply-adds of the lecture (item L2); without groups, that is what torch counts too.

    With groups torch's formula for the weight's gradient counts every channel against every other.
    """
    counts = []
    for functional in (F, torch.nn.functional):
        input, weight = draw(*case.input), draw(*case.weight)
        with FlopCounterMode(display=False) as forward:
            output = call_convolution(functional, case, input, weight, None)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == (2 * case.multiply_adds, 4 * case.multiply_adds)
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] == counts[1][1] or case.groups > 1
