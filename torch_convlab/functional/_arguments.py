"""Argument handling that every function shares: tuples, unbatched inputs, autocast."""

from __future__ import annotations

import torch


def expand(value, count: int) -> list[int]:
    """`value`, one integer or a sequence, as the list the operators take; lengths are checked there."""
    if isinstance(value, (list, tuple)):
        return list(value) * count if len(value) == 1 else list(value)
    return [value] * count


def check_dimensions(name: str, input: torch.Tensor, spatial: int) -> bool:
    """Whether `input` is unbatched; raises unless it has spatial+1 (unbatched) or spatial+2 dimensions."""
    if input.dim() not in (spatial + 1, spatial + 2):
        raise RuntimeError(
            f"Expected {spatial + 1}D (unbatched) or {spatial + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )
    return input.dim() == spatial + 1


def autocast(*tensors):
    """The tensors in autocast's dtype where it is on for their device: what torch does for matrix products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor):
        keep = tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
        return tensor if keep else tensor.to(dtype)

    return tuple(map(cast, tensors))
