"""Activations that cut values to an interval: ReLU, ReLU6, Hardtanh and `torch.clamp` by numbers."""

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

    def __str__(self) -> str:
        known = self.name in ("none", "relu", "relu6")
        return self.name if known else f"{self.name}({self.lower}, {self.upper})"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.lower, self.upper


NONE = Clamp(None, None, "none")
RELU = Clamp(0.0, None, "relu")
RELU6 = Clamp(0.0, 6.0, "relu6")


def as_clamp(relu: bool | Clamp) -> Clamp:
    """What an argument ``relu`` means: whether ReLU follows, or which other `Clamp`."""
    if isinstance(relu, Clamp):
        return relu
    return RELU if relu else NONE


def apply(clamp: Clamp, input: Tensor) -> Tensor:
    """By torch, with torch's gradients."""
    if clamp.name == "none":
        return input
    if clamp.name == "relu":
        return torch.relu(input)
    if clamp.name == "clamp":
        return torch.clamp(input, *clamp.bounds)
    return nn.functional.hardtanh(input, *clamp.bounds)


def module_of(clamp: Clamp) -> nn.Module:
    """The layer of torch.nn, for a clamp that is one."""
    if clamp.name == "none":
        return nn.Identity()
    if clamp.name == "relu":
        return nn.ReLU()
    return nn.ReLU6() if clamp.name == "relu6" else nn.Hardtanh(*clamp.bounds)
