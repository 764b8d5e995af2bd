"""FLOP counts of the operators for `torch.utils.flop_counter`, which counts an unknown operator as 0."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula


def _flops(reads: list[int], weight: list[int]) -> int:
    """Twice the multiply-adds: every output element takes in_channels/groups * taps of them."""
    return 2 * math.prod(reads) * math.prod(weight[1:])


@register_flop_formula(torch.ops.convlab.convolution)
def _convolution(input, weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(out_shape, weight)


@register_flop_formula(torch.ops.convlab.convolution_backward_input)
def _convolution_backward_input(grad_output, weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(grad_output, weight)


@register_flop_formula(torch.ops.convlab.convolution_backward_weight)
def _convolution_backward_weight(grad_output, input, weight_size, *args, out_shape=None, **kwargs) -> int:
    return _flops(grad_output, weight_size)
