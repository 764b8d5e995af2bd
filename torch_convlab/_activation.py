"""Activations that a layer can compute in its last store.

Clamps cut values to an interval: ReLU, ReLU6, Hardtanh and `torch.clamp` by numbers. Gates multiply the value by what
opens with it: SiLU, Hardswish and GELU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Clamp(NamedTuple):
    """Cuts to ``[lower, upper]``, None for no bound; NaN stays.

    Values are the same for every name. Gradients are not: those of ``clamp`` pass at the bounds, those of the others
    (``relu``, ``relu6``, ``hardtanh``) end there.
    """

    lower: float | None
    upper: float | None
    name: str = "hardtanh"
    gate = "none"

    def __str__(self) -> str:
        known = self.name in ("none", "relu", "relu6")
        return self.name if known else f"{self.name}({self.lower}, {self.upper})"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.lower, self.upper


class Gated(NamedTuple):
    """``value * gate(value)``. Cuts nothing.

    SiLU with the gate ``sigmoid``, Hardswish with ``hard_sigmoid``, GELU with ``normal``, the distribution function, or
    ``normal_tanh``, torch's approximation of it by tanh.
    """

    lower: None
    upper: None
    name: str
    gate: str

    def __str__(self) -> str:
        return self.name

    @property
    def bounds(self) -> tuple[None, None]:
        return None, None


Activation = Clamp | Gated

NONE = Clamp(None, None, "none")
RELU = Clamp(0.0, None, "relu")
RELU6 = Clamp(0.0, 6.0, "relu6")
SILU = Gated(None, None, "silu", "sigmoid")
HARDSWISH = Gated(None, None, "hardswish", "hard_sigmoid")
GELU = Gated(None, None, "gelu", "normal")
GELU_TANH = Gated(None, None, "gelu_tanh", "normal_tanh")


def as_activation(relu: bool | Activation) -> Activation:
    """What an argument ``relu`` means: whether ReLU follows, or which other activation."""
    if isinstance(relu, (Clamp, Gated)):
        return relu
    return RELU if relu else NONE


def as_clamp(relu: bool | Clamp) -> Clamp:
    """The same where only a clamp may follow."""
    clamp = as_activation(relu)
    if not isinstance(clamp, Clamp):
        raise ValueError(f"expected relu to be a bool or a Clamp, but got {clamp}")
    return clamp


def apply(activation: Activation, input: Tensor) -> Tensor:
    """By torch, with torch's gradients."""
    if activation.name == "none":
        return input
    if activation.name == "gelu_tanh":
        return nn.functional.gelu(input, approximate="tanh")
    if activation.name in ("relu", "silu", "hardswish", "gelu"):
        return getattr(nn.functional, activation.name)(input)
    if activation.name == "clamp":
        return torch.clamp(input, *activation.bounds)
    return nn.functional.hardtanh(input, *activation.bounds)


def module_of(clamp: Clamp) -> nn.Module:
    """The layer of torch.nn, for a clamp that is one."""
    if clamp.name == "none":
        return nn.Identity()
    if clamp.name == "relu":
        return nn.ReLU()
    return nn.ReLU6() if clamp.name == "relu6" else nn.Hardtanh(*clamp.bounds)
