"""What is attached to a module beside what its class computes."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward, and nothing else."""
    return not has_hooks(module) and "forward" not in vars(module)
