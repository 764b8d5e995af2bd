"""Convolution layers: the torch.nn ones with this library's forward pass."""

from __future__ import annotations

import torch
from torch import nn

from .. import functional


class _Convolution:
    """Replaces the one method in which the three torch.nn layers compute; `algorithm` may be set per layer."""

    algorithm: str = "auto"

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            mode = self.padding_mode
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        return type(self)._function(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, algorithm=self.algorithm
        )


class Conv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` computed by `torch_convlab.functional.conv1d`; same arguments, same state_dict."""

    _function = staticmethod(functional.conv1d)


class Conv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` computed by `torch_convlab.functional.conv2d`; same arguments, same state_dict."""

    _function = staticmethod(functional.conv2d)


class Conv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` computed by `torch_convlab.functional.conv3d`; same arguments, same state_dict."""

    _function = staticmethod(functional.conv3d)


class _TransposedConvolution:
    algorithm: str = "auto"

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        spatial = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return type(self)._function(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation,
            algorithm=self.algorithm,
        )  # fmt: skip


class ConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` computed by `torch_convlab.functional.conv_transpose1d`."""

    _function = staticmethod(functional.conv_transpose1d)


class ConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` computed by `torch_convlab.functional.conv_transpose2d`."""

    _function = staticmethod(functional.conv_transpose2d)


class ConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` computed by `torch_convlab.functional.conv_transpose3d`."""

    _function = staticmethod(functional.conv_transpose3d)
