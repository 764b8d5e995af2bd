"""Normalization: derivatives of every order and mode, `torch.library.opcheck`, `torch.compile`."""

from __future__ import annotations

import copy

import pytest
import torch
from test_normalization import BATCH_NORMS, OPS, channels_last, normal, sample
from torch.autograd import gradcheck, gradgradcheck

import torch_convlab.functional as ours
from torch_convlab import nn as layers


def leaf(*shape, seed=0):
    return (normal(*shape, seed=seed) + 0.1).requires_grad_()


def derivative_cases():
    running = normal(3), normal(3).abs() + 0.5
    x, r, w, b = leaf(3, 3, 2, 2), leaf(3, 3, 2, 2, seed=5), leaf(3, seed=6), leaf(3, seed=7)
    for name, (function, _) in BATCH_NORMS.items():
        for training in (True, False):
            statistics = (None, None) if training else running
            mode = "train" if training else "eval"
            wanted = [x, r] if "add" in name else [x]

            def call(*leaves, function=function, statistics=statistics, training=training, name=name):
                residual = leaves[1] if "add" in name else None
                affine = leaves[2:] if "add" in name else leaves[1:]
                return function(leaves[0], residual, *statistics, *affine, *[None] * (2 - len(affine)), training)

            yield f"{name} {mode}", call, [*wanted, w, b]
            yield f"{name} {mode} without affine", call, wanted
    x, w, b = leaf(2, 4, 3), leaf(4, seed=6), leaf(4, seed=7)
    yield "group_norm", lambda x, w, b: ours.group_norm(x, 2, w, b), [x, w, b]
    yield "group_norm without affine", lambda x: ours.group_norm(x, 2), [x]
    yield "group_norm of vectors", lambda x, w: ours.group_norm(x, 2, w), [leaf(3, 6), leaf(6)]
    yield "instance_norm", lambda x, w, b: ours.instance_norm(x, None, None, w, b), [x, w, b]
    yield "layer_norm", lambda x, w, b: ours.layer_norm(x, (4, 3), w, b), [x, leaf(4, 3), leaf(4, 3, seed=8)]
    yield "rms_norm", lambda x, w: ours.rms_norm(x, (4, 3), w), [x, leaf(4, 3)]
    yield "rms_norm without weight", lambda x: ours.rms_norm(x, (3,), eps=0.1), [x]
    yield "layer_norm without bias", lambda x, w: ours.layer_norm(x, (3,), w), [x, leaf(3)]
    yield "layer_norm without affine", lambda x: ours.layer_norm(x, (3,)), [x]


DERIVATIVES = {name: (function, leaves) for name, function, leaves in derivative_cases()}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    function, leaves = DERIVATIVES[name]
    full = name in ("batch_norm_add_relu train", "group_norm", "layer_norm", "rms_norm")
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=full, check_batched_forward_grad=full)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


def plain(function_dims):
    """A normalization in differentiable torch ops; torch.func's mixed derivatives of torch's own kernels are wrong."""

    def call(x, w):
        variance, mean = torch.var_mean(x, function_dims, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * w

    return call


@pytest.mark.parametrize("function,reference", [
    (lambda x, w: ours.batch_norm(x, None, None, w, None, True), plain([0])),
    (lambda x, w: ours.layer_norm(x, [4], w), plain([1])),
], ids=["batch_norm", "layer_norm"])  # fmt: skip
def test_higher_derivatives_and_torch_func(function, reference):
    x, w = normal(5, 4), normal(4, seed=1)
    functions, eager = [], []
    for f in (function, reference):

        def loss(x, w, f=f):
            return (f(x, w) ** 3).sum()

        hessian = torch.func.hessian(loss, argnums=(0, 1))(x, w)
        third = torch.func.jacrev(lambda x: torch.func.grad(loss)(x, w).pow(2).sum())(x)
        each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(torch.stack([x, 2 * x]), w)
        functions.append((hessian, third, each))
        leaf = x.clone().requires_grad_()
        value = loss(leaf, w)
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = grad.square().sum()
        eager.append(grad)
    torch.testing.assert_close(*functions)
    torch.testing.assert_close(*eager)


def opcheck_cases():
    x, w = sample((2, 4, 3, 3), torch.float32).requires_grad_(), normal(4, dtype=torch.float32).requires_grad_()
    mean, variance, g = torch.zeros(4), torch.ones(4), normal(2, 4, 3, 3, dtype=torch.float32)
    last = channels_last(x.detach()).requires_grad_()
    rows = sample((6, 5), torch.float32).requires_grad_()
    means, variances, eps = torch.zeros(2, 2), torch.ones(2, 2), 1e-5
    yield "batch_norm_train", OPS.batch_norm_train, (x, w, w, None, None, None, eps)
    yield "batch_norm_train fused", OPS.batch_norm_train, (last, w, None, x, 0.0, 6.0, eps)
    yield "batch_norm_train marked", OPS.batch_norm_train, (last, w, None, x, 0.0, None, eps, True)
    yield "batch_norm_eval", OPS.batch_norm_eval, (last, w, w, mean, variance, x, 0.0, None, eps)
    backward = OPS.batch_norm_backward
    yield "batch_norm_backward", backward, (g, x, w, w, mean, variance, x, 0.0, None, True, eps)
    yield "batch_norm_backward plain", backward, (g, last, None, None, mean, variance, None, None, None, False, eps)
    rest = (g, last.detach(), w.detach(), None, mean, variance, x.detach(), 0.0, None, eps)
    yield "batch_norm_double_backward", OPS.batch_norm_double_backward, (g, mean, None, g, *rest)
    yield "group_norm", OPS.group_norm, (x, w, w, 2, eps)
    yield "group_norm_backward", OPS.group_norm_backward, (g, last, w, w, means, variances, 2, eps)
    means, variances = torch.zeros(6, 1), torch.ones(6, 1)
    yield "batch_norm_statistics", OPS.batch_norm_statistics, (last.detach(),)
    yield "rms_norm", OPS.rms_norm, (rows, rows[0].detach(), [5], eps)
    yield "rms_norm_backward", OPS.rms_norm_backward, (rows.detach(), rows, None, variances, [5], eps)
    yield "layer_norm", OPS.layer_norm, (rows, None, None, [5], eps)
    yield "layer_norm_backward", OPS.layer_norm_backward, (rows.detach(), rows, None, None, means, variances, [5], eps)


OPCHECKS = {name: (op, arguments) for name, op, arguments in opcheck_cases()}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    op, arguments = OPCHECKS[name]
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) and not a.is_leaf else a for a in arguments)
    torch.library.opcheck(op.default, detached)


def test_compile():
    model = torch.nn.Sequential(
        layers.BatchNorm2d(4), layers.BatchNormReLU2d(4), layers.GroupNorm(2, 4), layers.InstanceNorm2d(4, affine=True),
        layers.LayerNorm(5), layers.ConvBNReLU2d(4, 4, 3), layers.RMSNorm(5), layers.Linear(5, 3),
    )  # fmt: skip
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    input = sample((2, 4, 5, 5), torch.float32)
    results = []
    for function in (model, compiled):
        leaf = input.clone().requires_grad_()
        function(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in (model if function is model else twin).parameters())])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
