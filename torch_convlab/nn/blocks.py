"""Layers that usually come together."""

from __future__ import annotations

from torch import Tensor, nn

from .convolution import Conv2d
from .normalization import BatchNormReLU2d


class ConvBNReLU2d(nn.Module):
    """``relu(batch_norm(conv(input)))``: a `Conv2d` without bias as ``conv``, a `BatchNormReLU2d` as ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: of the convolution;
            padding None keeps the size at stride 1 (lecture item L4).
        eps, momentum: of the batch norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=None, dilation=1, groups: int = 1,
        padding_mode: str = "zeros", eps: float = 1e-5, momentum: float | None = 0.1, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if padding is None:
            kernel, step = nn.modules.utils._pair(kernel_size), nn.modules.utils._pair(dilation)
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, step))
        factory = {"device": device, "dtype": dtype}
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, **factory
        )
        self.bn = BatchNormReLU2d(out_channels, eps, momentum, **factory)

    def forward(self, input: Tensor) -> Tensor:
        return self.bn(self.conv(input))
