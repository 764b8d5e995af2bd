"""Holds a model against torch.nn: every layer's output and every gradient, alone in float32 and together in float64.

Two checks, because a deep network as a whole cannot be compared tightly in float32: rounding opens a few ReLUs that
stay shut in another, equally correct, computation, and their gradients then differ as a whole. So each layer is
compared alone, on the inputs and output gradients that it meets in the network, against float64; and the network is
compared as a whole in float64, where rounding is too small to flip a ReLU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..convert import convert, revert

Loss = Callable[[Tensor], Tensor]

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_FACTOR = 4.0


@dataclass(frozen=True)
class Comparison:
    """One tensor: ``max|error| / max|reference|`` of ours and of torch.nn."""

    name: str
    kind: str  # "output", "gradient of input" or "gradient of <parameter>"
    size: tuple[int, ...]
    ours: float
    theirs: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """Good enough by itself, or not much worse than torch.nn. False for NaN."""
        return self.ours <= max(self.tolerance, _FACTOR * self.theirs)


@dataclass
class _Call:
    """What one call of one layer read, and the gradient of what it wrote."""

    name: str
    module: nn.Module
    input: Tensor
    grad_output: Tensor | None = None


def verify_layers(model: nn.Module, inputs: Tensor, loss: Loss) -> list[Comparison]:
    """Every layer alone: ours and torch.nn in float32, both against torch.nn in float64 on the same values.

    Args:
        model: in training or eval mode; is copied, and neither converted nor changed.
        inputs: what the model is called with.
        loss: maps the model's output to the scalar whose gradients flow back.

    Returns:
        In the order in which the layers (modules without children, of one input) compute: output, gradient of the
        input, gradients of the parameters.
    """
    return [comparison for call in _record(revert(copy.deepcopy(model)), inputs, loss) for comparison in _compare(call)]


def verify_network(model: nn.Module, inputs: Tensor, loss: Loss) -> list[Comparison]:
    """The whole network in float64, ours against torch.nn: all outputs and gradients. See `verify_layers`."""
    twin = revert(copy.deepcopy(model)).double()
    theirs = _values(twin, inputs.double(), loss)
    ours = _values(convert(copy.deepcopy(twin)), inputs.double(), loss)
    tolerance = _TOLERANCE[torch.float64]
    return [
        Comparison(name, kind, tuple(exact.shape), _error(ours[name, kind], exact), 0.0, tolerance)
        for (name, kind), exact in theirs.items()
    ]


def _record(model: nn.Module, inputs: Tensor, loss: Loss) -> list[_Call]:
    """The calls of all layers of `model`, run in float32 by torch.nn."""
    calls, count = [], Counter()

    def before(module, arguments, name):
        count[name] += 1
        label = name if count[name] == 1 else f"{name} (call {count[name]})"
        # Copied at once: a layer that works in place, such as ReLU, overwrites what it reads.
        calls.append(_Call(label, copy.deepcopy(module), arguments[0].detach().clone()))

    def after(_module, _arguments, output):
        call = calls[-1]
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(call, "grad_output", gradient.detach().clone()))

    handles = []
    for name, module in _layers(model):
        handles.append(module.register_forward_pre_hook(lambda *arguments, name=name: before(*arguments, name)))
        handles.append(module.register_forward_hook(after))
    loss(model(inputs.detach().clone().requires_grad_())).backward()
    for handle in handles:
        handle.remove()
    return calls


def _compare(call: _Call) -> Iterator[Comparison]:
    for handles in (call.module._forward_hooks, call.module._forward_pre_hooks):
        handles.clear()
    theirs = _run_layer(copy.deepcopy(call.module), call.input, call.grad_output)
    ours = _run_layer(convert(copy.deepcopy(call.module)), call.input, call.grad_output)
    gradient = None if call.grad_output is None else call.grad_output.double()
    for kind, exact in _run_layer(call.module.double(), call.input.double(), gradient).items():
        errors = _error(ours[kind], exact), _error(theirs[kind], exact)
        yield Comparison(call.name, kind, tuple(exact.shape), *errors, _TOLERANCE[torch.float32])


def _run_layer(layer: nn.Module, input: Tensor, grad_output: Tensor | None) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)
    input = input.clone().requires_grad_()
    output = layer(input.clone())  # a clone, since a leaf cannot be worked on in place
    values = {"output": output.detach().clone()}
    if grad_output is not None:
        output.backward(grad_output)
        gradients = {"input": input.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
        values |= {f"gradient of {name}": gradient for name, gradient in gradients.items() if gradient is not None}
    return values


def _values(model: nn.Module, inputs: Tensor, loss: Loss) -> dict[tuple[str, str], Tensor]:
    outputs, count = {}, Counter()

    def keep(_module, _arguments, output, name):
        count[name] += 1
        outputs[name if count[name] == 1 else f"{name} (call {count[name]})", "output"] = output.detach().clone()

    handles = [
        module.register_forward_hook(lambda *arguments, name=name: keep(*arguments, name))
        for name, module in _layers(model)
    ]
    inputs = inputs.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    loss(model(inputs)).backward()
    for handle in handles:
        handle.remove()
    gradients = {("network", "gradient of input"): inputs.grad}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        gradients[layer, f"gradient of {kind}"] = parameter.grad
    return {**outputs, **{key: value for key, value in gradients.items() if value is not None}}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not any(True for _ in module.children()))


def _error(value: Tensor, reference: Tensor) -> float:
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().item()
    return (value.double() - reference).abs().max().item() / (scale if scale > 0 else 1.0)
