"""Where a model takes its layers from."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from .. import nn


def choose_layers(layers: ModuleType | None) -> SimpleNamespace:
    """All of torch.nn, with the layers that `layers` (this library's by default) has in place of torch's."""
    layers = nn if layers is None else layers
    ours = {name: getattr(layers, name) for name in getattr(layers, "__all__", ())}
    return SimpleNamespace(**{**vars(torch.nn), **ours})
