"""Batch normalization over the batches of all processes, by `torch.distributed`.

Two collectives stand between the kernels. Forward: every process takes mean and variance of its own batch, all gather
them with their counts, and each normalizes its batch by the merged statistics. Backward: every process sums the
gradient and its product with the normalized input, all add these sums, and each subtracts what they say from its own.
Works with gloo on the CPU, where `torch.nn.SyncBatchNorm` refuses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import functional
from . import nn as layers
from ._activation import Clamp, as_clamp
from .functional.normalization import update_running

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]

_ops = torch.ops.convlab
_PLAIN = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d,
)  # fmt: skip
_WITH_RELU = (
    layers.BatchNormReLU1d, layers.BatchNormReLU2d, layers.BatchNormReLU3d,
    layers.BatchNormAddReLU1d, layers.BatchNormAddReLU2d, layers.BatchNormAddReLU3d,
)  # fmt: skip

if dist.is_available():
    # Its default arguments keep the process group there is when it is first imported, which DistributedDataParallel
    # does: the group's threads would outlive destroy_process_group, and abort a process that ends while they free a
    # tensor.
    import torch.distributed.nn.functional


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` on the CPU too: batch norm whose statistics in training are those of all processes.

    No subclass of it, because `torch.nn.parallel.DistributedDataParallel` refuses those on the CPU.

    Equal to a batch norm on the whole batch, whatever part of it each process has, none at all included. Gradients of
    weight and bias are those of this process's part, as `torch.nn.parallel.DistributedDataParallel` expects them. In
    evaluation, or without a process group of more than one process, a plain batch norm. Differentiable once.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group: as in torch.
        relu: let ReLU follow, or another `Clamp`, in the same pass over memory.

    Shape:
        ``N x C`` or ``N x C x ...``; a second input, if given, is added before the ReLU and has the same size.

    Raises:
        ValueError: fewer than two values per channel in all processes together.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group=None, device=None, dtype=None, *,
        relu: bool | Clamp = False,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group, self.relu = process_group, relu

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        momentum = self.momentum if self.momentum is not None else 0.0
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if keeps else (None, None)
        affine = self.weight, self.bias
        if not (self.training and _processes(self.process_group) > 1):
            return functional.batch_norm_fused(
                input, residual, *running, *affine, by_batch, momentum, self.eps, self.relu
            )
        output, mean, variance, count = _SyncBatchNorm.apply(
            input, *affine, residual, as_clamp(self.relu), self.eps, self.process_group
        )
        if running[0] is not None:
            update_running(*running, mean, variance, count.item(), momentum)
        return output

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", relu={self.relu}" if self.relu else "")


def convert_sync_batchnorm(module: nn.Module, process_group=None) -> nn.Module:
    """Make every batch norm of `module` a `SyncBatchNorm`; in place, returns `module`.

    Layers keep their Parameters, buffers and hooks, as under `convert`. Batch norms of torch.nn and of this library are
    taken, those fused with ReLU and addition too; subclasses of them, timm's among them, are left alone.

    Args:
        process_group: among whose processes statistics are taken; None stands for all.
    """
    for layer in module.modules():
        if type(layer) in _PLAIN + _WITH_RELU and "forward" not in vars(layer):
            layer.relu = getattr(layer, "relu", False)
            layer.process_group = process_group
            layer.__class__ = SyncBatchNorm
    return module


def _processes(group) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _SyncBatchNorm(Function):
    """The output, and mean, biased variance and count of the whole batch.

    With ``r = 1/sqrt(variance + eps)``, ``n = (x - mean) * r`` and ``g`` the gradient where the clamp passes, the sums
    S over the whole batch of its N values: ``dx = w*r * (g - S(g)/N - n*S(g*n)/N)``. The kernel of evaluation computes
    ``w*r*g``, and once more, with other weights and the first result for its residual, the rest.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, residual, clamp, eps, group):
        mean, variance, count = _merged(input, group)
        output = _ops.batch_norm_eval(input, weight, bias, mean, variance, residual, *clamp.bounds, eps)
        ctx.save_for_backward(input, weight, bias, mean, variance, residual if clamp.name != "none" else None)
        ctx.clamp, ctx.eps, ctx.group, ctx.count = clamp, eps, group, count
        count = torch.tensor(count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        input, weight, bias, mean, variance, residual = ctx.saved_tensors
        if grad_output is None:  # the collective is still waited for
            grad_output = torch.zeros_like(input)
        scale = torch.ones_like(mean) if weight is None else weight.detach().to(mean.dtype)
        shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype)
        grad_input, grad_weight, grad_bias, grad_residual = _ops.batch_norm_backward(
            grad_output, input, scale, shift, mean, variance, residual, *ctx.clamp.bounds, False, ctx.eps
        )
        sums = torch.stack([grad_weight, grad_bias]).double()
        dist.all_reduce(sums, group=ctx.group)
        factor = scale.double() * torch.rsqrt(variance.double() + ctx.eps) / -ctx.count
        slope, constant = (sums * factor).to(mean.dtype)
        if ctx.needs_input_grad[0]:
            grad_input = _ops.batch_norm_eval(input, slope, constant, mean, variance, grad_input, None, None, ctx.eps)
        if ctx.clamp.name == "none":
            grad_residual = grad_output
        wanted = ctx.needs_input_grad
        return (
            grad_input if wanted[0] else None,
            grad_weight.to(weight.dtype) if wanted[1] else None,
            grad_bias.to(bias.dtype) if wanted[2] else None,
            grad_residual if wanted[3] else None,
            None, None, None,
        )  # fmt: skip


def _merged(input: Tensor, group) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count of the values per channel of all processes; the same bits in each."""
    mean, variance = _ops.batch_norm_statistics(input)
    channels = input.shape[1]
    mine = torch.cat([mean.double(), variance.double(), mean.new_tensor([input.numel() // channels]).double()])
    gathered = [torch.empty_like(mine) for _ in range(_processes(group))]
    dist.all_gather(gathered, mine, group=group)
    means, variances, counts = torch.stack(gathered).split([channels, channels, 1], dim=1)
    count = int(counts.sum().item())
    if count < 2:
        raise ValueError(
            "Expected more than 1 value per channel when training, got "
            f"{count} in all processes together, here of an input of size {tuple(input.shape)}"
        )
    merged_mean = (means * counts).sum(0) / count
    merged_variance = ((variances + (means - merged_mean).square()) * counts).sum(0) / count
    return merged_mean.to(mean.dtype), merged_variance.to(mean.dtype), count
