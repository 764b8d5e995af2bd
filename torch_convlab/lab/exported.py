"""A model as the list of operators that it calls, with sizes: its graph as `torch.export` sees it.

The graph, not the list of modules, is walked: branches, residuals, functional calls and layers used twice all appear,
in the order in which they compute. The model is exported as torch.nn computes it, so that one table of operators
does for converted models too; fused layers of this library appear as its own operators.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from .. import _C, functional
from .._override import native_signatures
from ..convert import revert
from .errors import LabError

_aten = torch.ops.aten
_CONVOLUTIONS = {
    _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding, _aten.conv3d.default,
    _aten.conv3d.padding, torch.ops.convlab.convolution.default, torch.ops.convlab.convolution_fused.default,
}  # fmt: skip
_TRANSPOSED = {_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input}
# Say nothing about what is computed, or repeat the step before.
_SILENT = {
    operator.getitem, _aten.detach.default, _aten.detach_.default, _aten.alias.default, _aten.lift_fresh_copy.default,
    _aten.contiguous.default, _aten._assert_tensor_metadata.default,
}  # fmt: skip


@dataclass(frozen=True)
class Convolution:
    """One convolution, as `explain_convolution` takes it; of a transposed one, the convolution it is the adjoint of."""

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def geometry(self) -> _C.ConvGeometry:
        return _C.ConvGeometry(
            batch=self.input_size[0],
            in_channels=self.input_size[1],
            out_channels=self.weight_size[0],
            groups=self.groups,
            input=list(self.input_size[2:]),
            kernel=list(self.weight_size[2:]),
            stride=list(self.stride),
            padding=list(self.padding),
            dilation=list(self.dilation),
        )

    @property
    def output_size(self) -> tuple[int, ...]:
        spatial = len(self.input_size) - 2
        return (self.input_size[0], self.weight_size[0], *self.geometry.output[3 - spatial :])


@dataclass(frozen=True)
class Step:
    """One operator that reads what the model was given, directly or not.

    `name` is that of the module it belongs to; for a call of a function inside a module, with the function's name.
    """

    name: str
    operation: str
    node: fx.Node = field(repr=False)
    arguments: dict[str, object] = field(repr=False)  # by the schema's names; tensors are nodes
    reads: tuple[fx.Node, ...] = field(repr=False)  # what it reads of what was computed
    parameters: tuple[str, ...] = ()  # names

    @property
    def output(self) -> Tensor:
        """The (fake) tensor that it writes; the first of several."""
        return _tensors(self.node)[0]

    @property
    def is_convolution(self) -> bool:
        return self.node.target in _CONVOLUTIONS or self.node.target in _TRANSPOSED

    @property
    def is_linear(self) -> bool:
        return self.node.target is _aten.linear.default

    @property
    def weight_size(self) -> tuple[int, ...]:
        """Of the argument ``weight``; empty without one."""
        weight = self.arguments.get("weight")
        return tuple(weight.meta["val"].shape) if isinstance(weight, fx.Node) else ()

    def convolution(self) -> Convolution | None:
        """This step as a convolution; a linear layer is a 1x1 convolution of rows. None if it is neither."""
        if self.is_linear:
            input, weight = self.reads[0].meta["val"], self.weight_size
            if len(weight) != 2:
                return None
            rows = input.numel() // input.shape[-1]
            return Convolution((1, weight[1], 1, rows), (*weight, 1, 1), (1, 1), (0, 0), (1, 1))
        if not self.is_convolution or len(self.weight_size) < 3:
            return None
        spatial = len(self.weight_size) - 2
        read, written = (list(_batched(tensor, spatial)) for tensor in (self.reads[0].meta["val"], self.output))
        stride, dilation = (_axes(self.arguments[name], spatial) for name in ("stride", "dilation"))
        padding = self.arguments["padding"]
        if padding == "valid":
            padding = [0] * spatial
        elif padding == "same":  # an odd amount is padded beforehand
            total = [d * (k - 1) for d, k in zip(dilation, self.weight_size[2:])]
            read[2:] = [size + amount % 2 for size, amount in zip(read[2:], total)]
            padding = [amount // 2 for amount in total]
        padding, groups = _axes(padding, spatial), self.arguments["groups"]
        transposed = self.node.target in _TRANSPOSED
        input_size = tuple(written if transposed else read)
        return Convolution(input_size, self.weight_size, stride, padding, dilation, groups, transposed)


@dataclass(frozen=True)
class Program:
    """A model's steps in order, and what is needed to run them."""

    steps: list[Step]
    exported: torch.export.ExportedProgram = field(repr=False)
    input: fx.Node = field(repr=False)


