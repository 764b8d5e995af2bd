"""timm's batch norm that an activation follows, `timm.layers.BatchNormAct2d`; timm itself is not needed.

Most convolutional networks of timm have it in place of `torch.nn.BatchNorm2d`, of which it is a subclass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys

from torch import Tensor, nn

from .._hooks import is_plain
from .normalization import _BatchNorm


def batch_norms() -> dict[type[nn.Module], type[nn.Module]]:
    """timm's layer and what `convert` makes of it; nothing where timm is not in use."""
    theirs = getattr(sys.modules.get("timm.layers"), "BatchNormAct2d", None)
    return {} if theirs is None else {theirs: _twin(theirs)}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is one of the two, not a subclass."""
    return any(type(module) in pair for pair in batch_norms().items())


def remainder(module: nn.Module) -> nn.Module:
    """What is left when its batch norm has become part of another layer."""
    if type(module.drop) is nn.Identity and is_plain(module.drop):
        return module.act
    left = nn.Sequential(module.drop, module.act)
    left.training = module.training  # of the two, each has its own
    return left


@functools.cache
def _twin(theirs: type[nn.Module]) -> type[nn.Module]:
    class BatchNormAct2d(_BatchNorm, theirs):
        """`timm.layers.BatchNormAct2d` whose batch norm, with the ReLU if that follows, is this library's."""

        @property
        def relu(self) -> bool:
            known = type(self.act) is nn.ReLU and type(self.drop) is nn.Identity
            return known and is_plain(self.act) and is_plain(self.drop)

        def forward(self, input: Tensor) -> Tensor:
            output = self._normalize(input)
            return output if self.relu else self.act(self.drop(output))

    BatchNormAct2d.__qualname__, BatchNormAct2d.__module__ = "BatchNormAct2d", __name__
    return BatchNormAct2d


def __getattr__(name: str):  # pickle looks the class up by its name
    if name == "BatchNormAct2d":
        with contextlib.suppress(ImportError):
            return _twin(importlib.import_module("timm.layers").BatchNormAct2d)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
