"""Single steps of an exported model, run alone on random values: by this library or by torch, in either format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .exported import Program, Step, ours
from .timing import formats


@dataclass(frozen=True)
class Distinct:
    """Steps of one kind: the same operator on the same sizes with the same arguments."""

    step: Step = field(repr=False)
    names: list[str]


def distinct(program: Program, wanted: Callable[[Step], bool]) -> list[Distinct]:
    """The wanted steps, equal ones together, in the order of their first."""
    found: dict[tuple, Distinct] = {}
    for step in program.steps:
        if wanted(step):
            found.setdefault(_signature(step), Distinct(step, [])).names.append(step.name)
    return list(found.values())


def computed_by_us(step: Step) -> bool:
    """Whether this library has the operator, for dtypes that it computes."""
    return step.node.target in ours() and step.output.dtype in (
        torch.float32, torch.float64, torch.bfloat16, torch.float16,
    )  # fmt: skip


def is_our_operator(step: Step) -> bool:
    """Whether the step is an operator of this library already, that of a fused layer, which torch does not have."""
    return getattr(step.node.target, "namespace", "") == "convlab"


def step_formats(step: Step) -> dict[str, torch.memory_format]:
    return formats(step.reads[0].meta["val"].dim() if isinstance(step.reads[0].meta["val"], Tensor) else 0)


def operands(program: Program, step: Step, memory_format: torch.memory_format) -> tuple[tuple, dict]:
    """Arguments of the step's operator: random activations, the model's own parameters, laid out in one format."""
    signature, random = program.exported.graph_signature, torch.Generator().manual_seed(0)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = {**program.exported.state_dict, **program.exported.constants}

    def real(node: fx.Node) -> Tensor:
        fake = node.meta["val"]
        if node.name in names:
            value = state[names[node.name]].detach()
        elif fake.is_floating_point():
            value = torch.randn(fake.shape, generator=random, dtype=fake.dtype)
        else:
            value = torch.zeros(fake.shape, dtype=fake.dtype)
        return value.to(memory_format=memory_format) if value.dim() == _dimensions(memory_format) else value

    return fx.map_arg((step.node.args, step.node.kwargs), real)


def forward(step: Step, arguments: tuple, keywords: dict, owner: str) -> Callable[[], object]:
    """One inference call of the step by ``"ours"`` or ``"torch"``."""
    function = _function(step, owner)

    def call():
        with torch.inference_mode():
            return function(*arguments, **keywords)

    return call


def forward_backward(step: Step, arguments: tuple, keywords: dict, owner: str) -> Callable[[], object]:
    """One training call of the step: forward, with statistics of the batch, and all gradients."""
    function = _function(step, owner)
    if step.node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        arguments = (*arguments[:5], True, *arguments[6:])
    leaves = [_leaf(value) for value in arguments]
    keywords = {name: _leaf(value) for name, value in keywords.items()}
    wanted = [value for value in (*leaves, *keywords.values()) if isinstance(value, Tensor) and value.requires_grad]
    grad_output: list[Tensor] = []

    def call():
        output = function(*leaves, **keywords)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if not grad_output:
            grad_output.append(torch.randn_like(output))
        return torch.autograd.grad(output, wanted, grad_output[0], allow_unused=True)

    return call


def _leaf(value):
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return value


def _function(step: Step, owner: str) -> Callable:
    return ours().get(step.node.target, step.node.target) if owner == "ours" else step.node.target


def _signature(step: Step) -> tuple:
    def spell(value):
        if isinstance(value, fx.Node):
            fake = value.meta["val"]
            return (tuple(fake.shape), fake.dtype) if isinstance(fake, Tensor) else "tuple"
        return tuple(map(spell, value)) if isinstance(value, (tuple, list)) else value

    return (str(step.node.target), *((name, spell(value)) for name, value in step.arguments.items()))


def _dimensions(memory_format: torch.memory_format) -> int:
    return {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, -1)
