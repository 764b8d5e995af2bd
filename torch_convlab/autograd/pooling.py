"""Max and average pooling. Each is linear in its input once the winners are known, so its derivatives are two maps:
the pooling itself (for a maximum: `max_pool_gather`, along the winners already found) and its adjoint.

Winners are saved as taps, positions inside the window: one byte per output instead of an index of eight.
"""

from __future__ import annotations

import torch
from torch.autograd import Function, forward_ad

from ._entry import batched, entry, kernel, short_way


def _without_taps(taps: torch.Tensor, output: torch.Tensor) -> bool:
    return taps.shape != output.shape


class MaxPool(Function):
    """``y[n,c,o] = max_k x[n,c, o*stride - padding + k*dilation]``, and ``taps[n,c,o]``, the first k that reaches it.

    NaN counts as the largest value. Backward: ``dx = max_pool_backward(dy, taps)``: each input sums the ``dy`` of
    the windows it won. Forward mode: ``ty = max_pool_gather(tx, taps)``. Taps have no derivative; without them
    (``with_taps=False``) the output has none either, and asking for it raises.
    """

    @staticmethod
    def forward(input, kernel_size, stride, padding, dilation, ceil_mode, with_taps):
        return _max_pool(input, kernel_size, stride, padding, dilation, ceil_mode, with_taps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.windows, _ = inputs
        _save_taps(ctx, input, output)

    @staticmethod
    def backward(ctx, grad_output, _):
        return _max_gradient(ctx, grad_output), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return _max_tangent(ctx, input_tangent), None

    @staticmethod
    def vmap(info, in_dims, input, kernel_size, stride, padding, dilation, ceil_mode, with_taps):
        folded = batched(input, in_dims[0], info.batch_size).flatten(0, 1)
        pooled = max_pool(folded, kernel_size, stride, padding, dilation, ceil_mode, with_taps)
        return _unfold_pair(pooled, info.batch_size)


class AdaptiveMaxPool(Function):
    """`MaxPool` over ``output_size`` windows, the o-th from ``floor(o*I/O)`` up to ``ceil((o+1)*I/O)``.

    Derivatives are those of `MaxPool`.
    """

    @staticmethod
    def forward(input, output_size, with_taps):
        return _adaptive_max_pool(input, output_size, with_taps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.windows = [], [], [], [], False
        _save_taps(ctx, inputs[0], output)

    @staticmethod
    def backward(ctx, grad_output, _):
        return _max_gradient(ctx, grad_output), None, None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return _max_tangent(ctx, input_tangent), None

    @staticmethod
    def vmap(info, in_dims, input, output_size, with_taps):
        folded = batched(input, in_dims[0], info.batch_size).flatten(0, 1)
        return _unfold_pair(adaptive_max_pool(folded, output_size, with_taps), info.batch_size)


def _save_taps(ctx, input, output):
    pooled, taps = output
    ctx.mark_non_differentiable(taps)
    ctx.input_size, ctx.has_taps = list(input.shape), not _without_taps(taps, pooled)
    ctx.save_for_backward(taps)
    ctx.save_for_forward(taps)


def _require_taps(ctx):
    if not ctx.has_taps:
        raise RuntimeError("max pooling was called with with_taps=False, expected True where derivatives are wanted")
    return ctx.saved_tensors[0]


def _max_gradient(ctx, grad_output):
    return max_pool_backward(grad_output, _require_taps(ctx), ctx.input_size, *ctx.windows)


def _max_tangent(ctx, input_tangent):
    return max_pool_gather(input_tangent, _require_taps(ctx), *ctx.windows)


def _unfold_pair(pooled, size):
    output, taps = pooled
    if _without_taps(taps, output):
        return (output.unflatten(0, (size, -1)), taps), (0, None)
    return (output.unflatten(0, (size, -1)), taps.unflatten(0, (size, -1))), (0, 0)


class MaxPoolBackward(Function):
    """``dx[n,c,i] = sum of dy[n,c,o] over the windows o whose tap names i``; windows are adaptive if kernel_size is [].

    Linear in ``dy``: backward is `MaxPoolGather` along the same taps, forward mode the operator itself.
    """

    @staticmethod
    def forward(grad_output, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode):
        return _max_pool_backward(grad_output, taps, input_size, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, taps, ctx.input_size, *ctx.windows = inputs
        ctx.save_for_backward(taps)
        ctx.save_for_forward(taps)

    @staticmethod
    def backward(ctx, grad):
        (taps,) = ctx.saved_tensors
        return max_pool_gather(grad, taps, *ctx.windows), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        (taps,) = ctx.saved_tensors
        return max_pool_backward(grad_output_tangent, taps, ctx.input_size, *ctx.windows)

    @staticmethod
    def vmap(info, in_dims, grad_output, taps, input_size, *windows):
        grad_output = batched(grad_output, in_dims[0], info.batch_size).flatten(0, 1)
        taps = batched(taps, in_dims[1], info.batch_size).flatten(0, 1)
        input_size = [info.batch_size * input_size[0], *input_size[1:]]
        grad_input = max_pool_backward(grad_output, taps, input_size, *windows)
        return grad_input.unflatten(0, (info.batch_size, -1)), 0


class MaxPoolGather(Function):
    """``y[n,c,o] = x[n,c,i]`` for the input i that ``taps[n,c,o]`` names; windows as in `MaxPoolBackward`.

    Linear in ``x``: backward is `MaxPoolBackward` along the same taps, forward mode the operator itself.
    """

    @staticmethod
    def forward(input, taps, kernel_size, stride, padding, dilation, ceil_mode):
        return _max_pool_gather(input, taps, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, taps, *ctx.windows = inputs
        ctx.input_size = list(input.shape)
        ctx.save_for_backward(taps)
        ctx.save_for_forward(taps)

    @staticmethod
    def backward(ctx, grad_output):
        (taps,) = ctx.saved_tensors
        return max_pool_backward(grad_output, taps, ctx.input_size, *ctx.windows), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        (taps,) = ctx.saved_tensors
        return max_pool_gather(input_tangent, taps, *ctx.windows)

    @staticmethod
    def vmap(info, in_dims, input, taps, *windows):
        input = batched(input, in_dims[0], info.batch_size).flatten(0, 1)
        taps = batched(taps, in_dims[1], info.batch_size).flatten(0, 1)
        return max_pool_gather(input, taps, *windows).unflatten(0, (info.batch_size, -1)), 0


class MaxPoolIndices(Function):
    """``indices[n,c,o]``, the offset in its plane of the input that ``taps[n,c,o]`` names: integers, no derivative."""

    @staticmethod
    def forward(taps, input_size, kernel_size, stride, padding, dilation, ceil_mode):
        return _max_pool_indices(taps, input_size, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, *_):
        return None

    @staticmethod
    def vmap(info, in_dims, taps, input_size, *windows):
        taps = batched(taps, in_dims[0], info.batch_size).flatten(0, 1)
        input_size = [info.batch_size * input_size[0], *input_size[1:]]
        return max_pool_indices(taps, input_size, *windows).unflatten(0, (info.batch_size, -1)), 0


class AvgPool(Function):
    """``y[n,c,o] = sum_k x[n,c, o*stride - padding + k] / divisor(o)``

    The divisor is the size of the window, with or without the padding in it, or ``divisor_override``.
    Backward: ``dx = avg_pool_backward(dy)``. Linear: forward mode is the operator itself.
    """

    @staticmethod
    def forward(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
        return _avg_pool(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.windows = inputs
        ctx.input_size = list(input.shape)

    @staticmethod
    def backward(ctx, grad_output):
        return avg_pool_backward(grad_output, ctx.input_size, *ctx.windows), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return avg_pool(input_tangent, *ctx.windows)

    @staticmethod
    def vmap(info, in_dims, input, *windows):
        input = batched(input, in_dims[0], info.batch_size).flatten(0, 1)
        return avg_pool(input, *windows).unflatten(0, (info.batch_size, -1)), 0


class AvgPoolBackward(Function):
    """``dx[n,c,i] = sum of dy[n,c,o] / divisor(o) over the windows o that hold i``

    Backward: `AvgPool`. Linear: forward mode is the operator itself.
    """

    @staticmethod
    def forward(grad_output, input_size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
        windows = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        return _avg_pool_backward(grad_output, input_size, *windows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.input_size, *ctx.windows = inputs

    @staticmethod
    def backward(ctx, grad):
        return avg_pool(grad, *ctx.windows), None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        return avg_pool_backward(grad_output_tangent, ctx.input_size, *ctx.windows)

    @staticmethod
    def vmap(info, in_dims, grad_output, input_size, *windows):
        grad_output = batched(grad_output, in_dims[0], info.batch_size).flatten(0, 1)
        input_size = [info.batch_size * input_size[0], *input_size[1:]]
        return avg_pool_backward(grad_output, input_size, *windows).unflatten(0, (info.batch_size, -1)), 0


class AdaptiveAvgPool(Function):
    """The mean over each of ``output_size`` windows, the o-th from ``floor(o*I/O)`` up to ``ceil((o+1)*I/O)``.

    Backward: ``dx = adaptive_avg_pool_backward(dy)``. Linear: forward mode is the operator itself.
    """

    @staticmethod
    def forward(input, output_size):
        return _adaptive_avg_pool(input, output_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.output_size = inputs
        ctx.input_size = list(input.shape)

    @staticmethod
    def backward(ctx, grad_output):
        return adaptive_avg_pool_backward(grad_output, ctx.input_size), None

    @staticmethod
    def jvp(ctx, input_tangent, *_):
        return adaptive_avg_pool(input_tangent, ctx.output_size)

    @staticmethod
    def vmap(info, in_dims, input, output_size):
        input = batched(input, in_dims[0], info.batch_size).flatten(0, 1)
        return adaptive_avg_pool(input, output_size).unflatten(0, (info.batch_size, -1)), 0


class AdaptiveAvgPoolBackward(Function):
    """``dx[n,c,i] = sum of dy[n,c,o] / size(o) over the adaptive windows o that hold i``

    Backward: `AdaptiveAvgPool`. Linear: forward mode is the operator itself.
    """

    @staticmethod
    def forward(grad_output, input_size):
        return _adaptive_avg_pool_backward(grad_output, input_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, ctx.input_size = inputs
        ctx.output_size = list(grad_output.shape[2:])

    @staticmethod
    def backward(ctx, grad):
        return adaptive_avg_pool(grad, ctx.output_size), None

    @staticmethod
    def jvp(ctx, grad_output_tangent, *_):
        return adaptive_avg_pool_backward(grad_output_tangent, ctx.input_size)

    @staticmethod
    def vmap(info, in_dims, grad_output, input_size):
        grad_output = batched(grad_output, in_dims[0], info.batch_size).flatten(0, 1)
        input_size = [info.batch_size * input_size[0], *input_size[1:]]
        return adaptive_avg_pool_backward(grad_output, input_size).unflatten(0, (info.batch_size, -1)), 0


_max_pool = short_way("max_pool")
_adaptive_max_pool = kernel("adaptive_max_pool")
_max_pool_indices = kernel("max_pool_indices")
_max_pool_backward = short_way("max_pool_backward")
_max_pool_gather = kernel("max_pool_gather")
_avg_pool = short_way("avg_pool")
_avg_pool_backward = short_way("avg_pool_backward")
_adaptive_avg_pool = short_way("adaptive_avg_pool")
_adaptive_avg_pool_backward = short_way("adaptive_avg_pool_backward")

max_pool = entry(MaxPool, "max_pool", _max_pool)
adaptive_max_pool = entry(AdaptiveMaxPool, "adaptive_max_pool")
max_pool_indices = entry(MaxPoolIndices, "max_pool_indices")
max_pool_backward = entry(MaxPoolBackward, "max_pool_backward", _max_pool_backward)
max_pool_gather = entry(MaxPoolGather, "max_pool_gather")
avg_pool = entry(AvgPool, "avg_pool", _avg_pool)
avg_pool_backward = entry(AvgPoolBackward, "avg_pool_backward", _avg_pool_backward)
adaptive_avg_pool = entry(AdaptiveAvgPool, "adaptive_avg_pool", _adaptive_avg_pool)
adaptive_avg_pool_backward = entry(AdaptiveAvgPoolBackward, "adaptive_avg_pool_backward", _adaptive_avg_pool_backward)

_functorch_active = torch._C._are_functorch_transforms_active


def wants_taps(input: torch.Tensor) -> bool:
    """Whether a derivative of max pooling `input` may be asked for; if not, no taps need be kept."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if _functorch_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and input.requires_grad
