"""Fully connected layers: a matrix product is a 1x1 convolution of channels_last pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _C
from ..autograd import linear as differentiable
from ..autograd._entry import only_autograd
from ..autograd.convolution import convolution
from ._arguments import autocast


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``y = x W^T + b``, as `torch.nn.functional.linear` (lecture item L13); with ``relu``, ``relu(y)``.

    The rows of `input` are images of one pixel, so the convolution's operators compute the product and all its
    derivatives; the views are free. Where autograd alone asks, they are one step of it.

    Args:
        input: ``* x in``; float32, float64, bfloat16 or float16.
        weight: ``out x in``, or ``in`` for one output without its dimension. Same dtype.
        bias: ``out``, or anything that broadcasts to the output's rows, or None.

    Returns:
        ``* x out``, contiguous.

    Raises:
        RuntimeError: sizes or dtypes that do not fit.
    """
    if not torch.compiler.is_compiling():
        output = _C.linear(input, weight, bias, None, None, 0.0 if relu else None, None, "none")
        if output is not NotImplemented:
            return output
    if input.dim() == 0 or weight.dim() == 0:
        raise RuntimeError(
            f"both arguments to linear need to be at least 1D, but they are {input.dim()}D and {weight.dim()}D"
        )
    if weight.dim() > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {weight.dim()}D")
    if weight.dim() == 1:
        if bias is not None:
            raise RuntimeError("mat2 must be a matrix, got 1-D tensor")
        return linear(input, weight.unsqueeze(0), relu=relu).squeeze(-1)
    input, weight, bias = autocast(input, weight, bias)
    *leading, features = input.shape
    rows, outputs = math.prod(leading), weight.shape[0]
    if features != weight.shape[1]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({rows}x{features} and {weight.shape[1]}x{outputs})"
        )
    if input.dtype != weight.dtype:
        names = (str(tensor.dtype).removeprefix("torch.") for tensor in (input, weight))
        raise RuntimeError("expected m1 and m2 to have the same dtype, but got: {} != {}".format(*names))
    if bias is not None and bias.shape != (outputs,):
        bias.expand(rows, outputs)  # raises torch's error
        product = linear(input, weight) + bias
        return torch.relu(product) if relu else product
    if rows == 0 or features == 0 or outputs == 0:  # there is nothing to multiply
        result = torch.nn.functional.linear(input, weight, bias)
    elif only_autograd():
        result = differentiable.linear(input, weight, bias)
    else:
        images, filters = input.reshape(rows, features, 1, 1), weight.view(outputs, features, 1, 1)
        result = convolution(images, filters, bias, *differentiable.ONE_PIXEL).view(*leading, outputs)
    return torch.relu(result) if relu else result
