"""The computational graph of a model (lecture item L20): what runs forward, what it saves, and what runs backward.

Read from autograd itself after one forward pass, so branches, residuals and functional calls are all there. The
operators of one layer are one step; each step's saved tensors are those its backward nodes hold.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import LabError


@dataclass(frozen=True)
class Saved:
    """A tensor that a step keeps from forward for backward.

    `bytes` are those of its storage; 0 where `owner` says who has them already: a parameter, the model's input, or an
    earlier step that keeps the same storage.
    """

    name: str
    size: tuple[int, ...]
    dtype: str
    bytes: int
    owner: str = ""


@dataclass
class Step:
    """One layer's call, or one operator outside of layers, with its backward."""

    name: str  # of the layer; of the operator outside of layers
    kind: str  # class of the layer, or "function"
    size: tuple[int, ...]  # of the output
    dtype: str
    inputs: list[int]  # indices of the steps whose outputs it reads; -1 is the model's input
    backward: list[str]  # names of its autograd nodes, last first
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)  # that backward makes gradients of
    saved: list[Saved] = field(default_factory=list)
    multiply_adds: int = 0  # of forward
    backward_multiply_adds: int = 0

    @property
    def backward_name(self) -> str:
        """The backward node that does the work; those that only change a view are left out if there is another."""
        views = ("View", "Permute", "Unsqueeze", "Squeeze", "T", "Transpose", "Reshape", "Expand")
        names = [name for name in self.backward if name.removesuffix("0").removesuffix("Backward") not in views]
        return ", ".join(names or self.backward)

    @property
    def saved_bytes(self) -> int:
        return sum(saved.bytes for saved in self.saved)


@dataclass(frozen=True)
class Graph:
    """The steps of a model in the order of the forward pass; backward runs them in reverse. Made by `graph`."""

    model: str
    input_size: tuple[int, ...]
    input_needs_gradient: bool
    steps: list[Step]
    multiply_adds: int  # of the whole forward pass, operators outside of layers included
    backward_multiply_adds: int

    @property
    def saved_bytes(self) -> int:
        """What the graph keeps alive between forward and backward, without parameters and the model's input."""
        return sum(step.saved_bytes for step in self.steps)

    def svg(self) -> str:
        """The graph as an ``<svg>`` element in the colours of the page around it."""
        from .graph_svg import draw

        return draw(self)


def graph(model: nn.Module, input: Tensor | tuple[int, ...], input_needs_gradient: bool = False) -> Graph:
    """Run `model` forward and backward once and return its computational graph.

    Args:
        model: any module that maps one tensor to one tensor; copied, so its gradients and statistics stay.
        input: a tensor, or the size of one, filled at random.
        input_needs_gradient: as if a layer in front of the model were trained too (lecture item L8).

    Raises:
        LabError: nothing in `model` needs a gradient, or its output is not one tensor.

    >>> from torch_convlab.models import LeNet5
    >>> [step.name for step in graph(LeNet5(), (1, 1, 28, 28)).steps][:3]
    ['conv1', 'relu1', 'pool1']
    """
    name = type(model).__name__
    model = copy.deepcopy(model)
    input = torch.randn(input) if not isinstance(input, Tensor) else input.detach().clone()
    input.requires_grad_(input_needs_gradient)
    labels, kinds, macs = {}, {}, {}
    handles = _label_layers(model, labels, kinds)
    with FlopCounterMode(display=False) as counter:
        try:
            output = model(input)
        except Exception as error:  # the model's own code, which may raise anything
            mode = "training" if model.training else "eval"
            refused = f"{name} does not accept an input of {tuple(input.shape)} in {mode} mode"
            text = f"{refused}: {type(error).__name__}: {error}"
            raise LabError(text.partition("\n")[0]) from error
        forward_counts = _by_module(counter)
        for handle in handles:
            handle.remove()
        if not isinstance(output, Tensor):
            raise LabError(f"expected a model whose output is one tensor, but got {type(output).__name__}")
        if output.grad_fn is None:
            raise LabError("expected a model with parameters that need gradients, but found none")
        steps = _steps(model, input, output, labels, kinds)
        output.sum().backward()
        macs = _by_module(counter)
    total, forward_total = macs["Global"], forward_counts["Global"]
    calls = Counter(step.name.partition(" (call ")[0] for step in steps)
    for step in steps:
        key = f"{name}.{step.name.partition(' (call ')[0]}"
        count = calls[step.name.partition(" (call ")[0]]
        step.multiply_adds = forward_counts.get(key, 0) // 2 // count
        step.backward_multiply_adds = (macs.get(key, 0) - forward_counts.get(key, 0)) // 2 // count
    return Graph(
        name, tuple(input.shape), input_needs_gradient, steps, forward_total // 2, (total - forward_total) // 2
    )


