"""How a differentiable operator is called, at the least cost that is still right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .. import _C

_functorch_active = torch._C._are_functorch_transforms_active
_has_torch_function = torch.overrides.has_torch_function_variadic
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def kernel(name: str) -> Callable:
    """Return the callable for operator ``convlab::name`` where nothing is to be differentiated.

    `torch.library.register_autograd` puts a Python function in the dispatcher's way, 7 us for finding out just that;
    this passes below it. Not for tensors and modes with a ``__torch_function__``, which may differentiate by their own.
    """
    operator = getattr(torch.ops.convlab, name).default

    def call(*arguments):
        if _has_torch_function(*arguments):
            return operator(*arguments)
        with _BelowAutograd():
            return operator(*arguments)

    return call


def short_way(name: str) -> Callable:
    """`kernel`, but past the dispatcher (csrc/python_call.cpp) where nothing else has a say in the call."""
    short, usual = getattr(_C, name), kernel(name)

    def call(*arguments):
        result = short(*arguments)
        return usual(*arguments) if result is NotImplemented else result

    return call


def entry(function: type[torch.autograd.Function], name: str, bare: Callable | None = None) -> Callable:
    """Return the callable for `function`, the `torch.autograd.Function` of operator ``convlab::name``.

    The Function's arguments are the operator's, in the schema's order. Four ways lead to the kernel:

    - while compiling or exporting, the operator itself, whose autograd formula (`torch.library.register_autograd`)
      is the Function's own ``setup_context`` and ``backward``;
    - under a functorch transform, ``Function.apply``, which knows vmap, jvp and nesting;
    - when a gradient or a forward-mode tangent is wanted, the C++ apply below it: the Python one only adds the
      binding of default arguments, 15 us of it;
    - otherwise `bare`, by default the `kernel`, which the Function's ``forward`` calls too.
    """
    operator = getattr(torch.ops.convlab, name).default
    bare = bare or kernel(name)
    torch.library.register_autograd(operator, function.backward, setup_context=function.setup_context)
    apply = super(torch.autograd.Function, function).apply
    python_apply = function.apply
    is_tensor = torch.Tensor

    def call(*arguments):
        if torch.compiler.is_compiling():
            return operator(*arguments)
        if _functorch_active():
            return python_apply(*arguments)
        if forward_ad._current_level >= 0:
            return apply(*arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, is_tensor) and argument.requires_grad:
                    return apply(*arguments)
        return bare(*arguments)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = function.__doc__
    return call


def only_autograd() -> bool:
    """Whether a derivative can be wanted by reverse mode alone, in eager mode."""
    return not torch.compiler.is_compiling() and not _functorch_active() and forward_ad._current_level < 0


def batched(value, in_dim, batch_size: int):
    """`value` with its vmapped dimension in front, expanded if it has none; None stays None."""
    if value is None:
        return None
    return value.movedim(in_dim, 0) if in_dim is not None else value.expand(batch_size, *value.shape)


def vmap_by_loop(call: Callable) -> Callable:
    """A vmap rule that computes one example at a time: right for every operator, batched for none."""

    def rule(info, in_dims, *arguments):
        def example(index):
            return [
                value.select(dim, index) if isinstance(value, torch.Tensor) and dim is not None else value
                for value, dim in zip(arguments, in_dims)
            ]

        results = [call(*example(index)) for index in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results))
        return stacked, tuple(None if part is None else 0 for part in stacked)

    return rule


def add(first, second):
    """Sum of two tensors either of which may be None, the symbolic zero of autograd."""
    if first is None or second is None:
        return second if first is None else first
    return first + second
