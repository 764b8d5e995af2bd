"""Less memory in training: outputs of batch norms are computed again in backward instead of kept.

Autograd keeps both what a batch norm reads, a convolution's output, and what it gives, the next convolution's input.
The second is one pass over the first away, with the statistics that are kept too; by the same kernel from the same
operands it has the same bits. So where a layer saves such an output, a note of how to make it is saved in its place.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_state = threading.local()


class _Recipe:
    """The operands of one batch norm. `depth`: how many batch norms at most are computed to get the output."""

    def __init__(self, input, weight, bias, mean, variance, residual, lower, upper, eps, depth):
        self.operands = input, weight, bias, mean, variance, residual
        self.versions = [operand._version if isinstance(operand, Tensor) else None for operand in self.operands]
        self.rest, self.depth = (lower, upper, eps), depth
        self.waiting = 0  # how many layers have saved the output and not yet asked for it
        self.output = None

    def tensor(self) -> Tensor:
        """The output; kept as long as layers wait for it."""
        from .autograd import batch_norm_eval

        output = self.output
        if output is None:
            for operand, version in zip(self.operands, self.versions):
                if version is not None and operand._version != version:
                    raise RuntimeError(
                        "a batch norm's output cannot be computed again: one of the tensors it was computed from, of "
                        f"size {list(operand.shape)}, has been modified by an inplace operation: it is at version "
                        f"{operand._version}; expected version {version}"
                    )
            input, weight, bias, mean, variance, residual = (
                operand.tensor() if isinstance(operand, _Recipe) else operand for operand in self.operands
            )
            with torch.no_grad():
                output = batch_norm_eval(input, weight, bias, mean, variance, residual, *self.rest)
        self.output = output if self.waiting > 0 else None
        return output


class _Saved:
    """What is saved in place of an output."""

    def __init__(self, recipe: _Recipe):
        self.recipe, self.asked = recipe, False
        recipe.waiting += 1

    def tensor(self) -> Tensor:
        if not self.asked:
            self.asked = True
            self.recipe.waiting -= 1
        return self.recipe.tensor()


class recompute_batch_norm:
    """Context in which layers do not keep outputs of this library's batch norms for their backward passes.

    A layer that saves the output of a batch norm in training (with or without clamp and residual) has it computed again
    when its backward pass asks for it. Outputs and gradients are the same to the bit. A ResNet-50 keeps two
    fifths less for backward, for 5 to 14 % more time (`bench/run.py memory`). Wrap the forward pass; backward may come
    after::

        with torch_convlab.recompute_batch_norm():
            loss = model(images).sum()
        loss.backward()

    Or let `fuse` do it. Where code is compiled by `torch.compile`, which decides such things by itself, this does
    nothing. Transforms of `torch.func` raise, as with all hooks of saved tensors.

    Args:
        depth: how many batch norms at most may be computed for one output. In a chain of residual blocks each block's
            output is the next one's residual; every ``depth + 1``-th is kept.

    Raises:
        ValueError: `depth` is below 1.
        RuntimeError: in backward, if what a batch norm read was changed in place since.
    """

    def __init__(self, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, but got {depth}")
        self.depth = depth
        self.recipes: dict[int, tuple] = {}  # by storage; weak references keep the addresses from being used again

    def __enter__(self):
        self.hooks = None
        if not torch.compiler.is_compiling():
            self.outer = getattr(_state, "active", None)
            _state.active = self
            self.hooks = saved_tensors_hooks(self._pack, self._unpack)
            self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        if self.hooks is not None:
            self.hooks.__exit__(*error)
            _state.active = self.outer
            self.recipes.clear()

    def note(self, output, input, weight, bias, mean, variance, residual, lower, upper, eps) -> None:
        input, residual = (None if t is None else self._recipe(t) or t.detach() for t in (input, residual))
        depth = 1 + max(part.depth if isinstance(part, _Recipe) else 0 for part in (input, residual))
        if depth <= self.depth:
            statistics = mean.detach(), variance.detach()
            recipe = _Recipe(input, weight, bias, *statistics, residual, lower, upper, eps, depth)
            storage = output.untyped_storage()
            self.recipes[storage._cdata] = StorageWeakRef(storage), output._version, recipe, _layout(output)

    def _recipe(self, tensor: Tensor) -> _Recipe | None:
        """How to compute `tensor`, if it is a batch norm's output as it left it."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return None
        reference, version, recipe, layout = self.recipes.get(tensor.untyped_storage()._cdata, (None,) * 4)
        found = recipe is not None and not reference.expired() and version == tensor._version
        return recipe if found and layout == _layout(tensor) else None

    def _pack(self, tensor: Tensor):
        recipe = self._recipe(tensor)
        return tensor if recipe is None else _Saved(recipe)

    @staticmethod
    def _unpack(saved):
        return saved.tensor() if isinstance(saved, _Saved) else saved


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def note(output: Tensor, *operands) -> None:
    """Says how `output` came about: operands of `autograd.batch_norm_eval` that give it again."""
    active = getattr(_state, "active", None)
    if active is not None and output.grad_fn is not None and output.numel() > 0 and not torch.compiler.is_compiling():
        active.note(output, *operands)


class RecomputingGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` whose forward pass runs in `recompute_batch_norm`."""

    def __call__(self, *arguments, **keywords):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().__call__(*arguments, **keywords)
        with recompute_batch_norm():
            return super().__call__(*arguments, **keywords)
