"""Batch normalization: the operators and their gradient, each with every further derivative.

The training operator returns ``(output, mean, variance, stopped)``. The statistics are for its backward and for running
averages, ``stopped`` for its backward alone: where gradients end at the clamp, in bits (if ``mark`` and there is a
residual, which the backward then need not read; else empty). They carry no gradient. The formulas are in
`_normalization_formulas`.
"""

from __future__ import annotations

import torch
from torch.autograd import Function, forward_ad

from ._entry import _functorch_active, add, entry, kernel, short_way, vmap_by_loop
from ._normalization_formulas import Normalization, View, computing


def _batch_view(input: torch.Tensor) -> View:
    shape = list(input.shape)
    return View(shape, [1, shape[1], *[1] * (len(shape) - 2)], [0, *range(2, len(shape))])


def _clamps(ctx) -> bool:
    return ctx.lower is not None or ctx.upper is not None


def _passes(ctx, input, weight, bias, mean, variance, residual):
    """Where the clamp of a batch norm lets gradients through, as 1 and 0; None if there is no clamp."""
    if not _clamps(ctx):
        return None
    with torch.no_grad():
        operands = input, weight, bias, mean, variance, residual
        # In the type to compute in, as the kernels see it: rounded to 16 bits it may end up on a bound.
        operands = [None if tensor is None else computing(tensor.detach()) for tensor in operands]
        output = batch_norm_eval(*operands, None, None, ctx.eps)
        stopped = torch.zeros_like(output, dtype=torch.bool)
        if ctx.lower is not None:
            stopped |= output <= ctx.lower
        if ctx.upper is not None:
            stopped |= output >= ctx.upper
        return (~stopped).to(output.dtype)


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
    tangent = add(tangent, computing(residual_tangent))
    return _masked(tangent, _passes(ctx, *saved)).to(input.dtype)


class BatchNormTrain(Function):
    """``y = clamp((x - m) * r * w + b + residual)``, ``r = 1/sqrt(v + eps)``, mean m and variance v of each channel.

    The clamp, to ``[lower, upper]``, and the residual are optional. ReLU is the clamp from 0 to None, ReLU6 that from 0
    to 6. With ``g = dy`` strictly between the bounds, else 0, ``n = (x - m) * r`` and M the mean
    over the channel: ``dx = w*r * (g - M(g) - n*M(g*n))``, ``dw = sum(g*n)``, ``db = sum(g)``, ``d(residual) = g``.
    Forward mode: see `Normalization.forward_tangent`. Lecture item L14.
    """

    @staticmethod
    def forward(input, weight, bias, residual, lower, upper, eps, mark):
        return _batch_norm_train(input, weight, bias, residual, lower, upper, eps, mark)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, residual, ctx.lower, ctx.upper, ctx.eps, _mark = inputs
        _, mean, variance, stopped = output
        ctx.mark_non_differentiable(mean, variance, stopped)
        ctx.set_materialize_grads(False)
        saved = input, weight, bias, mean, variance, residual if _clamps(ctx) else None
        ctx.save_for_backward(*saved, stopped)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 8
        *saved, stopped = ctx.saved_tensors
        gradients = batch_norm_backward(grad_output, *saved, ctx.lower, ctx.upper, True, ctx.eps, stopped)
        return (*_wanted(ctx, gradients, grad_output, 3), None, None, None, None)

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, residual_tangent, *_):
        tangents = input_tangent, weight_tangent, bias_tangent, residual_tangent
        return _batch_tangent(ctx, True, ctx.saved_tensors, tangents), None, None, None

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
        (grad_residual if _clamps(ctx) else grad_output) if ctx.needs_input_grad[residual_index] else None,
    )