def export(model: nn.Module, inputs: Tensor, name: str = "the model") -> Program:
    """The operators that `model` calls in eval mode; the model itself is not changed.

    Raises:
        LabError: `torch.export` cannot follow the model, for example where it branches on values.
    """
    twin = revert(copy.deepcopy(model)).eval()
    try:
        exported = torch.export.export(twin, (inputs,), strict=False)
    except Exception as error:  # the model's own code, which may raise anything
        line = str(error).strip().partition("\n")[0]
        raise LabError(f"torch.export cannot follow {name}: {type(error).__name__}: {line}") from error
    names = exported.graph_signature.inputs_to_parameters
    leaves = {path for path, module in twin.named_modules() if not any(True for _ in module.children())}
    first = next(node for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs)
    live, steps, calls, main = {first}, [], Counter(), {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or not live & set(node.all_input_nodes):
            continue
        live.add(node)
        if node.target in _SILENT or not _tensors(node):
            continue
        path, label = _path(node), _operation(node)
        # A leaf is called like its module, and what else it computes (a fused layer's ReLU, say) like the function.
        is_main = path in leaves and main.setdefault(path, label) == label
        step_name = path if is_main else ".".join(filter(None, (path, label)))
        calls[step_name] += 1
        if calls[step_name] > 1:
            step_name += f" (call {calls[step_name]})"
        reads = tuple(source for source in node.all_input_nodes if source in live)
        arguments = _arguments(node)
        steps.append(Step(step_name, label, node, arguments, reads, tuple(_parameters(node, live, names))))
    return Program(steps, exported, first)


def run(program: Program, inputs: Tensor, call: Callable[[Step | None, Callable, tuple, dict], object]) -> object:
    """Runs the program; `call` gets each step (None for operators that are none), its function and its arguments.

    Parameters are those of the exported copy, on the device of `inputs`.
    """
    exported, device = program.exported, inputs.device
    state = {**exported.state_dict, **exported.constants}
    signature, values = exported.graph_signature, {}
    by_placeholder = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    steps = {step.node: step for step in program.steps}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node is program.input:
                values[node] = inputs
            else:
                source = state[by_placeholder[node.name]]
                values[node] = source.to(device) if isinstance(source, Tensor) else source
                if isinstance(source, nn.Parameter):
                    values[node] = values[node].detach().requires_grad_(source.requires_grad)
        elif node.op == "get_attr":
            values[node] = getattr(exported.graph_module, node.target)
        elif node.op == "call_function":
            arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = call(steps.get(node), node.target, *arguments)
        else:
            return fx.map_arg(node.args[0], values.__getitem__)
    raise AssertionError("a graph ends with its output")


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in values if isinstance(item, Tensor)]


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return path.partition("@")[0]  # later calls of a shared module are marked so


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__.rstrip("_")
        if node.target in _CONVOLUTIONS and node.target.namespace == "convlab":
            return f"conv{_tensors(node)[0].dim() - 2}d"
        return name.removesuffix("_eval") if node.target.namespace == "convlab" else name
    return getattr(node.target, "__name__", str(node.target))


def _arguments(node: fx.Node) -> dict[str, object]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(enumerate(node.args)) | node.kwargs
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args)}
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _parameters(node: fx.Node, live: set[fx.Node], names: dict[str, str]) -> Iterator[str]:
    """Names of the parameters that the node reads, also through operators that read nothing else (a reshape, say)."""
    seen = set()

    def sources(node: fx.Node) -> Iterator[str]:
        for source in node.all_input_nodes:
            if source in live or source in seen:
                continue
            seen.add(source)
            if source.name in names:
                yield names[source.name]
            yield from sources(source)

    yield from sources(node)


def _batched(tensor: Tensor, spatial: int) -> tuple[int, ...]:
    return (1, *tensor.shape) if tensor.dim() == spatial + 1 else tuple(tensor.shape)


def _axes(value, count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * count if len(values) == 1 else values)


def ours() -> dict[Callable, Callable]:
    """Every operator of torch that this library computes, with the function that does, called alike."""
    table = {
        _aten.linear.default: functional.linear,
        _aten.rms_norm.default: functional.rms_norm,
        **{getattr(_aten, name).default: function for name, function in native_signatures().items()},
    }
    for target in (*_CONVOLUTIONS, *_TRANSPOSED):
        name = target.overloadpacket.__name__
        if name in functional.__all__:
            table[target] = getattr(functional, name)
    for dimensions in "123":
        for name in ("max_pool{}d_with_indices", "avg_pool{}d", "adaptive_avg_pool{}d"):
            table[getattr(_aten, name.format(dimensions)).default] = getattr(functional, name.format(dimensions))
        packet = getattr(_aten, f"adaptive_max_pool{dimensions}d")
        table[packet.default] = getattr(functional, f"adaptive_max_pool{dimensions}d_with_indices")
    return table
