"""Group and layer normalization: the operators and their gradients, each with every further derivative.

Each forward operator returns ``(output, mean, variance)``; the statistics are for its backward and for running
averages and carry no gradient. The two differ in how their tensors are viewed; the formulas are in
`_normalization_formulas`.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from ._entry import entry, short_way, vmap_by_loop
from ._normalization_formulas import Normalization, View


def _group_view(input: torch.Tensor, groups: int) -> View:
    batch, channels, *spatial = input.shape
    per_group = channels // groups
    shape = [batch, groups, per_group, *spatial]
    return View(shape, [1, groups, per_group, *[1] * len(spatial)], list(range(2, len(shape))))


def _layer_view(input: torch.Tensor, normalized_shape: list[int]) -> View:
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    return View(list(input.shape), list(normalized_shape), dims)


def _setup_forward(ctx, inputs, output):
    input, weight, bias, ctx.shape, ctx.eps = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, mean, variance)
    ctx.save_for_forward(input, weight, bias)


def _backward(ctx, backward, grad_output):
    if grad_output is None:
        return (None,) * 5
    gradients = backward(grad_output, *ctx.saved_tensors, ctx.shape, ctx.eps)
    return *(grad if wanted else None for grad, wanted in zip(gradients, ctx.needs_input_grad)), None, None


def _forward_tangent(ctx, make_view, input_tangent, weight_tangent, bias_tangent):
    input, weight, _bias = ctx.saved_tensors[:3]
    view = make_view(input, ctx.shape)
    norm = Normalization(view.activation(input), view.dims, ctx.eps)
    tangent = norm.forward_tangent(
        view.weight(weight),
        view.activation(input_tangent),
        view.parameter(weight_tangent),
        view.parameter(bias_tangent),
    )
    return tangent.reshape(input.shape).to(input.dtype), None, None


def _setup_backward(ctx, inputs, output):
    grad_output, input, weight, bias, _mean, _variance, ctx.shape, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_output, input, weight, bias)
    ctx.save_for_forward(grad_output, input, weight, bias)


def _double_backward(ctx, make_view, v, v_weight, v_bias):
    grad_output, input, weight, bias = ctx.saved_tensors
    view = make_view(input, ctx.shape)
    norm = Normalization(view.activation(input), view.dims, ctx.eps)
    grad_grad, grad_input, grad_weight = norm.double_backward(
        view.activation(grad_output),
        view.weight(weight),
        view.activation(v),
        None if weight is None else view.parameter(v_weight),
        None if bias is None else view.parameter(v_bias),
    )
    grad_grad = grad_grad.reshape(input.shape).to(grad_output.dtype)
    return grad_grad, grad_input.reshape(input.shape).to(input.dtype), view.sum(grad_weight, weight), *(None,) * 5


def _backward_tangents(ctx, make_view, grad_tangent, input_tangent, weight_tangent):
    grad_output, input, weight, bias = ctx.saved_tensors
    view = make_view(input, ctx.shape)
    norm = Normalization(view.activation(input), view.dims, ctx.eps)
    grad = view.activation(grad_output)
    grad_tangent = view.activation(grad_tangent)
    tangent, product = norm.backward_tangents(
        grad, view.weight(weight), grad_tangent, view.activation(input_tangent), view.parameter(weight_tangent)
    )
    if grad_tangent is None:
        grad_tangent = torch.zeros_like(grad)
    empty = input.new_empty(0)
    return (
        tangent.reshape(input.shape).to(input.dtype),
        empty if weight is None else view.sum(product, weight),
        empty if bias is None else view.sum(grad_tangent, bias),
    )


class GroupNorm(Function):
    """``y = (x - m) * r * w + b``, ``r = 1/sqrt(v + eps)``; m and v of each sample and group of channels.

    As many groups as channels is instance norm. With ``g = w * dy``, ``n = (x - m) * r`` and M the mean over the
    group: ``dx = r * (g - M(g) - n*M(g*n))``, ``dw = sum(dy*n)``, ``db = sum(dy)``. Lecture item L17.
    """

    @staticmethod
    def forward(input, weight, bias, num_groups, eps):
        return _group_norm(input, weight, bias, num_groups, eps)

    setup_context = staticmethod(_setup_forward)

    @staticmethod
    def backward(ctx, grad_output, *_):
        return _backward(ctx, group_norm_backward, grad_output)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        return _forward_tangent(ctx, _group_view, input_tangent, weight_tangent, bias_tangent)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(group_norm)(info, in_dims, *arguments)


class GroupNormBackward(Function):
    """The gradients of `GroupNorm` with respect to input, weight and bias; those of absent arguments are empty.

    Mean and variance are those of the input, so derivatives go through the input alone: see `Normalization`.
    """

    @staticmethod
    def forward(grad_output, input, weight, bias, mean, variance, num_groups, eps):
        return _group_norm_backward(grad_output, input, weight, bias, mean, variance, num_groups, eps)

    setup_context = staticmethod(_setup_backward)

    @staticmethod
    def backward(ctx, v, v_weight, v_bias):
        return _double_backward(ctx, _group_view, v, v_weight, v_bias)

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, weight_tangent, *_):
        return _backward_tangents(ctx, _group_view, grad_tangent, input_tangent, weight_tangent)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(group_norm_backward)(info, in_dims, *arguments)


class LayerNorm(Function):
    """``y = (x - m) * r * w + b``, ``r = 1/sqrt(v + eps)``; m and v over the trailing ``normalized_shape``.

    Weight and bias have that shape. Gradients as in `GroupNorm`, with M the mean over ``normalized_shape``.
    """

    @staticmethod
    def forward(input, weight, bias, normalized_shape, eps):
        return _layer_norm(input, weight, bias, normalized_shape, eps)

    setup_context = staticmethod(_setup_forward)

    @staticmethod
    def backward(ctx, grad_output, *_):
        return _backward(ctx, layer_norm_backward, grad_output)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        return _forward_tangent(ctx, _layer_view, input_tangent, weight_tangent, bias_tangent)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(layer_norm)(info, in_dims, *arguments)


class LayerNormBackward(Function):
    """The gradients of `LayerNorm` with respect to input, weight and bias; those of absent arguments are empty."""

    @staticmethod
    def forward(grad_output, input, weight, bias, mean, variance, normalized_shape, eps):
        return _layer_norm_backward(grad_output, input, weight, bias, mean, variance, normalized_shape, eps)

    setup_context = staticmethod(_setup_backward)

    @staticmethod
    def backward(ctx, v, v_weight, v_bias):
        return _double_backward(ctx, _layer_view, v, v_weight, v_bias)

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, weight_tangent, *_):
        return _backward_tangents(ctx, _layer_view, grad_tangent, input_tangent, weight_tangent)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(layer_norm_backward)(info, in_dims, *arguments)


_group_norm = short_way("group_norm")
_group_norm_backward = short_way("group_norm_backward")
_layer_norm = short_way("layer_norm")
_layer_norm_backward = short_way("layer_norm_backward")

group_norm = entry(GroupNorm, "group_norm", _group_norm)
group_norm_backward = entry(GroupNormBackward, "group_norm_backward", _group_norm_backward)
layer_norm = entry(LayerNorm, "layer_norm", _layer_norm)
layer_norm_backward = entry(LayerNormBackward, "layer_norm_backward", _layer_norm_backward)
