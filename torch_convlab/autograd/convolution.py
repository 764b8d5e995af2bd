"""Convolution and its two gradients: three operators, each bilinear, each the derivative of the other two.

With ``y = conv(x, w)`` the forward pass, ``dx = backward_input(dy, w)`` and ``dw = backward_weight(dy, x)`` its
adjoints, every derivative of any of the three is again one of the three. That closes double backward and
forward-mode differentiation without a new kernel.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from .. import _C
from ._entry import add, batched, entry, kernel, vmap_by_loop


def _sum_over_channels(grad: torch.Tensor) -> torch.Tensor:
    """Gradient of a bias: the sum of `grad` over everything but the channels (lecture item L7)."""
    return grad.sum([0, *range(2, grad.dim())])


def _as_channels(bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return bias.view(1, -1, *[1] * (like.dim() - 2)).expand_as(like)


def _formatted_as(grad_output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """`grad_output`; if its one channel leaves the memory format open, in that of `input`."""
    if grad_output.shape[1] != 1 or grad_output.stride(1) == 1 or grad_output.dim() == 3 or input.is_contiguous():
        return grad_output
    format = torch.channels_last if grad_output.dim() == 4 else torch.channels_last_3d
    return grad_output.clone(memory_format=format) if input.is_contiguous(memory_format=format) else grad_output


class Convolution(Function):
    """``y[n,k,o] = bias[k] + sum_{c,t} x[n,c, o*stride - padding + t*dilation] * w[k,c,t]``

    Backward: ``dx = backward_input(dy, w)``, ``dw = backward_weight(dy, x)``, ``db[k] = sum_{n,o} dy[n,k,o]``.
    Forward mode: ``ty = conv(tx, w) + conv(x, tw) + tb``.
    """

    @staticmethod
    def forward(input, weight, bias, stride, padding, dilation, groups, algorithm):
        return _forward(input, weight, bias, stride, padding, dilation, groups, algorithm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, *ctx.parameters = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            formatted = _formatted_as(grad_output, input)
            grad_input = convolution_backward_input(formatted, weight, None, list(input.shape), *ctx.parameters)
        if ctx.needs_input_grad[1]:
            grad_weight = convolution_backward_weight(grad_output, input, list(weight.shape), *ctx.parameters)
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_over_channels(grad_output)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight = ctx.saved_tensors
        tangent = None
        if input_tangent is not None:
            tangent = convolution(input_tangent, weight, bias_tangent, *ctx.parameters)
            bias_tangent = None
        if weight_tangent is not None:
            tangent = add(tangent, convolution(input, weight_tangent, bias_tangent, *ctx.parameters))
            bias_tangent = None
        if bias_tangent is not None:
            tangent = _as_channels(bias_tangent, convolution(input, weight, None, *ctx.parameters)).clone()
        return tangent

    @staticmethod
    def vmap(info, in_dims, input, weight, bias, stride, padding, dilation, groups, algorithm):
        # Without a batch of weights the vmapped dimension joins the batch; with one it becomes groups.
        parameters = stride, padding, dilation
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            folded = batched(input, in_dims[0], size).flatten(0, 1)
            return convolution(folded, weight, bias, *parameters, groups, algorithm).unflatten(0, (size, -1)), 0
        input = batched(input, in_dims[0], size).transpose(0, 1).flatten(1, 2)
        weight = batched(weight, in_dims[1], size).flatten(0, 1)
        if bias is not None:
            bias = batched(bias, in_dims[2], size).flatten()
        output = convolution(input, weight, bias, *parameters, size * groups, algorithm)
        return output.unflatten(1, (size, -1)).transpose(0, 1), 0


class ConvolutionBackwardInput(Function):
    """``dx[n,c,i] = bias[c] + sum over every (k,t,o) with o*stride - padding + t*dilation == i of dy[n,k,o]*w[k,c,t]``

    The gradient of the input (lecture item L8), and the forward pass of a transposed convolution, whose bias this is.
    Backward, with ``g`` the gradient of ``dx``: ``d(dy) = conv(g, w)``, ``dw = backward_weight(dy, g)``,
    ``d(bias)[c] = sum_{n,i} g[n,c,i]``.
    """

    @staticmethod
    def forward(grad_output, weight, bias, input_size, stride, padding, dilation, groups, algorithm):
        return _backward_input(grad_output, weight, bias, input_size, stride, padding, dilation, groups, algorithm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, _bias, ctx.input_size, *ctx.parameters = inputs
        ctx.save_for_backward(grad_output, weight)
        ctx.save_for_forward(grad_output, weight)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = convolution(grad, weight, None, *ctx.parameters)
        if ctx.needs_input_grad[1]:
            grad_weight = convolution_backward_weight(grad_output, grad, list(weight.shape), *ctx.parameters)
        if ctx.needs_input_grad[2]:
            grad_bias = _sum_over_channels(grad)
        return grad_grad_output, grad_weight, grad_bias, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, weight_tangent, bias_tangent, *_):
        grad_output, weight = ctx.saved_tensors
        rest = ctx.input_size, *ctx.parameters
        tangent = None
        if grad_output_tangent is not None:
            tangent = convolution_backward_input(grad_output_tangent, weight, bias_tangent, *rest)
            bias_tangent = None
        if weight_tangent is not None:
            tangent = add(tangent, convolution_backward_input(grad_output, weight_tangent, bias_tangent, *rest))
            bias_tangent = None
        if bias_tangent is not None:
            tangent = _as_channels(bias_tangent, convolution_backward_input(grad_output, weight, None, *rest)).clone()
        return tangent

    @staticmethod
    def vmap(info, in_dims, grad_output, weight, bias, input_size, stride, padding, dilation, groups, algorithm):
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            folded = batched(grad_output, in_dims[0], size).flatten(0, 1)
            input_size = [size * input_size[0], *input_size[1:]]
            rest = input_size, stride, padding, dilation, groups, algorithm
            return convolution_backward_input(folded, weight, bias, *rest).unflatten(0, (size, -1)), 0
        grad_output = batched(grad_output, in_dims[0], size).transpose(0, 1).flatten(1, 2)
        weight = batched(weight, in_dims[1], size).flatten(0, 1)
        if bias is not None:
            bias = batched(bias, in_dims[2], size).flatten()
        input_size = [input_size[0], size * input_size[1], *input_size[2:]]
        rest = input_size, stride, padding, dilation, size * groups, algorithm
        return convolution_backward_input(grad_output, weight, bias, *rest).unflatten(1, (size, -1)).transpose(0, 1), 0


class ConvolutionBackwardWeight(Function):
    """``dw[k,c,t] = sum_{n,o} dy[n,k,o] * x[n,c, o*stride - padding + t*dilation]``

    The gradient of the weight (lecture item L7): a sum over the patches that the weight touched.
    Backward, with ``g`` the gradient of ``dw``: ``d(dy) = conv(x, g)``, ``dx = backward_input(dy, g)``.
    """

    @staticmethod
    def forward(grad_output, input, weight_size, stride, padding, dilation, groups, algorithm):
        return _backward_weight(grad_output, input, weight_size, stride, padding, dilation, groups, algorithm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.weight_size, *ctx.parameters = inputs
        ctx.save_for_backward(grad_output, input)
        ctx.save_for_forward(grad_output, input)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = convolution(input, grad, None, *ctx.parameters)
        if ctx.needs_input_grad[1]:
            grad_input = convolution_backward_input(grad_output, grad, None, list(input.shape), *ctx.parameters)
        return grad_grad_output, grad_input, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, input_tangent, *_):
        grad_output, input = ctx.saved_tensors
        rest = ctx.weight_size, *ctx.parameters
        tangent = None
        if grad_output_tangent is not None:
            tangent = convolution_backward_weight(grad_output_tangent, input, *rest)
        if input_tangent is not None:
            tangent = add(tangent, convolution_backward_weight(grad_output, input_tangent, *rest))
        return tangent

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(convolution_backward_weight)(info, in_dims, *arguments)


_usual_forward = kernel("convolution")
_usual_backward_input = kernel("convolution_backward_input")
_usual_backward_weight = kernel("convolution_backward_weight")


# Each takes the short way past the dispatcher where nothing else has a say in the call: csrc/python_call.cpp.
def _forward(input, weight, bias, stride, *rest):
    result = _C.convolution(len(stride), input, weight, bias, None, None, None, None, stride, *rest)
    return _usual_forward(input, weight, bias, stride, *rest) if result is NotImplemented else result


def _backward_input(grad_output, weight, bias, input_size, stride, *rest):
    result = _C.convolution_backward_input(len(stride), grad_output, weight, bias, input_size, stride, *rest)
    if result is NotImplemented:
        return _usual_backward_input(grad_output, weight, bias, input_size, stride, *rest)
    return result


def _backward_weight(grad_output, input, weight_size, stride, *rest):
    result = _C.convolution_backward_weight(len(stride), grad_output, input, weight_size, stride, *rest)
    if result is NotImplemented:
        return _usual_backward_weight(grad_output, input, weight_size, stride, *rest)
    return result


convolution = entry(Convolution, "convolution", _forward)
convolution_backward_input = entry(ConvolutionBackwardInput, "convolution_backward_input", _backward_input)
convolution_backward_weight = entry(ConvolutionBackwardWeight, "convolution_backward_weight", _backward_weight)