def _by_module(counter: FlopCounterMode) -> dict[str, int]:
    return {module: sum(flops.values()) for module, flops in counter.get_flop_counts().items()} | {
        "Global": counter.get_total_flops()
    }


def _label_layers(model: nn.Module, labels: dict, kinds: dict) -> list:
    """Hooks that put every autograd node made inside a layer under the layer's name."""
    handles, calls, entered = [], Counter(), {}

    def before(module, arguments, name):
        entered[name] = {value.grad_fn for value in arguments if isinstance(value, Tensor)}

    def after(module, arguments, output, name):
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return
        calls[name] += 1
        label = name if calls[name] == 1 else f"{name} (call {calls[name]})"
        kinds[label] = type(module).__name__
        waiting = [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in entered[name] or node in labels or _leaf(node) is not None:
                continue
            labels[node] = label
            waiting += [following for following, _ in node.next_functions]

    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(lambda *a, name=name: before(*a, name)))
            handles.append(module.register_forward_hook(lambda *a, name=name: after(*a, name)))
    return handles


def _leaf(node) -> Tensor | None:
    """The tensor that a node accumulates into, if it is one of those that end the graph."""
    return getattr(node, "variable", None)


def _steps(model, input, output, labels, kinds) -> list[Step]:
    order = _topological(output.grad_fn)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {_storage(parameter): name for name, parameter in model.named_parameters()}
    owners |= {_storage(buffer): name for name, buffer in model.named_buffers()}
    owners[_storage(input)] = "input"
    index_of, steps, counts = {}, [], Counter()
    for node in order:
        if _leaf(node) is not None:
            continue
        label = labels.get(node)
        operator = _operator_name(node)
        key = label if label is not None else node
        if key not in index_of:
            counts[operator] += label is None
            name = label or (operator if counts[operator] == 1 else f"{operator} {counts[operator]}")
            index_of[key] = len(steps)
            steps.append(Step(name, kinds.get(label, "function"), (), "", [], []))
        here = index_of[key]
        step = steps[here]
        step.backward.insert(0, node.name())
        # The node's own output; with several (batch norm's statistics) the first is the one that others read.
        step.size, step.dtype = _metadata(node)
        reads_input = not node.next_functions
        for following, _ in node.next_functions:
            leaf = _leaf(following) if following is not None else None
            if leaf is not None and id(leaf) in names:
                step.parameters[names[id(leaf)].rpartition(".")[2]] = tuple(leaf.shape)
            elif leaf is input:
                reads_input = True
            elif following is not None and leaf is None:
                source = index_of[labels.get(following, following)]
                if source != here and source not in step.inputs:
                    step.inputs.append(source)
        if reads_input and -1 not in step.inputs:
            step.inputs.append(-1)
        step.saved += _saved(node, step.name, owners)
    for step in steps:
        if not step.inputs:  # its input needs no gradient, so autograd has no edge to it
            step.inputs.append(-1)
        step.saved = list({(saved.name, saved.size, saved.owner): saved for saved in step.saved}.values())
    return steps


def _topological(last) -> list:
    """All nodes below `last`, each behind those it reads from."""
    order, state, waiting = [], {}, [last]
    while waiting:
        node = waiting[-1]
        if state.get(node) == "done":
            waiting.pop()
        elif node in state:
            state[node] = "done"
            order.append(node)
            waiting.pop()
        else:
            state[node] = "open"
            waiting += [
                following for following, _ in reversed(node.next_functions) if following and following not in state
            ]
    return order


def _saved(node, step: str, owners: dict) -> list[Saved]:
    if hasattr(node, "saved_tensors"):
        values = [(f"saved {place}", value) for place, value in enumerate(node.saved_tensors)]
    else:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [(name.removeprefix("_saved_"), getattr(node, name)) for name in names]
    found = []
    for name, value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            key = _storage(tensor)
            owner = owners.get(key, "")
            owners.setdefault(key, step)
            size = 0 if owner else tensor.untyped_storage().nbytes()
            found.append(Saved(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), size, owner))
    return found


def _storage(tensor: Tensor) -> tuple[int, int]:
    # Empty storages all have address 0.
    return (tensor.untyped_storage().data_ptr(), 0 if tensor.numel() else id(tensor))


def _operator_name(node) -> str:
    """``AddmmBackward0`` is the backward of ``addmm``."""
    name = node.name().rpartition("::")[2]
    return name[: name.rindex("Backward")].lower() if "Backward" in name else name


def _metadata(node) -> tuple[tuple[int, ...], str]:
    metadata = node._input_metadata
    shapes = [(tuple(int(size) for size in one.shape), str(one.dtype).removeprefix("torch.")) for one in metadata]
    return max(shapes, key=lambda pair: math.prod(pair[0]))
