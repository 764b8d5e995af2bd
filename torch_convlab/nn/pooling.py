"""Pooling layers: the torch.nn ones with this library's forward pass."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional


class _MaxPool:
    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return type(self)._function(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """`torch.nn.MaxPool1d` computed by `torch_convlab.functional.max_pool1d`; same arguments."""

    _function = staticmethod(functional.max_pool1d)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` computed by `torch_convlab.functional.max_pool2d`; same arguments."""

    _function = staticmethod(functional.max_pool2d)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """`torch.nn.MaxPool3d` computed by `torch_convlab.functional.max_pool3d`; same arguments."""

    _function = staticmethod(functional.max_pool3d)


class AvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` computed by `torch_convlab.functional.avg_pool1d`; same arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` computed by `torch_convlab.functional.avg_pool2d`; same arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """`torch.nn.AvgPool3d` computed by `torch_convlab.functional.avg_pool3d`; same arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` computed by `torch_convlab.functional.adaptive_max_pool1d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` computed by `torch_convlab.functional.adaptive_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` computed by `torch_convlab.functional.adaptive_max_pool3d`."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` computed by `torch_convlab.functional.adaptive_avg_pool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` computed by `torch_convlab.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` computed by `torch_convlab.functional.adaptive_avg_pool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool3d(input, self.output_size)


class GlobalAvgPool2d(nn.Module):
    """The mean over height and width (lecture item L12): ``N x C x H x W`` to ``N x C x 1 x 1``.

    Args:
        flatten: return ``N x C`` instead, as a linear layer wants it.
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, input: Tensor) -> Tensor:
        output = functional.adaptive_avg_pool2d(input, 1)
        return output.flatten(-3) if self.flatten else output

    def extra_repr(self) -> str:
        return f"flatten={self.flatten}"
