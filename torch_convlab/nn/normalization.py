"""Normalization layers: the torch.nn ones with this library's forward pass, and batch norm fused with ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .._activation import RELU, Clamp


class _BatchNorm:
    """Replaces the forward pass of the torch.nn batch norms, keeping what depends on train and eval mode.

    `relu` says whether ReLU follows, or which other `Clamp`.
    """

    relu: bool | Clamp = False

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input)

    def _normalize(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        # Without running statistics the batch's own are used in evaluation too.
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracks = self.track_running_stats and self.training
        momentum = self.momentum if self.momentum is not None else 0.0
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        mean, variance = (self.running_mean, self.running_var) if keeps else (None, None)
        return functional.batch_norm_fused(
            input, residual, mean, variance, self.weight, self.bias, by_batch, momentum, self.eps, self.relu
        )

    def extra_repr(self) -> str:
        other = isinstance(self.relu, Clamp) and self.relu != RELU
        return super().extra_repr() + (f", relu={self.relu}" if other else "")


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` computed by `torch_convlab.functional.batch_norm`; same arguments, same state_dict."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` computed by `torch_convlab.functional.batch_norm`; same arguments, same state_dict."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` computed by `torch_convlab.functional.batch_norm`; same arguments, same state_dict."""


class BatchNormReLU1d(BatchNorm1d):
    """`BatchNorm1d` followed by ReLU, or another clamp as `relu` says, in one pass; same arguments and state_dict."""

    relu = True


class BatchNormReLU2d(BatchNorm2d):
    """`BatchNorm2d` followed by ReLU, or another clamp as `relu` says, in one pass; same arguments and state_dict."""

    relu = True


class BatchNormReLU3d(BatchNorm3d):
    """`BatchNorm3d` followed by ReLU, or another clamp as `relu` says, in one pass; same arguments and state_dict."""

    relu = True


class _BatchNormAddReLU:
    relu = True

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self._normalize(input, residual)


class BatchNormAddReLU1d(_BatchNormAddReLU, BatchNorm1d):
    """``relu(batch_norm(input) + residual)`` in one pass, the end of a residual block."""


class BatchNormAddReLU2d(_BatchNormAddReLU, BatchNorm2d):
    """``relu(batch_norm(input) + residual)`` in one pass, the end of a residual block."""


class BatchNormAddReLU3d(_BatchNormAddReLU, BatchNorm3d):
    """``relu(batch_norm(input) + residual)`` in one pass, the end of a residual block."""


class _InstanceNorm:
    """Replaces the one method in which the torch.nn instance norms compute."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        by_input = self.training or not self.track_running_stats
        momentum = self.momentum if self.momentum is not None else 0.0
        return functional.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_input, momentum, self.eps
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` computed by `torch_convlab.functional.instance_norm`."""


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` computed by `torch_convlab.functional.instance_norm`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` computed by `torch_convlab.functional.instance_norm`."""


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` computed by `torch_convlab.functional.group_norm`; same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` computed by `torch_convlab.functional.layer_norm`; same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` computed by `torch_convlab.functional.rms_norm`; same arguments, same state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)
