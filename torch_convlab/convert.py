"""Swaps the layers of a finished model between torch.nn and this library, in place."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from . import conversion
from . import nn as layers
from .nn import timm


def conversions() -> dict[type[nn.Module], type[nn.Module]]:
    """Every layer of torch.nn, and of timm if that is in use, that `convert` swaps, with the layer it becomes."""
    table = timm.batch_norms()
    for name in layers.__all__:
        ours, theirs = getattr(layers, name), getattr(nn, name, None)
        if theirs is not None and issubclass(ours, theirs):
            table[theirs] = ours
    return table


def convert(
    model: nn.Module,
    example_inputs: Tensor | tuple | None = None,
    *,
    verify: bool | None = None,
    only_if_faster: bool = False,
) -> nn.Module:
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
        example_inputs: what to call the model with (a tuple of arguments, or the one tensor), for the two checks.
        verify: leave out layers whose output or gradients on what `example_inputs` bring them are off; measured
            against float64, and by torch.nn's own error. Default: whether there are `example_inputs`.
        only_if_faster: leave out layers that torch computes faster there: forward, in training mode with backward.
            Timed in turns, one layer at a time, in the memory format in which they are called.

    `torch_convlab.conversion_report` tells for each layer what was done, measured and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: a check is asked for without `example_inputs`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    verify = example_inputs is not None if verify is None else verify
    if not (verify or only_if_faster):
        return _swap(model, conversions())
    if example_inputs is None:
        raise ValueError("verify and only_if_faster need example_inputs, but got None")
    record = conversion.measure(model, example_inputs, verify, only_if_faster)
    setattr(model, conversion.RECORD, record)
    left = {model.get_submodule(name) for name, measured in record.items() if "reason" in measured}
    return _swap(model, conversions(), left)


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: every layer of ours becomes the torch.nn layer of the same name; in place, returns `model`.

    Layers without a twin in torch.nn (the fused ones, such as ``BatchNormReLU2d``) stay, and so do subclasses of ours.
    """
    if isinstance(model, nn.Module):
        vars(model).pop(conversion.RECORD, None)
    return _swap(model, {ours: theirs for theirs, ours in conversions().items()})


def _swap(
    model: nn.Module, table: dict[type[nn.Module], type[nn.Module]], left: Collection[nn.Module] = ()
) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    for module in model.modules():
        target = table.get(type(module))
        if target is not None and "forward" not in vars(module) and module not in left:
            module.__class__ = target
    return model
