"""What every layer of a model writes, holds, computes and keeps (lecture items L1, L2, L3, L18)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from . import exported
from .exported import Program, Step
from .fields import Field, receptive_fields

_aten = torch.ops.aten
_VIEWS = {
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "unflatten", "select", "slice",
    "expand", "chunk", "split", "dropout", "feature_dropout",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One row of `summary`; sizes are those of torch, with the batch in front."""

    name: str
    operation: str
    output_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    parameters: int  # those that no layer above has: a shared one is counted once
    multiply_adds: int  # of convolutions and matrix products; additions of biases are not counted
    bytes: int  # read and written if every tensor passes once; none for views
    saved_bytes: int  # kept for the backward pass of a training step, by this library
    saved_bytes_torch: int  # the same by torch.nn
    receptive_field: tuple[int | None, ...]  # per axis, in pixels of the input; None: not known
    stride: tuple[float | None, ...]  # distance of neighbouring outputs, in pixels; None: none, or not known
    center: tuple[float | None, ...]  # of output 0, in pixels


@dataclass(frozen=True)
class Summary:
    """All layers in the order in which they compute, and their sums."""

    model: str
    input_size: tuple[int, ...]
    layers: list[Layer]
    parameters: int
    unused_parameters: int  # that the forward pass never reads
    multiply_adds: int
    bytes: int
    saved_bytes: int
    saved_bytes_torch: int


def summary(model: nn.Module, shape: tuple[int, ...], name: str = "model") -> Summary:
    """Sizes, work, memory traffic and receptive field of every layer of `model` for an input of `shape`.

    Args:
        model: any module that `torch.export` can follow; is copied, not changed. Sizes are those of eval mode;
            the saved bytes those of a training step.
        shape: of the one float32 input, ``N x C x *spatial``.
        name: of the model, for messages.

    Raises:
        LabError: the model cannot be exported, for example because it refuses the shape.
    """
    program = exported.export(model, torch.zeros(shape), name)
    fields = receptive_fields(program)
    sizes = {name: parameter.numel() for name, parameter in program.exported.state_dict.items()}
    trainable = {name for name, _ in program.exported.named_parameters()}
    saved, saved_torch = saved_bytes(program, exported.ours()), saved_bytes(program, {})
    counted: set[str] = set()
    layers = []
    for step in program.steps:
        new = {name for name in step.parameters if name not in counted}
        counted |= new
        layers.append(
            Layer(
                step.name,
                step.operation,
                tuple(step.output.shape),
                step.weight_size,
                sum(sizes[name] for name in new),
                multiply_adds(step),
                traffic(step, program),
                saved[step.node],
                saved_torch[step.node],
                *_spell(fields[step.node]),
            )
        )
    total = sum(sizes[name] for name in trainable)
    used = sum(layer.parameters for layer in layers)
    return Summary(
        name,
        tuple(shape),
        layers,
        total,
        total - used,
        sum(layer.multiply_adds for layer in layers),
        sum(layer.bytes for layer in layers),
        sum(layer.saved_bytes for layer in layers),
        sum(layer.saved_bytes_torch for layer in layers),
    )


def multiply_adds(step: Step) -> int:
    """Of convolutions by the one geometry (csrc/geometry.h); of other matrix products as torch counts them."""
    problem = step.convolution()
    if problem is not None:
        return problem.geometry.multiply_adds()
    # On the meta device, which computes nothing.
    arguments = fx.map_arg((step.node.args, step.node.kwargs), lambda node: _on_meta(node.meta["val"]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            step.node.target(*arguments[0], **arguments[1])
        except (NotImplementedError, RuntimeError):  # no meta kernel: no matrix product either
            return 0
    return counter.get_total_flops() // 2


def _on_meta(value):
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_on_meta, value)) if isinstance(value, (tuple, list)) else value


def traffic(step: Step, program: Program) -> int:
    """Bytes read and written if every tensor passes once; none for views."""
    if step.operation in _VIEWS:
        return 0
    tensors = [step.output, *(program.exported.state_dict[name] for name in step.parameters)]
    for source in step.reads:
        value = source.meta["val"]
        tensors.append(value[0] if isinstance(value, (tuple, list)) else value)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_bytes(program: Program, table: dict) -> dict[fx.Node, int]:
    """Bytes that each step adds to what is kept for backward in training mode, with `table`'s functions in place.

    A tensor that two layers keep is counted at the first; parameters are not counted, nor is the input of the model.
    """
    result = dict.fromkeys((step.node for step in program.steps), 0)
    kept: dict[int, object] = {}  # storages, by identity; held, so that no identity is used twice
    known: set[int] = set()
    current: list[Step | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in kept and key not in known:
            kept[key] = storage
            if current[0] is not None:
                result[current[0].node] += storage.nbytes()
        return tensor

    held = []

    def call(step, function, arguments, keywords):
        current[0] = step
        for value in arguments:
            if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.is_leaf):
                known.add(value.untyped_storage()._cdata)
                held.append(value)
        if function in (_aten.batch_norm.default, _aten.instance_norm.default):  # with statistics of the batch
            arguments = (*arguments[:5], True, *arguments[6:])
        if step is not None and "dropout" in step.operation:
            arguments = (*arguments[:2], True)
        return table.get(function, function)(*arguments, **keywords)

    inputs = _on_meta(program.input.meta["val"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        exported.run(program, inputs, call)
    return result


def _spell(fields: tuple[Field | None, ...]) -> tuple[tuple, tuple, tuple]:
    def known(value: float) -> float | None:
        return None if math.isnan(value) else int(value) if value.is_integer() else value

    sizes = tuple(None if field is None else field.size for field in fields)
    local = [None if field is None or field.whole else field for field in fields]
    strides = tuple(field and known(field.jump) for field in local)
    return sizes, strides, tuple(field and known(field.center) for field in local)
