"""Lets a convolution or batch norm compute the addition and the ReLU that follow it, by rewriting the model's graph.

A chain is a layer, called once, followed by an addition, a ReLU or both, each the only reader of what comes before it.
In place of the ReLU there may be another clamp, ReLU6, Hardtanh or `torch.clamp` by numbers, and behind convolutions
and linear layers a gate, SiLU, Hardswish or GELU. These take chains in eval mode, `nn.ConvAddReLU` and
`nn.LinearAddReLU`, batch norms in either mode, `nn.BatchNormReLU2d` and `nn.BatchNormAddReLU2d` (of any dimension).
Only this library's layers do: fusing does not change who computes.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from . import nn as layers
from ._activation import NONE, Activation, as_clamp, module_of
from ._fold import PRODUCERS
from ._graph import activation_of, clamp_of, is_addition, is_identity, may_share_memory, written_by
from ._hooks import has_hooks
from .convert import conversions

_PRODUCTS = {
    layers.Conv1d: layers.ConvAddReLU,
    layers.Conv2d: layers.ConvAddReLU,
    layers.Conv3d: layers.ConvAddReLU,
    layers.Linear: layers.LinearAddReLU,
}
_BATCH_NORMS = {
    layers.BatchNorm1d: (layers.BatchNormReLU1d, layers.BatchNormAddReLU1d),
    layers.BatchNorm2d: (layers.BatchNormReLU2d, layers.BatchNormAddReLU2d),
    layers.BatchNorm3d: (layers.BatchNormReLU3d, layers.BatchNormAddReLU3d),
}
_ADDING = {adding: plain for plain, (_, adding) in _BATCH_NORMS.items()}


def separate(model: nn.Module, graph: fx.Graph) -> fx.GraphModule | None:
    """The model with what its batch norms took in training as nodes again, for the convolutions before them to take.

    None if no batch norm adds. The result shares Parameters and buffers, but no layer that folding changes.
    """
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    adding = [node for node in nodes if type(model.get_submodule(node.target)) in _ADDING and len(node.args) == 2]
    if not adding or any(has_hooks(model.get_submodule(node.target)) for node in adding):
        return None
    result = fx.GraphModule(model, graph, class_name=type(model).__name__)
    for node in nodes:
        if isinstance(model.get_submodule(node.target), (*PRODUCERS, nn.modules.batchnorm._BatchNorm)):
            result.set_submodule(node.target, _shallow_copy(model.get_submodule(node.target)))
    for node in adding:
        norm = result.get_submodule(node.target)
        clamp, activation = as_clamp(norm.relu), f"{node.target}_activation"
        norm.__class__ = _ADDING[type(norm)]
        norm.relu = False
        result.add_submodule(activation, module_of(clamp).eval())
        with result.graph.inserting_before(node):
            normalized = result.graph.call_module(node.target, node.args[:1])
            total = result.graph.call_function(operator.add, (normalized, node.args[1]))
            node.replace_all_uses_with(result.graph.call_module(activation, (total,)))
        result.graph.erase_node(node)
    result.recompile()
    return _with_mode_of(model, result)


@dataclass(frozen=True)
class Epilogue:
    """What follows a layer: `parts` such as "add" and "relu6". `reason` is empty if the layer computes them itself."""

    layer: str
    parts: tuple[str, ...]
    reason: str

    @property
    def fused(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        parts = " and ".join(self.parts)
        return f"{self.layer}: with {parts}" if self.fused else f"{self.layer}: not with {parts}, {self.reason}"


@dataclass
class Chain:
    """The nodes of one chain, the layer's first; without any parts the layer may still keep its weight packed."""

    nodes: list[fx.Node]
    added: bool = False
    activation: Activation = NONE
    reason: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("add",) * self.added + (str(self.activation),) * (self.activation is not NONE)

    @property
    def residual(self) -> fx.Node | None:
        """What is added, as the graph has it now."""
        for before, node in itertools.pairwise(self.nodes):
            if is_addition(node):
                return node.args[1] if node.args[0] is before else node.args[0]
        return None

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.nodes[0].target, self.parts, self.reason)


