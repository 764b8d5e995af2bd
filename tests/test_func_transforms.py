"""Derivatives and batches by torch.func: vmap, jacobians, forward mode, per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from torch_convlab import functional as F


def both(compute, *tensors):
    """compute(functional, *tensors), a tree of tensors, with our functions and with torch's must agree."""
    torch.testing.assert_close(compute(F, *tensors), compute(torch.nn.functional, *tensors))


INPUT, WEIGHT, BIAS = (2, 4, 6, 5), (6, 2, 3, 3), (6,)


def operands(*sizes):
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, 0), (None, 0, None), (2, 1, None), (0, None, 0)], ids=str)
def test_vmap(in_dims):
    sizes = [list(size) for size in (INPUT, WEIGHT, BIAS)]
    for size, dim in zip(sizes, in_dims):
        if dim is not None:
            size.insert(dim, 3)

    def compute(functional, *tensors):
        return torch.func.vmap(lambda x, w, b: functional.conv2d(x, w, b, padding=1, groups=2), in_dims)(*tensors)

    both(compute, *operands(*sizes))


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, 0), (None, 0, None)], ids=str)
def test_vmap_transposed(in_dims):
    sizes = [list(size) for size in (INPUT, (4, 3, 3, 3), BIAS)]
    for size, dim in zip(sizes, in_dims):
        if dim is not None:
            size.insert(dim, 3)

    def compute(functional, *tensors):
        def one(x, w, b):
            return functional.conv_transpose2d(x, w, b, stride=2, output_padding=1, groups=2)

        return torch.func.vmap(one, in_dims)(*tensors)

    both(compute, *operands(*sizes))


def test_per_sample_gradients():
    input, weight, bias = operands((5, 4, 6, 5), WEIGHT, BIAS)

    def compute(functional, input, weight, bias):
        def loss(weight, bias, sample):
            return functional.conv2d(sample, weight, bias, padding=1, groups=2).square().sum()

        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(weight, bias, input)

    both(compute, input, weight, bias)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_jacobians_and_hessians(function, transform):
    input, weight = operands((1, 2, 3, 3), (2, 2, 2, 2))

    def compute(functional, input, weight):
        def loss(input, weight):
            output = getattr(functional, function)(input, weight, stride=2).sin()
            return output.sum() if transform == "hessian" else output

        return getattr(torch.func, transform)(loss, argnums=(0, 1))(input, weight)

    both(compute, input, weight)


def test_jvp_and_vjp():
    primals, tangents = tuple(operands(INPUT, WEIGHT, BIAS)), tuple(operands(INPUT, WEIGHT, BIAS))

    def compute(functional, *_):
        def layer(x, w, b):
            return functional.conv2d(x, w, b, padding=1, groups=2)

        output, pull = torch.func.vjp(layer, *primals)
        nested = torch.func.jvp(
            lambda x: torch.func.grad(lambda x: layer(x, *primals[1:]).pow(3).sum())(x), primals[:1], tangents[:1]
        )
        return torch.func.jvp(layer, primals, tangents), pull(torch.ones_like(output)), nested

    both(compute)


def test_tangent_of_the_bias_alone():
    input, weight, bias, tangent = operands(INPUT, WEIGHT, BIAS, BIAS)

    def compute(functional, *_):
        with forward_ad.dual_level():
            output = functional.conv2d(input, weight, forward_ad.make_dual(bias, tangent), groups=2)
            return forward_ad.unpack_dual(output).tangent

    both(compute)
