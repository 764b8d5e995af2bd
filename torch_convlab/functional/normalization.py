"""Normalizations with the signatures of `torch.nn.functional`, and batch norm fused with ReLU and residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from .. import autograd as ops
from .._activation import Clamp, as_clamp
from ..recompute import note


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Batch normalization, as `torch.nn.functional.batch_norm` (lecture items L14 and L15).

    Args:
        input: ``N x C`` or ``N x C x ...``; float32, float64, bfloat16 or float16.
        running_mean, running_var: ``C``, or None. Read in evaluation; in training updated to
            ``(1 - momentum) * running + momentum * batch``, where the batch's variance is the unbiased one.
        weight, bias: ``C``, of the input's type or float32 for 16-bit inputs; None stands for ones and zeros.
        training: normalize by the statistics of the batch.

    Returns:
        ``(input - mean) / sqrt(var + eps) * weight + bias``, in the input's type and memory format.

    Raises:
        ValueError: one value per channel in training; eps not positive in training, or negative.
        RuntimeError: sizes or types that do not fit; no running statistics in evaluation.
    """
    return batch_norm_fused(input, None, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_relu(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(...))`` in one pass over memory; its backward keeps no output. See `batch_norm`."""
    return batch_norm_fused(input, None, running_mean, running_var, weight, bias, training, momentum, eps, True)


def batch_norm_add_relu(
    input: Tensor, residual: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(input, ...) + residual)`` in one pass, the end of a residual block. See `batch_norm`.

    Args:
        residual: of the input's size and type.
    """
    return batch_norm_fused(input, residual, running_mean, running_var, weight, bias, training, momentum, eps, True)


def batch_norm_fused(
    input: Tensor, residual: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5, relu: bool | Clamp = False,
) -> Tensor:  # fmt: skip
    """``relu(batch_norm(input, ...) + residual)``, each part if asked for, in one pass. See `batch_norm`.

    Args:
        residual: of the input's size and type, or None.
        relu: whether ReLU comes last, or which other `Clamp`: one at whose bounds gradients end.
    """
    clamp = as_clamp(relu)
    if clamp.name == "clamp":
        raise ValueError("gradients pass at the bounds of torch.clamp, which batch norm's backward cannot tell apart")
    _check_running(input, running_mean, running_var)
    if eps < 0 or (training and eps == 0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {wanted}, but got {eps}")
    if not training:
        if running_mean is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        return ops.batch_norm_eval(input, weight, bias, running_mean, running_var, residual, *clamp.bounds, float(eps))
    mark = residual is not None and torch.is_grad_enabled()  # worth it where a backward follows
    output, mean, variance, _ = ops.batch_norm_train(input, weight, bias, residual, *clamp.bounds, float(eps), mark)
    note(output, input, weight, bias, mean, variance, residual, *clamp.bounds, float(eps))
    if running_mean is not None and input.numel() > 0:
        update_running(running_mean, running_var, mean, variance, input.numel() // input.shape[1], momentum)
    return output


def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Instance normalization, as `torch.nn.functional.instance_norm`: statistics of every sample and channel.

    Args:
        input: ``N x C x ...``.
        running_mean, running_var: ``C``, or None; updated from the mean over the samples if `use_input_stats`,
            else read.

    Raises:
        ValueError: one spatial element with `use_input_stats`.
        RuntimeError: as `batch_norm`.
    """
    _check_running(input, running_mean, running_var)
    if not use_input_stats:
        if running_mean is None:
            raise RuntimeError("Expected running_mean and running_var to be defined when use_input_stats is false")
        return ops.batch_norm_eval(input, weight, bias, running_mean, running_var, None, None, None, float(eps))
    pixels = _product(input.shape[2:])
    if pixels == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.shape}")
    if eps <= 0:
        raise ValueError(f"instance_norm eps must be positive during training, but got {eps}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {vector.numel()}")
    if input.numel() == 0:  # of no channels or no samples
        return ops.batch_norm_train(input, weight, bias, None, None, None, float(eps), False)[0]
    output, mean, variance = ops.group_norm(input, weight, bias, input.shape[1], float(eps))
    if running_mean is not None:
        update_running(running_mean, running_var, mean.mean(0), variance.mean(0), pixels, momentum)
    return output


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Group normalization, as `torch.nn.functional.group_norm`: statistics of every sample and group of channels.

    Args:
        input: ``N x C x ...`` with C divisible by `num_groups`.
        weight, bias: ``C``, of the input's type or float32 for 16-bit inputs; None stands for ones and zeros.

    Returns:
        In the input's type and memory format.

    Raises:
        RuntimeError: sizes or types that do not fit. ValueError: one value per group and sample in all.
    """
    if input.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    if num_groups > 0:
        size = [input.shape[0] * input.shape[1] // num_groups, num_groups, *input.shape[2:]]
        if size[0] * _product(size[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    return ops.group_norm(input, weight, bias, num_groups, float(eps))[0]


def layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Layer normalization, as `torch.nn.functional.layer_norm`: statistics over the trailing `normalized_shape`.

    Args:
        input: ``* x normalized_shape``.
        weight, bias: of `normalized_shape`, in the input's type or float32 for 16-bit inputs, or None.

    Returns:
        Contiguous, in the input's type.

    Raises:
        RuntimeError: sizes or types that do not fit. TypeError: `normalized_shape` is not a sequence.
    """
    if isinstance(normalized_shape, int):
        raise TypeError("layer_norm(): argument 'normalized_shape' (position 2) must be tuple of ints, not int")
    return ops.layer_norm(input, weight, bias, list(normalized_shape), float(eps))[0]


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """RMS normalization, as `torch.nn.functional.rms_norm`: ``input / sqrt(mean(input^2) + eps) * weight``.

    Args:
        input: ``* x normalized_shape``; the mean is over the trailing `normalized_shape`.
        weight: of `normalized_shape`, in the input's type or float32 for 16-bit inputs, or None.
        eps: None stands for the machine epsilon of the type that is computed in (float32 for 16-bit inputs).

    Returns:
        Contiguous, in the input's type.

    Raises:
        RuntimeError: sizes or types that do not fit. TypeError: `normalized_shape` is not a sequence.
    """
    if isinstance(normalized_shape, int):
        raise TypeError("rms_norm(): argument 'normalized_shape' (position 2) must be tuple of ints, not int")
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return ops.rms_norm(input, weight, list(normalized_shape), float(eps))[0]


def _product(sizes) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _check_running(input, running_mean, running_var) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None or input.dim() < 2:
        return
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running.numel() != input.shape[1]:
            raise RuntimeError(f"{name} should contain {input.shape[1]} elements not {running.numel()}")


def update_running(running_mean, running_var, mean, variance, count, momentum) -> None:
    """Moves the running averages toward the batch's mean and its unbiased variance, from `count` values each."""
    arguments = running_mean, running_var, mean, variance, count, momentum
    if torch.compiler.is_compiling() or _C.update_running(*arguments) is NotImplemented:
        _update_running(*arguments)


@torch.no_grad()
def _update_running(running_mean, running_var, mean, variance, count, momentum) -> None:
    running_mean.mul_(1 - momentum).add_(mean.detach(), alpha=momentum)
    running_var.mul_(1 - momentum).add_(variance.detach(), alpha=momentum * (count / (count - 1)))
