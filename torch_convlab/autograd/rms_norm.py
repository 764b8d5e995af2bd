"""RMS normalization: the operator and its gradient, each with every further derivative.

The forward operator returns ``(output, mean of squares)``; the latter is for its backward and carries no gradient. The
formulas are in `_normalization_formulas`.
"""

from __future__ import annotations

from torch.autograd import Function

from ._entry import entry, short_way, vmap_by_loop
from ._normalization_formulas import Normalization
from .group_norm import _layer_view


def _normalization(ctx, input):
    view = _layer_view(input, ctx.shape)
    return view, Normalization(view.activation(input), view.dims, ctx.eps, centered=False)


class RMSNorm(Function):
    """``y = x * r * w``, ``r = 1/sqrt(M(x^2) + eps)``, M the mean over the trailing ``normalized_shape``.

    With ``n = x * r`` and ``g = w * dy``: ``dx = r * (g - n*M(g*n))``, ``dw = sum(dy*n)``. Zhang and Sennrich 2019.
    """

    @staticmethod
    def forward(input, weight, normalized_shape, eps):
        return _rms_norm(input, weight, normalized_shape, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, ctx.shape, ctx.eps = inputs
        _, mean_square = output
        ctx.mark_non_differentiable(mean_square)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean_square)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 4
        gradients = rms_norm_backward(grad_output, *ctx.saved_tensors, ctx.shape, ctx.eps)
        return *(grad if wanted else None for grad, wanted in zip(gradients, ctx.needs_input_grad)), None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, *_):
        input, weight = ctx.saved_tensors[:2]
        view, norm = _normalization(ctx, input)
        tangent = norm.forward_tangent(
            view.weight(weight), view.activation(input_tangent), view.parameter(weight_tangent), None
        )
        return tangent.to(input.dtype), None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(rms_norm)(info, in_dims, *arguments)


class RMSNormBackward(Function):
    """The gradients of `RMSNorm` with respect to input and weight; that of an absent weight is empty.

    The mean of squares is that of the input, so derivatives go through the input alone: see `Normalization`.
    """

    @staticmethod
    def forward(grad_output, input, weight, mean_square, normalized_shape, eps):
        return _rms_norm_backward(grad_output, input, weight, mean_square, normalized_shape, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, weight, _mean_square, ctx.shape, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.save_for_forward(grad_output, input, weight)

    @staticmethod
    def backward(ctx, v, v_weight):
        grad_output, input, weight = ctx.saved_tensors
        view, norm = _normalization(ctx, input)
        grad_grad, grad_input, grad_weight = norm.double_backward(
            view.activation(grad_output),
            view.weight(weight),
            view.activation(v),
            None if weight is None else view.parameter(v_weight),
            None,
        )
        grad_weight = view.sum(grad_weight, weight)
        return grad_grad.to(grad_output.dtype), grad_input.to(input.dtype), grad_weight, None, None, None

    @staticmethod
    def jvp(ctx, grad_tangent, input_tangent, weight_tangent, *_):
        grad_output, input, weight = ctx.saved_tensors
        view, norm = _normalization(ctx, input)
        tangent, product = norm.backward_tangents(
            view.activation(grad_output),
            view.weight(weight),
            view.activation(grad_tangent),
            view.activation(input_tangent),
            view.parameter(weight_tangent),
        )
        return tangent.to(input.dtype), input.new_empty(0) if weight is None else view.sum(product, weight)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return vmap_by_loop(rms_norm_backward)(info, in_dims, *arguments)


_rms_norm = short_way("rms_norm")
_rms_norm_backward = short_way("rms_norm_backward")

rms_norm = entry(RMSNorm, "rms_norm", _rms_norm)
rms_norm_backward = entry(RMSNormBackward, "rms_norm_backward", _rms_norm_backward)
