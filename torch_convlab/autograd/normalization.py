"""Batch, group and layer normalization: the operator and its gradient, each with every further derivative.

Each forward operator returns ``(output, mean, variance)``; the statistics are for its backward and for running
averages and carry no gradient. The formulas are in `_normalization_formulas`.
"""

from __future__ import annotations

import torch
from torch.autograd import Function

from ._entry import add, entry, vmap_by_loop
from ._normalization_formulas import Normalization


def _computing(tensor):
    """In the type to compute in: 16-bit tensors in float32."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _View:
    """How an operator's tensors look to `Normalization`: shape of the activations, of the parameters, group dims."""

    def __init__(self, activations: list[int], parameters: list[int], dims: list[int]):
        self.activation_shape, self.parameter_shape, self.dims = activations, parameters, dims

    def activation(self, tensor):
        return None if tensor is None else _computing(tensor).reshape(self.activation_shape)

    def parameter(self, tensor):
        return None if tensor is None else _computing(tensor).reshape(self.parameter_shape)

    def weight(self, tensor):
        return 1 if tensor is None else self.parameter(tensor)

    def sum(self, value, tensor):
        """`value`, one per activation, summed for the parameter `tensor`."""
        if tensor is None:
            return None
        return value.sum_to_size(self.parameter_shape).reshape(tensor.shape).to(tensor.dtype)


def _batch_view(input: torch.Tensor) -> _View:
    shape = list(input.shape)
    return _View(shape, [1, shape[1], *[1] * (len(shape) - 2)], [0, *range(2, len(shape))])


def _group_view(input: torch.Tensor, groups: int) -> _View:
    batch, channels, *spatial = input.shape
    per_group = channels // groups
    shape = [batch, groups, per_group, *spatial]
    return _View(shape, [1, groups, per_group, *[1] * len(spatial)], list(range(2, len(shape))))


def _layer_view(input: torch.Tensor, normalized_shape: list[int]) -> _View:
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    return _View(list(input.shape), list(normalized_shape), dims)


def _no_statistics_tangents(tangent):
    return tangent, None, None


# ---- Batch norm


def _positive(ctx, input, weight, bias, mean, variance, residual):
    """Where the ReLU of a batch norm lets gradients through, as 1 and 0; None if there is no ReLU."""
    if not ctx.relu:
        return None
    with torch.no_grad():
        arguments = [None if tensor is None else tensor.detach() for tensor in (input, weight, bias)]
        rest = None if residual is None else residual.detach()
        output = batch_norm_eval(*arguments, mean.detach(), variance.detach(), rest, False, ctx.eps)
        return _computing((~(output <= 0)).to(output.dtype))


def _masked(value, mask):
    return value if mask is None or value is None else value * mask


def _batch_tangent(ctx, train, saved, tangents):
    input, weight, _bias, mean, variance, _residual = saved
    input_tangent, weight_tangent, bias_tangent, residual_tangent = tangents
    view = _batch_view(input)
    statistics = None if train else (view.parameter(variance), view.parameter(mean))
    norm = Normalization(view.activation(input), view.dims, ctx.eps, statistics)
    tangent = norm.forward_tangent(
        view.weight(weight),
        view.activation(input_tangent),
        view.parameter(weight_tangent),
        view.parameter(bias_tangent),
    )
    tangent = add(tangent, _computing(residual_tangent))
    return _masked(tangent, _positive(ctx, *saved)).to(input.dtype)


class BatchNormTrain(Function):
    """``y = relu((x - m) * r * w + b + residual)``, ``r = 1/sqrt(v + eps)``, mean m and variance v of each channel.

    ReLU and residual are optional. With ``g = dy`` where the ReLU passes, else 0, ``n = (x - m) * r`` and M the mean
    over the channel: ``dx = w*r * (g - M(g) - n*M(g*n))``, ``dw = sum(g*n)``, ``db = sum(g)``, ``d(residual) = g``.
    Forward mode: see `Normalization.forward_tangent`. Lecture item L14.
    """

    @staticmethod
    def forward(input, weight, bias, residual, relu, eps):
        return _batch_norm_train(input, weight, bias, residual, relu, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, residual, ctx.relu, ctx.eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        saved = input, weight, bias, mean, variance, residual if ctx.relu else None
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 6
        gradients = batch_norm_backward(grad_output, *ctx.saved_tensors, ctx.relu, True, ctx.eps)
        return (*_wanted(ctx, gradients, grad_output, 3), None, None)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, residual_tangent, *_):
        tangents = input_tangent, weight_tangent, bias_tangent, residual_tangent
        return _no_statistics_tangents(_batch_tangent(ctx, True, ctx.saved_tensors, tangents))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(batch_norm_train)(info, in_dims, *arguments)


def _wanted(ctx, gradients, grad_output, residual_index):
    """Gradients of input, weight, bias and residual, None where none is wanted."""
    grad_input, grad_weight, grad_bias, grad_residual = gradients
    return (
        grad_input if ctx.needs_input_grad[0] else None,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_bias if ctx.needs_input_grad[2] else None,
        (grad_residual if ctx.relu else grad_output) if ctx.needs_input_grad[residual_index] else None,
    )


