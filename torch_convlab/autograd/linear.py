"""A fully connected layer as one step of autograd; as a convolution of images of one pixel, with views, it is four."""

from __future__ import annotations

import torch
from torch.autograd import Function

from .. import _C
from .convolution import _forward, convolution_backward_input, convolution_backward_weight

ONE_PIXEL = [1, 1], [0, 0], [1, 1], 1, "auto"  # stride, padding, dilation, groups, algorithm


class Linear(Function):
    """``y = x W^T + b``. Backward: ``dx = dy W``, ``dW = dy^T x``, ``db`` the sum of the rows of ``dy``.

    Of eager mode alone, where neither a transform nor forward mode is active: those see the convolution.
    """

    @staticmethod
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        output = _C.linear(input, weight, bias, None, None, None, None, "none")
        if output is NotImplemented:
            images, filters = _rows(input), weight.view(*weight.shape, 1, 1)
            size = [*input.shape[:-1], weight.shape[0]]
            # Autograd forbids changing a Function's output in place if it is a view; this one it does not count as one.
            output = torch.ops.aten._unsafe_view(_forward(images, filters, bias, *ONE_PIXEL), size)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        grad = _rows(grad_output)
        size = list(input.shape)
        if ctx.needs_input_grad[0]:
            image_size = [grad.shape[0], size[-1], 1, 1]
            filters = weight.view(*weight.shape, 1, 1)
            grad_input = convolution_backward_input(grad, filters, None, image_size, *ONE_PIXEL).view(size)
        if ctx.needs_input_grad[1]:
            images, filter_size = _rows(input), [*weight.shape, 1, 1]
            grad_weight = convolution_backward_weight(grad, images, filter_size, *ONE_PIXEL).view(weight.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum([0, 2, 3])
        return grad_input, grad_weight, grad_bias


def _rows(tensor):
    """The rows as images of one pixel."""
    return tensor.reshape(-1, tensor.shape[-1], 1, 1)


linear = super(Function, Linear).apply  # the C++ one, as in `_entry.entry`
