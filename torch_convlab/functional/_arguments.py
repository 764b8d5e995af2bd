"""Argument handling that every function shares: tuples, unbatched inputs, autocast."""

from __future__ import annotations

import operator

import torch

_INTEGERS = (int, torch.SymInt)


def integer(value, name: str):
    """`value` if it is an integer; what stands for one (of numpy, say) becomes one; else TypeError."""
    if isinstance(value, _INTEGERS):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"argument '{name}' must be an integer or integers, but got {name}={value!r}") from None


def expand(value, count: int, name: str = "value") -> list[int]:
    """`value`, one integer or a sequence, as the list the operators take; lengths are checked there."""
    if isinstance(value, int):
        return [value] * count
    if isinstance(value, (list, tuple)):
        values = [item if isinstance(item, int) else integer(item, name) for item in value]
        return values * count if len(values) == 1 else values
    return [integer(value, name)] * count


def check_tensors(**arguments) -> None:
    """Raises TypeError, as torch does, for an argument that is not a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"argument '{name}' must be Tensor, not {type(value).__name__}")


def check_dimensions(name: str, input: torch.Tensor, spatial: int) -> bool:
    """Whether `input` is unbatched; raises unless it is a tensor of spatial+1 (unbatched) or spatial+2 dimensions."""
    if not isinstance(input, torch.Tensor):
        check_tensors(input=input)
    missing = spatial + 2 - input.dim()
    if missing not in (0, 1):
        raise RuntimeError(
            f"Expected {spatial + 1}D (unbatched) or {spatial + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )
    return missing == 1


def autocast(*tensors):
    """The tensors in autocast's dtype where it is on for their device: what torch does for matrix products."""
    if not torch._C._is_any_autocast_enabled():  # a third of what asking for the device's costs
        return tensors
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor):
        keep = tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        return tensor if keep else tensor.to(dtype)

    return tuple(map(cast, tensors))