def find(model: nn.Module, graph: fx.Graph) -> list[Chain]:
    """The chains of the model; where two layers want the same addition, the later one has it.

    Where nodes have sizes (`torch.fx.passes.shape_prop`), an addition that broadcasts is refused.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    shared = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    chains, taken = [], set()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_module":
            continue
        module = model.get_submodule(node.target)
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.modules.batchnorm._BatchNorm)):
            continue
        chain = _follow(node, model, taken)
        single = calls[node.target] == 1 and shared[id(module)] == 1
        refusal = _refusal(module, node, model, single)
        chain.reason = chain.reason or refusal or _hazard(chain, model, graph, place)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and chain.activation.name == "clamp":
            chain.reason = chain.reason or "gradients pass at the bounds of torch.clamp"
        if chain.parts or (not chain.reason and type(module) in _PRODUCTS):
            chains.append(chain)
        if chain.reason and not refusal and type(module) in _PRODUCTS:
            chains.append(Chain([node]))  # on its own it keeps its weight packed
        if not chain.reason:
            taken.update(chain.nodes)
    return chains[::-1]


def _follow(head: fx.Node, model: nn.Module, taken: set[fx.Node]) -> Chain:
    chain, current = Chain([head]), head
    known = clamp_of if isinstance(model.get_submodule(head.target), nn.modules.batchnorm._BatchNorm) else activation_of
    while chain.activation is NONE:
        readers = list(current.users)
        if len(readers) != 1:
            wanted = [reader for reader in readers if known(reader, model) or is_addition(reader)]
            if wanted and not chain.parts:
                activation = known(wanted[0], model)
                chain.added, chain.activation = activation is None, activation or NONE
                chain.reason = f"the output of {_name(current)} is read elsewhere too"
            break
        reader = readers[0]
        activation = known(reader, model)
        if reader in taken:
            break
        if activation is not None:
            chain.activation = activation
        elif is_addition(reader) and not chain.added:
            other = reader.args[1] if reader.args[0] is current else reader.args[0]
            if other is current:
                break
            chain.added = True
            written = written_by(reader, model)
            if written is other:
                chain.reason = "the sum is written over its other operand"
                break
            if written is current and isinstance(model.get_submodule(head.target), nn.Linear):
                chain.reason = "the sum is written over its output"  # and has its size and dtype, whatever is added
                break
        elif not is_identity(reader, model):
            break
        chain.nodes.append(reader)
        current = reader
    return chain


def _name(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name


def _refusal(module: nn.Module, node: fx.Node, model: nn.Module, single: bool) -> str:
    """Why the layer cannot take what follows it."""
    kind = type(module)
    if kind not in _PRODUCTS and kind not in _BATCH_NORMS:
        plain = kind in conversions()
        return "it is computed by torch: convert() the model first" if plain else f"its type is {kind.__name__}"
    if not single:
        return "it is called several times"
    if has_hooks(module):
        return "it has hooks"
    if "forward" in vars(module):
        return "it has a forward of its own"
    if node.kwargs or len(node.args) != 1:
        return "it is called with keywords"
    if kind in _PRODUCTS and (module.training or model.training):
        return f"it is a {'linear layer' if kind is layers.Linear else 'convolution'} in training mode"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"it pads with padding_mode={module.padding_mode!r}"
    return ""


def _hazard(chain: Chain, model: nn.Module, graph: fx.Graph, place: dict[fx.Node, int]) -> str:
    """The layer will be computed at the end of its chain: what it reads and what is added must not change before."""
    head, last, own = chain.nodes[0], chain.nodes[-1], set(chain.nodes)
    residual, addition = chain.residual, next((node for node in chain.nodes if is_addition(node)), last)
    if residual is not None:
        sizes = [node.meta.get("tensor_meta") for node in (head, residual)]
        if None not in sizes and (sizes[0].shape != sizes[1].shape or sizes[0].dtype != sizes[1].dtype):
            return "what is added has another size or dtype"
    for node in graph.nodes:
        if place[head] < place[node] < place[last] and node not in own:
            written = written_by(node, model)
            if written is not None and may_share_memory(written, head.args[0], model):
                return f"{_name(node)} may change its input before the end"
            late = place[node] > place[addition] and written is not None and residual is not None
            if late and may_share_memory(written, residual, model):
                return f"{_name(node)} may change what is added before the end"
    return ""


def apply(model: nn.Module, graph: fx.Graph, chains: list[Chain], kind=fx.GraphModule) -> fx.GraphModule:
    """A module that computes the chains as single layers, sharing the other layers and all Parameters with `model`."""
    fused = kind(model, graph, class_name=type(model).__name__)
    for chain in chains:
        head, last = chain.nodes[0], chain.nodes[-1]
        fused.set_submodule(head.target, _replacement(model.get_submodule(head.target), chain))
        with fused.graph.inserting_before(last):
            residual = chain.residual
            node = fused.graph.call_module(head.target, head.args if residual is None else (*head.args, residual))
        last.replace_all_uses_with(node)
        for old in reversed(chain.nodes):
            fused.graph.erase_node(old)
    fused.graph.lint()
    fused.delete_all_unused_submodules()
    _reach_layers_directly(fused.graph)
    fused.recompile()
    return _with_mode_of(model, fused)


def _reach_layers_directly(graph: fx.Graph) -> None:
    """Has the code of the graph read ``_modules``, not attributes: `nn.Module.__getattr__` takes long, per level."""
    layers = {}
    for node in graph.find_nodes(op="call_module"):
        path, direct = "self", "self"
        for name in node.target.split("."):
            path = f"{path}.{name}" if name.isidentifier() else f'getattr({path}, "{name}")'
            direct = f'{direct}._modules["{name}"]'
        layers[f" = {path}("] = f" = {direct}("

    def transform(line: str) -> str:
        for path, direct in layers.items():
            if path in line:
                return line.replace(path, direct)
        return line

    graph.on_generate_code(lambda previous: lambda lines: [transform(line) for line in lines])


def _with_mode_of(model: nn.Module, made: fx.GraphModule) -> fx.GraphModule:
    """The containers that fx makes are in training mode."""
    own = {id(module) for module in model.modules()}
    for module in made.modules():
        if id(module) not in own and type(module) is nn.Module:
            module.training = model.training
    made.training = model.training
    return made


def _shallow_copy(module: nn.Module) -> nn.Module:
    result = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(result)[name] = dict(vars(module)[name])
    return result


def _replacement(module: nn.Module, chain: Chain) -> nn.Module:
    if type(module) in _PRODUCTS:
        return _PRODUCTS[type(module)](module, chain.activation)
    result = _shallow_copy(module)
    result.__class__ = _BATCH_NORMS[type(module)][chain.added]
    result.relu = chain.activation
    return result