class BatchNormEval(Function):
    """`BatchNormTrain` with given mean and variance, which are constants: ``dx = w * r * g``. Lecture item L15."""

    @staticmethod
    def forward(input, weight, bias, mean, variance, residual, lower, upper, eps):
        return _batch_norm_eval(input, weight, bias, mean, variance, residual, lower, upper, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, residual, ctx.lower, ctx.upper, ctx.eps = inputs
        saved = *tensors, residual if _clamps(ctx) else None
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = batch_norm_backward(grad_output, *ctx.saved_tensors, ctx.lower, ctx.upper, False, ctx.eps, None)
        grad_input, grad_weight, grad_bias, grad_residual = _wanted(ctx, gradients, grad_output, 5)
        return grad_input, grad_weight, grad_bias, None, None, grad_residual, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, _mean, _variance, residual_tangent, *_):
        tangents = input_tangent, weight_tangent, bias_tangent, residual_tangent
        return _batch_tangent(ctx, False, ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(batch_norm_eval)(info, in_dims, *arguments)


def _is_last(v, input) -> bool:
    """Whether the second derivative is the last one, and so a kernel's: it is not differentiable in turn."""
    return (
        v is not None
        and input.device.type in ("cpu", "cuda")
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and not _functorch_active()
    )


class BatchNormBackward(Function):
    """The gradients of `BatchNormTrain` (``train``) and `BatchNormEval`: of input, weight, bias and residual.

    Gradients of absent arguments, and that of the residual without a clamp (it is ``dy``), are tensors of no elements.
    Mean and variance are those of the input if ``train``, so derivatives go through the input alone. Double backward
    and forward mode: see `Normalization`; the clamp's mask is a constant factor of dy. Where it is the last derivative,
    double backward in training is two passes of a kernel (csrc/cpu/norm_double.h, csrc/cuda/norm_double.cu).
    """

    @staticmethod
    def forward(grad_output, input, weight, bias, mean, variance, residual, lower, upper, train, eps, stopped):
        return _batch_norm_backward(
            grad_output, input, weight, bias, mean, variance, residual, lower, upper, train, eps, stopped
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.lower, ctx.upper, ctx.train, ctx.eps, _stopped = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _parts(ctx):
        grad_output, input, weight, bias, mean, variance, residual = ctx.saved_tensors
        view = _batch_view(input)
        mask = _passes(ctx, input, weight, bias, mean, variance, residual)
        statistics = None if ctx.train else (view.parameter(variance), view.parameter(mean))
        norm = Normalization(view.activation(input), view.dims, ctx.eps, statistics)
        return view, mask, norm, _masked(view.activation(grad_output), mask)

    @staticmethod
    def backward(ctx, v, v_weight, v_bias, v_residual):
        grad_output, input, weight, bias, *_, residual = saved = ctx.saved_tensors
        if ctx.train and _is_last(v, input):
            along = v, v_weight if weight is not None else None, v_bias if bias is not None else None, v_residual
            if not _clamps(ctx) or residual is None:
                along = *along[:3], None
            grad_grad, grad_input, grad_weight = _batch_norm_double_backward(
                *along, *saved, ctx.lower, ctx.upper, ctx.eps
            )
            return grad_grad, grad_input, None if weight is None else grad_weight, *(None,) * 9
        view, mask, norm, grad = BatchNormBackward._parts(ctx)
        grad_grad, grad_input, grad_weight = norm.double_backward(
            grad,
            view.weight(weight),
            view.activation(v),
            None if weight is None else view.parameter(v_weight),
            None if bias is None else view.parameter(v_bias),
        )
        if _clamps(ctx) and residual is not None:
            grad_grad = add(grad_grad, computing(v_residual))
        grad_grad = _masked(grad_grad, mask).to(grad_output.dtype)
        return grad_grad, grad_input.to(input.dtype), view.sum(grad_weight, weight), *(None,) * 9

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
            grad_tangent.to(input.dtype) if _clamps(ctx) and residual is not None else empty,
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(batch_norm_backward)(info, in_dims, *arguments)


_batch_norm_train = short_way("batch_norm_train")
_batch_norm_eval = short_way("batch_norm_eval")
_batch_norm_backward = short_way("batch_norm_backward")
_batch_norm_double_backward = kernel("batch_norm_double_backward")

batch_norm_train = entry(BatchNormTrain, "batch_norm_train", _batch_norm_train)
batch_norm_eval = entry(BatchNormEval, "batch_norm_eval", _batch_norm_eval)
batch_norm_backward = entry(BatchNormBackward, "batch_norm_backward", _batch_norm_backward)
