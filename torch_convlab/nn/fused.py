"""A convolution or a linear layer with what follows it, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C, functional
from .._activation import Activation, apply, as_activation


class _KeepsWeight(nn.Module):
    """A layer's parameters, and its weight in the order in which the kernel reads it: see `ConvAddReLU`."""

    def __init__(self, layer: nn.Module, relu: bool | Activation):
        super().__init__()
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"expected a layer whose weight is a Parameter, but got {layer!r}")
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)  # None, too
        self.relu = as_activation(relu)
        self.training = layer.training
        self._kept = _C.KeptWeight()

    def train(self, mode: bool = True):
        self._kept = _C.KeptWeight()
        return super().train(mode)

    def __getstate__(self):
        return {**self.__dict__, "_kept": _C.KeptWeight()}


class ConvAddReLU(_KeepsWeight):
    """``relu(conv(input) + residual)`` in one pass over the output; `torch_convlab.fuse` makes these.

    In eval mode, where no gradient is wanted, the weight is kept in the order in which the kernel reads it: a second
    copy (for winograd, four times a 3x3 kernel), made at the first call, made anew when the weight's version, its
    memory, the input's size or the settings of `torch_convlab.backends` change, and freed with the module or by
    ``train()``. In-place changes that autograd does not count (``weight.data.mul_()``) are not seen: assign to the
    parameter, or call ``train().eval()``.

    Args:
        conv: a `torch.nn.Conv1d`, `Conv2d` or `Conv3d` that pads with zeros; its parameters are shared.
        relu: whether a ReLU comes last, or which other activation: a clamp, SiLU, Hardswish or GELU.

    Shape:
        As `conv`; the second input, if given, is added and has the output's size.
    """

    def __init__(self, conv: nn.Module, relu: bool | Activation = False):
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or conv.padding_mode != "zeros":
            raise ValueError(f"expected conv to be a Conv1d, Conv2d or Conv3d that pads with zeros, but got {conv!r}")
        super().__init__(conv, relu)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.algorithm = getattr(conv, "algorithm", "auto")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # Past Module.__getattr__, which costs more than anything else here.
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        packed = None
        if not torch.compiler.is_compiling():
            kept = None if self.training else self._kept
            output = _C.convolution(
                weight.dim() - 2, input, weight, bias, residual, kept, *self.relu.bounds,
                self.stride, self.padding, self.dilation, self.groups, self.algorithm, self.relu.gate,
            )  # fmt: skip
            if output is not NotImplemented:
                return output
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
                packed = _C.packed_weight(
                    kept, input, weight, self.stride, self.padding, self.dilation, self.groups, self.algorithm
                )
        return functional.conv_fused(
            input, weight, bias, residual, self.relu, self.stride, self.padding, self.dilation, self.groups,
            algorithm=self.algorithm, packed=packed,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.weight.shape[1] * self.groups}, {self.weight.shape[0]}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("stride", "padding", "dilation", "groups", "relu")]
        return ", ".join(parts)


class LinearAddReLU(_KeepsWeight):
    """``relu(linear(input) + residual)`` in one pass over the output; `torch_convlab.fuse` makes these.

    The weight is kept as in `ConvAddReLU`.

    Args:
        linear: a `torch.nn.Linear`; its parameters are shared.
        relu: whether a ReLU comes last, or which other activation: a clamp, SiLU, Hardswish or GELU.

    Shape:
        As `linear`; the second input, if given, is added: by torch, if it broadcasts, has another dtype or is a number.
    """

    def __init__(self, linear: nn.Module, relu: bool | Activation = False):
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"expected linear to be a Linear, but got {linear!r}")
        super().__init__(linear, relu)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        fits = residual is None or (isinstance(residual, Tensor) and residual.dtype == input.dtype)
        if fits and not torch.compiler.is_compiling():
            kept = None if self.training else self._kept
            output = _C.linear(input, weight, bias, residual, kept, *self.relu.bounds, self.relu.gate)
            if output is not NotImplemented:
                return output
        output = functional.linear(input, weight, bias)
        return apply(self.relu, output if residual is None else output + residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, relu={self.relu}"
