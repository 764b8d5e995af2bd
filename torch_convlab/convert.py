"""Swaps the layers of a finished model between torch.nn and this library, in place."""

from __future__ import annotations

from torch import nn

from . import nn as layers


def conversions() -> dict[type[nn.Module], type[nn.Module]]:
    """Every torch.nn layer that `convert` swaps, with the layer it becomes."""
    table = {}
    for name in layers.__all__:
        ours, theirs = getattr(layers, name), getattr(nn, name, None)
        if theirs is not None and issubclass(ours, theirs):
            table[theirs] = ours
    return table


def convert(model: nn.Module) -> nn.Module:
    """Let this library compute every layer of `model` that it has; changes `model` in place and returns it.

    A layer keeps its identity and becomes an instance of our subclass, which replaces the forward pass alone. So
    Parameters (and optimizers that hold them), buffers, hooks, the train flag, the state_dict and the layer's place
    in the model stay; a layer used in several places is swapped once, for all of them. `revert` undoes it.

    Left alone, because replacing their forward pass could change what they compute:

    - subclasses of torch.nn layers, which may override anything. Among them are layers under
      `torch.nn.utils.parametrize` (it changes the layer's class; convert first, parametrize afterwards) and lazy
      layers before their first call (`torch.nn.LazyConv2d` becomes a `torch.nn.Conv2d`, and convertible, with it);
    - layers whose instance has a ``forward`` of its own (``layer.forward = ...``);
    - layers inside a scripted or exported model, which are compiled already. Convert before `torch.compile`.

    Args:
        model: any module, also a single layer.

    Raises:
        TypeError: `model` is no module.
    """
    return _swap(model, conversions())


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of ours becomes the torch.nn layer of the same name; in place, returns `model`.

    Layers without a twin in torch.nn (the fused ones, such as ``BatchNormReLU2d``) stay, and so do subclasses of ours.
    """
    return _swap(model, {ours: theirs for theirs, ours in conversions().items()})


def _swap(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    for module in model.modules():
        target = table.get(type(module))
        if target is not None and "forward" not in vars(module):
            module.__class__ = target
    return model