class BatchNormEval(Function):
    """`BatchNormTrain` with given mean and variance, which are constants: ``dx = w * r * g``. Lecture item L15."""

    @staticmethod
    def forward(input, weight, bias, mean, variance, residual, relu, eps):
        return _batch_norm_eval(input, weight, bias, mean, variance, residual, relu, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, residual, ctx.relu, ctx.eps = inputs
        saved = *tensors, residual if ctx.relu else None
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = batch_norm_backward(grad_output, *ctx.saved_tensors, ctx.relu, False, ctx.eps)
        grad_input, grad_weight, grad_bias, grad_residual = _wanted(ctx, gradients, grad_output, 5)
        return grad_input, grad_weight, grad_bias, None, None, grad_residual, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, _mean, _variance, residual_tangent, *_):
        tangents = input_tangent, weight_tangent, bias_tangent, residual_tangent
        return _batch_tangent(ctx, False, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(batch_norm_eval)(info, in_dims, *arguments)


class BatchNormBackward(Function):
    """The gradients of `BatchNormTrain` (``train``) and `BatchNormEval`: of input, weight, bias and residual.

    Gradients of absent arguments, and that of the residual without ReLU (it is ``dy``), are tensors of no elements.
    Mean and variance are those of the input if ``train``, so derivatives go through the input alone. Double backward
    and forward mode: see `Normalization`; the ReLU's mask is a constant factor of dy.
    """

    @staticmethod
    def forward(grad_output, input, weight, bias, mean, variance, residual, relu, train, eps):
        return _batch_norm_backward(grad_output, input, weight, bias, mean, variance, residual, relu, train, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.relu, ctx.train, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _parts(ctx):
        grad_output, input, weight, bias, mean, variance, residual = ctx.saved_tensors
        view = _batch_view(input)
        mask = _positive(ctx, input, weight, bias, mean, variance, residual)
        statistics = None if ctx.train else (view.parameter(variance), view.parameter(mean))
        norm = Normalization(view.activation(input), view.dims, ctx.eps, statistics)
        return view, mask, norm, _masked(view.activation(grad_output), mask)

    @staticmethod
    def backward(ctx, v, v_weight, v_bias, v_residual):
        grad_output, input, weight, bias, *_, residual = ctx.saved_tensors
        view, mask, norm, grad = BatchNormBackward._parts(ctx)
        grad_grad, grad_input, grad_weight = norm.double_backward(
            grad,
            view.weight(weight),
            view.activation(v),
            None if weight is None else view.parameter(v_weight),
            None if bias is None else view.parameter(v_bias),
        )
        if ctx.relu and residual is not None:
            grad_grad = add(grad_grad, _computing(v_residual))
        grad_grad = _masked(grad_grad, mask).to(grad_output.dtype)
        return grad_grad, grad_input.to(input.dtype), view.sum(grad_weight, weight), *(None,) * 7

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, weight_tangent, *_):
        _grad_output, input, weight, bias, *_, residual = ctx.saved_tensors
        view, mask, norm, grad = BatchNormBackward._parts(ctx)
        grad_tangent = _masked(view.activation(grad_tangent), mask)
        tangent, product = norm.backward_tangents(
            grad, view.weight(weight), grad_tangent, view.activation(input_tangent), view.parameter(weight_tangent)
        )
        if grad_tangent is None:
            grad_tangent = torch.zeros_like(grad)
        empty = input.new_empty(0)
        return (
            tangent.to(input.dtype),
            empty if weight is None else view.sum(product, weight),
            empty if bias is None else view.sum(grad_tangent, bias),
            grad_tangent.to(input.dtype) if ctx.relu and residual is not None else empty,
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(batch_norm_backward)(info, in_dims, *arguments)


# ---- Group norm and layer norm differ in how their tensors are viewed.


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
    return _no_statistics_tangents(tangent.reshape(input.shape).to(input.dtype))


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


_batch_norm_train = torch.ops.convlab.batch_norm_train.default
_batch_norm_eval = torch.ops.convlab.batch_norm_eval.default
_batch_norm_backward = torch.ops.convlab.batch_norm_backward.default
_group_norm = torch.ops.convlab.group_norm.default
_group_norm_backward = torch.ops.convlab.group_norm_backward.default
_layer_norm = torch.ops.convlab.layer_norm.default
_layer_norm_backward = torch.ops.convlab.layer_norm_backward.default

batch_norm_train = entry(BatchNormTrain, "batch_norm_train")
batch_norm_eval = entry(BatchNormEval, "batch_norm_eval")
batch_norm_backward = entry(BatchNormBackward, "batch_norm_backward")
group_norm = entry(GroupNorm, "group_norm")
group_norm_backward = entry(GroupNormBackward, "group_norm_backward")
layer_norm = entry(LayerNorm, "layer_norm")
layer_norm_backward = entry(LayerNormBackward, "layer_norm_backward")
