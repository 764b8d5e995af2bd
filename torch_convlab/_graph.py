"""The graph of a model by `torch.fx`, as `fuse` reads it."""

from __future__ import annotations

import inspect
import math
import operator

import torch
from torch import fx, nn

from . import nn as layers
from ._activation import GELU, GELU_TANH, HARDSWISH, RELU, RELU6, SILU, Activation, Clamp
from ._hooks import has_hooks, is_plain
from .nn import timm

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_CLAMPS = (
    torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, nn.functional.relu6, nn.functional.hardtanh,
    nn.functional.hardtanh_, torch.clamp, torch.clamp_, torch.clip, torch.clip_, torch.clamp_min, torch.clamp_min_,
    torch.clamp_max, torch.clamp_max_,
)  # fmt: skip
# Parameters after the input, at their defaults, of those that have bounds; in-place twins have the same.
_BOUNDS = {
    "hardtanh": {"min_val": -1.0, "max_val": 1.0}, "clamp": {"min": None, "max": None},
    "clip": {"min": None, "max": None}, "clamp_min": {"min": None}, "clamp_max": {"max": None},
}  # fmt: skip
_GATES = {nn.SiLU: SILU, nn.functional.silu: SILU, nn.Hardswish: HARDSWISH, nn.functional.hardswish: HARDSWISH}
_GELUS = {"none": GELU, "tanh": GELU_TANH}
_VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _in_place(name: str):
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


class _Proxy(fx.Proxy):
    """Keeps ``a += b`` in place; torch.fx makes it ``a = a + b``, which other names of the tensor do not see."""

    __iadd__, __isub__, __imul__, __itruediv__ = (_in_place(name) for name in ("iadd", "isub", "imul", "itruediv"))


class _Tracer(fx.Tracer):
    """Does not look into our layers, nor into modules with hooks, which must not run on placeholders."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__.startswith(layers.__name__)
        return (
            timm.is_batch_norm(module)
            or (ours and not module._modules)
            or has_hooks(module)
            or super().is_leaf_module(module, name)
        )


def trace(model: nn.Module) -> fx.Graph:
    """The calls of one forward pass. Raises whatever the model's own code raises on placeholders."""
    if "forward" in vars(model):
        raise TypeError("its forward is set on the instance, and torch.fx would trace that of the class")
    return _Tracer().trace(model, concrete_args=_defaults(model))


def _defaults(model: nn.Module) -> dict[str, object]:
    """Arguments of forward that have a default, at that default: a placeholder would take other branches."""
    if isinstance(model, fx.GraphModule):  # has them in its graph already
        return {}
    parameters = inspect.signature(model.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def module_of(node: fx.Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.target) if node.op == "call_module" else None


def is_layer(node: fx.Node, model: nn.Module) -> bool:
    """Whether the node is a layer that returns a tensor of its own, new in every call."""
    kinds = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear
    return isinstance(module_of(node, model), kinds) and not has_hooks(module_of(node, model))


def is_identity(node: fx.Node, model: nn.Module) -> bool:
    module = module_of(node, model)
    nothing = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0 and not module.training)
    return nothing and is_plain(module) and len(node.args) == 1


def activation_of(node: fx.Node, model: nn.Module) -> Activation | None:
    """The activation that the node is, of those that a convolution can compute; None if it is something else."""
    module = module_of(node, model)
    kind = type(module) if module is not None else node.target
    is_gelu = kind in (nn.GELU, nn.functional.gelu)
    if kind not in _GATES and not is_gelu:
        return clamp_of(node, model)
    more = module is not None and not is_plain(module)
    others = (
        not node.args or len(node.args) > 2 - is_gelu or set(node.kwargs) - {"approximate" if is_gelu else "inplace"}
    )
    if more or others or not isinstance(node.args[0], fx.Node):
        return None
    return (
        _GELUS.get(getattr(module, "approximate", node.kwargs.get("approximate", "none"))) if is_gelu else _GATES[kind]
    )


def clamp_of(node: fx.Node, model: nn.Module) -> Clamp | None:
    """The ReLU or other clamp by numbers that the node is; None if it is something else."""
    if node.op == "call_module":
        module = module_of(node, model)
        if not is_plain(module) or len(node.args) != 1:
            return None
        if type(module) is nn.Hardtanh:
            return _clamp("hardtanh", module.min_val, module.max_val)
        return {nn.ReLU: RELU, nn.ReLU6: RELU6}.get(type(module))
    if node.op == "call_function" and node.target in _CLAMPS:
        name = node.target.__name__.rstrip("_")
    elif node.op == "call_method" and node.target.rstrip("_") in ("relu", "clamp", "clip", "clamp_min", "clamp_max"):
        name = node.target.rstrip("_")
    else:
        return None
    if "out" in node.kwargs:
        return None
    if name in ("relu", "relu6"):
        return RELU if name == "relu" else RELU6
    given = {**_BOUNDS[name], **dict(zip(_BOUNDS[name], node.args[1:])), **node.kwargs}
    if name == "hardtanh":
        return _clamp(name, given["min_val"], given["max_val"])
    return _clamp("clamp", given.get("min"), given.get("max"))


def _clamp(name: str, lower, upper) -> Clamp | None:
    """None unless the bounds are numbers: a tensor may be another in every call, and NaN makes everything NaN."""
    bounds = [bound for bound in (lower, upper) if bound is not None]
    if not bounds or not all(isinstance(bound, (int, float)) and not math.isnan(bound) for bound in bounds):
        return None
    return Clamp(*(None if bound is None else float(bound) for bound in (lower, upper)), name)


def is_addition(node: fx.Node) -> bool:
    """Of two tensors, neither scaled."""
    if node.op == "call_function":
        known = node.target in _ADDITIONS
    else:
        known = node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__")
    return known and not node.kwargs and len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)


def written_by(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The argument that the node changes in place, if any."""
    if node.op == "call_module":
        in_place = getattr(module_of(node, model), "inplace", False)
    elif node.op == "call_method":
        in_place = node.target.endswith("_") or node.target.startswith("__i")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        operators = name in ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "setitem", "iand", "ior", "ixor")
        asked = node.kwargs.get("inplace", False) or any(arg is True for arg in node.args)
        in_place = operators or (name.endswith("_") and not name.endswith("__")) or asked
    else:
        return None
    if "out" in node.kwargs:
        return node.kwargs["out"]
    return node.args[0] if in_place and node.args and isinstance(node.args[0], fx.Node) else None


def may_share_memory(first: fx.Node, second: fx.Node, model: nn.Module) -> bool:
    """Whether one may be a view of the other, or both of a third."""
    return bool(_sources(first, model) & _sources(second, model))


def _sources(node: fx.Node, model: nn.Module) -> set[fx.Node]:
    """The nodes whose memory `node` may hold: all that it depends on through what may return its argument."""
    found, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        module = module_of(current, model)
        in_place = getattr(module, "inplace", False)
        if current.op in ("call_function", "call_method") or isinstance(module, _VIEWING) or in_place:
            waiting += current.all_input_nodes
    return found
