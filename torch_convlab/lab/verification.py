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
_Values = dict[tuple[str, str], Tensor]  # by layer and kind

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_FACTOR = 4.0


@dataclass(frozen=True)
class Comparison:
    """One tensor: ``max|error| / max|reference|`` of ours and of torch.nn.

    The gradients of one layer's parameters share the largest reference: that of a bias in front of a batch norm is
    zero but for rounding, and has no scale of its own.
    """

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
        In the order in which the layers (modules without children, that read and write one tensor) compute: output,
        gradient of the input, gradients of the parameters.
    """
    return [comparison for call in _record(revert(copy.deepcopy(model)), inputs, loss) for comparison in _compare(call)]


def verify_network(model: nn.Module, inputs: Tensor, loss: Loss) -> list[Comparison]:
    """The whole network in float64, ours against torch.nn: all outputs and gradients. See `verify_layers`."""
    twin = revert(copy.deepcopy(model)).double()
    theirs = _values(twin, inputs.double(), loss)
    ours = _values(convert(copy.deepcopy(twin)), inputs.double(), loss)
    scales, tolerance = _scales(theirs), _TOLERANCE[torch.float64]
    return [
        Comparison(*key, tuple(exact.shape), _error(ours[key], exact, scales[key]), 0.0, tolerance)
        for key, exact in theirs.items()
    ]


def _record(model: nn.Module, inputs: Tensor, loss: Loss) -> list[_Call]:
    """The calls of all layers of `model`, run in float32 by torch.nn."""
    calls, count, pending = [], Counter(), {}

    def before(module, arguments, name):
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            return
        count[name] += 1
        label = name if count[name] == 1 else f"{name} (call {count[name]})"
        # Copied at once: a layer that works in place, such as ReLU, overwrites what it reads.
        pending[name] = _Call(label, copy.deepcopy(module), arguments[0].detach().clone())

    def after(_module, _arguments, output, name):
        call = pending.pop(name, None)
        if call is None or not isinstance(output, Tensor):
            return
        calls.append(call)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(call, "grad_output", gradient.detach().clone()))

    handles = []
    for name, module in _layers(model):
        handles.append(module.register_forward_pre_hook(lambda *arguments, name=name: before(*arguments, name)))
        handles.append(module.register_forward_hook(lambda *arguments, name=name: after(*arguments, name)))
    loss(model(inputs.detach().clone().requires_grad_())).backward()
    for handle in handles:
        handle.remove()
    return calls


def _compare(call: _Call) -> Iterator[Comparison]:
    for handles in (call.module._forward_hooks, call.module._forward_pre_hooks):
        handles.clear()
    theirs = _run_layer(call.name, copy.deepcopy(call.module), call.input, call.grad_output)
    ours = _run_layer(call.name, convert(copy.deepcopy(call.module)), call.input, call.grad_output)
    gradient = None if call.grad_output is None else call.grad_output.double()
    reference = _run_layer(call.name, call.module.double(), call.input.double(), gradient)
    scales = _scales(reference)
    for key, exact in reference.items():
        errors = _error(ours[key], exact, scales[key]), _error(theirs[key], exact, scales[key])
        yield Comparison(*key, tuple(exact.shape), *errors, _TOLERANCE[torch.float32])


def _run_layer(name: str, layer: nn.Module, input: Tensor, grad_output: Tensor | None) -> _Values:
    layer.zero_grad(set_to_none=True)
    input = input.clone().requires_grad_()
    output = layer(input.clone())  # a clone, since a leaf cannot be worked on in place
    values = {(name, "output"): output.detach().clone()}
    if grad_output is not None:
        output.backward(grad_output)
        gradients = {"input": input.grad, **{of: parameter.grad for of, parameter in layer.named_parameters()}}
        values |= {(name, f"gradient of {of}"): value for of, value in gradients.items() if value is not None}
    return values


def _values(model: nn.Module, inputs: Tensor, loss: Loss) -> _Values:
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


def _scales(reference: _Values) -> dict[tuple[str, str], float]:
    """What the errors are measured against; see `Comparison`."""
    scales = {key: value.abs().max().item() if value.numel() else 0.0 for key, value in reference.items()}
    shared = {key for key in scales if key[1] not in ("output", "gradient of input")}
    largest = {layer: max(scales[key] for key in shared if key[0] == layer) for layer, _ in shared}
    return {key: largest[key[0]] if key in shared else scale for key, scale in scales.items()}


def _error(value: Tensor, reference: Tensor, scale: float) -> float:
    if reference.numel() == 0:
        return 0.0
    return (value.double() - reference).abs().max().item() / (scale if scale > 0 else 1.0)
