"""Fused convolutions that follow each other, called together.

Between two layers Python calls a module and reads its attributes. In a model of small layers, whose tensors drive the
interpreter's data out of the caches, that takes as long as some of the layers do. `_C.run` calls a whole run of layers
of a fused model, as long as nothing but their kernels has a say (csrc/python_run.cpp); else they are called one by one,
as the model's graph says.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as calls

from . import _C
from ._graph import is_identity, module_of
from .nn import ConvAddReLU

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
# What a run stands for; others may put something else in their place.
_CODE = tuple(
    (kind, name, getattr(kind, name))
    for kind, name in ((nn.Module, "__call__"), (ConvAddReLU, "forward"), (nn.Identity, "forward"))
)


class RunningGraphModule(fx.GraphModule):
    """A `torch.fx.GraphModule` that calls runs of its convolutions together.

    Its graph and its code are those of the single layers, for whoever reads or traces them.
    """

    def recompile(self):
        code = super().recompile()
        made = type(self)
        layer_by_layer = made.forward
        self._runs, in_runs = _compile(self)

        @functools.wraps(layer_by_layer)
        def forward(self, *arguments, **keywords):
            if torch.compiler.is_compiling() or not self._runs:
                return layer_by_layer(self, *arguments, **keywords)
            return in_runs(self, *arguments, **keywords)

        made.forward = forward
        return code

    def __copy__(self):
        return _running(copy.copy, super().__copy__())

    def __reduce__(self):
        return _running, super().__reduce__()


def _running(make: Callable, arguments) -> RunningGraphModule:
    """Of the plain `torch.fx.GraphModule` that torch makes of a copy, one that calls runs."""
    plain = make(*arguments) if isinstance(arguments, tuple) else make(arguments)
    made = RunningGraphModule(plain, plain.graph, class_name=type(plain).__name__)
    vars(made).update({name: value for name, value in vars(plain).items() if name not in vars(made)})
    made.training = plain.training
    return made


class Run:
    """Layers in a row. Values are numbered: the inputs, then what each layer returns, of which the last is the result.

    Args:
        root: the module whose layers they are.
        nodes: their calls.
        inputs: what they read of others.
    """

    def __init__(self, root: nn.Module, nodes: list[fx.Node], inputs: list[fx.Node]):
        number = {node: index for index, node in enumerate([*inputs, *nodes])}
        last_use = {argument: node for node in nodes for argument in node.args}
        self._root = vars(root)
        self._paths = [node.target.split(".") for node in nodes]
        self._sources = [[number[argument] for argument in node.args] for node in nodes]
        places, steps = {}, []
        for index, (node, path, sources) in enumerate(zip(nodes, self._paths, self._sources)):
            for container, name, module in _places(self._root, path):
                places[id(container), name] = container, name, module
            dimensions = 0 if type(module) is nn.Identity else module.weight.dim() - 2
            dying = tuple({number[argument] for argument in node.args if last_use[argument] is node})
            source, residual = (*sources, -1)[:2]
            steps.append((module, vars(module), dimensions, source, residual, dying, _together(root, nodes[index:])))
        hooks = tuple(getattr(calls, "_global" + kind) for kind in _HOOKS)
        self._program = tuple(places.values()), _CODE, hooks, tuple(steps)

    def __call__(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        done = _C.run(self._program, values)
        for path, sources in zip(self._paths[done:], self._sources[done:]):
            *_, (_, _, layer) = _places(self._root, path)
            values.append(layer(*(values[source] for source in sources)))
        return values[-1]

    def __reduce__(self):  # a copy of the model makes its own
        return type(None), ()


def _places(root: dict, path: list[str]) -> Iterator[tuple[dict, str, nn.Module]]:
    """(attributes of a container, name, module) along a path, from the attributes of the root."""
    attributes = root
    for name in path:
        module = attributes["_modules"][name]
        yield attributes, name, module
        attributes = vars(module)


def _compile(root: fx.GraphModule):
    """The runs of the module's graph, and a forward pass that calls them."""
    if type(root.graph._codegen) is not fx.graph.CodeGen:  # one that takes the arguments apart
        return [], None
    graph, runs, prefix = copy.deepcopy(root.graph), [], "run"
    while any(node.op == "call_module" and node.target.startswith(prefix) for node in graph.nodes):
        prefix = "_" + prefix
    try:
        found = list(_find(root, graph))
    except AttributeError:  # a graph whose layers are yet to come
        return [], None
    for nodes in found:
        inputs = list(dict.fromkeys(argument for node in nodes for argument in node.args if argument not in nodes))
        with graph.inserting_after(nodes[-1]):
            call = graph.call_module(f"{prefix}_{len(runs)}", tuple(inputs))
        runs.append(Run(root, nodes, inputs))
        nodes[-1].replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(node)
    names = {f" = self.{prefix}_{index}(": f" = self._runs[{index}](" for index in range(len(runs))}

    def transform(line: str) -> str:
        name = next((name for name in names if name in line), None)
        return line if name is None else line.replace(name, names[name])

    graph.on_generate_code(
        lambda previous: lambda lines: [transform(line) for line in (previous(lines) if previous else lines)]
    )
    code = graph.python_code("self")
    made = dict(code.globals)
    exec(compile(code.src, "<runs of layers>", "exec"), made)
    return runs, made["forward"]


def _find(root: nn.Module, graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Convolutions in a row, and identities between them, of whose values others read the last one alone."""
    row: list[fx.Node] = []
    for node in list(graph.nodes):
        if _fits(node, root):
            row.append(node)
            continue
        while row:
            ends = (end for end in range(len(row), 0, -1) if _is_closed(row[:end]))
            run, row = row[: (end := next(ends))], row[end:]
            if sum(type(module_of(each, root)) is ConvAddReLU for each in run) > 1:
                yield run


def _fits(node: fx.Node, root: nn.Module) -> bool:
    if node.op != "call_module" or node.kwargs or not all(isinstance(argument, fx.Node) for argument in node.args):
        return False
    layer = module_of(node, root)
    if type(layer) is ConvAddReLU:
        return not isinstance(layer.padding, str) and len(node.args) in (1, 2)
    return type(layer) is nn.Identity and is_identity(node, root)


def _together(root: nn.Module, nodes: list[fx.Node]) -> int:
    """How many layers, from the first on, may be computed together: pointwise, depthwise and maybe pointwise again."""
    count = 1
    for kinds, node, follower in zip((("pointwise", "depthwise"), ("depthwise", "pointwise")), nodes, nodes[1:]):
        if kinds != tuple(_kind(module_of(each, root)) for each in (node, follower)):
            break
        if list(node.users) != [follower] or follower.args[0] is not node or node in follower.args[1:]:
            break
        if kinds[1] == "depthwise" and len(follower.args) > 1:
            break
        count += 1
    return count


def _kind(layer: nn.Module) -> str:
    if type(layer) is not ConvAddReLU or layer.weight.dim() != 4:
        return ""
    if layer.groups == 1:
        return "pointwise" if layer.weight[0, 0].numel() == 1 else ""
    return "depthwise" if layer.groups == len(layer.weight) and layer.weight.shape[1] == 1 else ""


def _is_closed(nodes: list[fx.Node]) -> bool:
    return all(user in nodes for node in nodes[:-1] for user in node.users)
