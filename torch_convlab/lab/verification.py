"""Holds a model against torch.nn: every layer's output and every gradient, alone in float32 and together in float64.

Two checks, because a deep network as a whole cannot be compared tightly in float32: rounding opens a few ReLUs that
stay shut in another, equally correct, computation, and their gradients then differ as a whole. So each layer is
compared alone, on the inputs and output gradients that it meets in the network, against float64; and the network is
compared as a whole in float64, where rounding is too small to flip a ReLU.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..conversion import named_layers
from ..convert import convert, revert

Loss = Callable[[Any], Tensor]
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
    kind: str  # "output", "gradient of input", "gradient of <parameter>" or the name of a buffer
    size: tuple[int, ...]
    ours: float
    theirs: float
    tolerance: float
    ours_ulps: float = 0.0  # the same errors in units of the last place of max|reference|
    theirs_ulps: float = 0.0

    @property
    def passes(self) -> bool:
        """Good enough by itself, or not much worse than torch.nn. False for NaN."""
        return self.ours <= max(self.tolerance, _FACTOR * self.theirs)


@dataclass(frozen=True)
class Verification:
    """A model held against torch.nn; see `verify`."""

    layers: list[Comparison]  # every layer alone, in float32, both libraries against float64
    network: list[Comparison]  # the whole in float64, this library against torch.nn
    output: Comparison  # the whole in float32, both libraries against float64
    first_divergence: str | None  # "layer: tensor" of the first that does not pass

    @property
    def passes(self) -> bool:
        return self.first_divergence is None


def verify(model: nn.Module, inputs: Tensor | tuple, loss: Loss | None = None) -> Verification:
    """Holds `model`, as this library computes it, against torch.nn and float64: outputs, gradients, running statistics.

    Args:
        model: in training or eval mode; is copied, and neither converted nor changed. Dropout is switched off.
        inputs: what the model is called with.
        loss: maps the model's output to the scalar whose gradients flow back (default: a random projection).
    """
    model, loss = without_dropout(model), loss or random_projection
    layers, network = verify_layers(model, inputs, loss), verify_network(model, inputs, loss)
    with torch.no_grad():
        exact = _flat(revert(copy.deepcopy(model)).double()(*_double(inputs)))
        ours, theirs = (_flat(change(copy.deepcopy(model))(*_arguments(inputs))) for change in (convert, revert))
    output = _comparison(("network", "output"), ours, theirs, exact, exact.abs().max().item())
    failed = (f"{row.name}: {row.kind}" for row in (*layers, *network, output) if not row.passes)
    return Verification(layers, network, output, next(failed, None))


def random_projection(output) -> Tensor:
    """A scalar that depends on every element of the output (or of all tensors in it), always by the same weights."""
    flat = _flat(output)
    weights = torch.randn(flat.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (flat * weights.to(flat)).sum() / flat.numel() ** 0.5


def _flat(output) -> Tensor:
    tensors = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([tensor.flatten() for tensor in tensors])


def _arguments(inputs: Tensor | tuple) -> tuple:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _double(inputs: Tensor | tuple) -> tuple:
    return _pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, _arguments(inputs))


def _leaves(inputs: Tensor | tuple) -> tuple:
    """Copies that collect gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.is_floating_point())

    return _pytree.tree_map_only(Tensor, leaf, _arguments(inputs))


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in which two runs drop the same elements: none."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


@dataclass
class Call:
    """What one call of one layer read, and the gradient of what it wrote."""

    name: str
    module: nn.Module
    input: Tensor
    grad_output: Tensor | None = None


def verify_layers(model: nn.Module, inputs: Tensor | tuple, loss: Loss) -> list[Comparison]:
    """Every layer alone: ours and torch.nn in float32, both against torch.nn in float64 on the same values.

    Args:
        model: in training or eval mode; is copied, and neither converted nor changed.
        inputs: what the model is called with.
        loss: maps the model's output to the scalar whose gradients flow back.

    Returns:
        In the order in which the layers (modules without children, that read and write one tensor) compute: output,
        gradient of the input, gradients of the parameters, running statistics.
    """
    calls = record(revert(copy.deepcopy(model)), inputs, loss)
    return [comparison for call in calls for comparison in compare(call)]


def verify_network(model: nn.Module, inputs: Tensor | tuple, loss: Loss) -> list[Comparison]:
    """The whole network in float64, ours against torch.nn: all outputs and gradients. See `verify_layers`."""
    twin = revert(copy.deepcopy(model)).double()
    ours_twin = convert(copy.deepcopy(twin))
    theirs = _values(twin, _double(inputs), loss)
    ours = _values(ours_twin, _double(inputs), loss)
    scales = _scales(theirs)
    return [_comparison(key, ours[key], exact, exact, scales[key], torch.float64) for key, exact in theirs.items()]


def record(model: nn.Module, inputs: Tensor | tuple, loss: Loss) -> list[Call]:
    """The calls of all layers of `model`, run in float32 by torch.nn."""
    calls, count, pending = [], Counter(), {}

    def before(module, arguments, name):
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor):
            return
        count[name] += 1
        label = name if count[name] == 1 else f"{name} (call {count[name]})"
        # Copied at once: a layer that works in place, such as ReLU, overwrites what it reads.
        pending[name] = Call(label, copy.deepcopy(module), arguments[0].detach().clone())

    def after(_module, _arguments, output, name):
        call = pending.pop(name, None)
        if call is None or not isinstance(output, Tensor):
            return
        calls.append(call)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(call, "grad_output", gradient.detach().clone()))

    handles = []
    for name, module in named_layers(model):
        handles.append(module.register_forward_pre_hook(lambda *arguments, name=name: before(*arguments, name)))
        handles.append(module.register_forward_hook(lambda *arguments, name=name: after(*arguments, name)))
    loss(model(*_leaves(inputs))).backward()
    for handle in handles:
        handle.remove()
    return calls


def compare(call: Call) -> Iterator[Comparison]:
    """Ours and torch.nn in float32 against torch.nn in float64, on what the layer met in the network."""
    for handles in (call.module._forward_hooks, call.module._forward_pre_hooks):
        handles.clear()
    theirs = _run_layer(call.name, copy.deepcopy(call.module), call.input, call.grad_output)
    ours = _run_layer(call.name, convert(copy.deepcopy(call.module)), call.input, call.grad_output)
    gradient = None if call.grad_output is None else call.grad_output.double()
    reference = _run_layer(call.name, copy.deepcopy(call.module).double(), call.input.double(), gradient)
    scales = _scales(reference)
    for key, exact in reference.items():
        yield _comparison(key, ours[key], theirs[key], exact, scales[key])


def _run_layer(name: str, layer: nn.Module, input: Tensor, grad_output: Tensor | None) -> _Values:
    layer.zero_grad(set_to_none=True)
    input = input.clone().requires_grad_(input.is_floating_point())
    output = layer(input.clone())  # a clone, since a leaf cannot be worked on in place
    values = {(name, "output"): output.detach().clone()}
    if grad_output is not None:
        output.backward(grad_output)
        gradients = {"input": input.grad, **{of: parameter.grad for of, parameter in layer.named_parameters()}}
        values |= {(name, f"gradient of {of}"): value for of, value in gradients.items() if value is not None}
    return values | {(name, of): value for of, value in _statistics(layer)}


def _values(model: nn.Module, inputs: Tensor, loss: Loss) -> _Values:
    outputs, count = {}, Counter()

    def keep(_module, _arguments, output, name):
        count[name] += 1
        if isinstance(output, Tensor):
            outputs[name if count[name] == 1 else f"{name} (call {count[name]})", "output"] = output.detach().clone()

    handles = [
        module.register_forward_hook(lambda *arguments, name=name: keep(*arguments, name))
        for name, module in named_layers(model)
    ]
    leaves = _leaves(inputs)
    model.zero_grad(set_to_none=True)
    loss(model(*leaves)).backward()
    for handle in handles:
        handle.remove()
    first = next((leaf for leaf in _pytree.tree_leaves(leaves) if isinstance(leaf, Tensor)), None)
    gradients = {("network", "gradient of input"): None if first is None else first.grad}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        gradients[layer, f"gradient of {kind}"] = parameter.grad
    statistics = {(name, of): value for name, layer in named_layers(model) for of, value in _statistics(layer)}
    return {**outputs, **{key: value for key, value in gradients.items() if value is not None}, **statistics}


def _statistics(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a call in training mode changes."""
    if layer.training and isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
        yield from ((name, getattr(layer, name).detach().clone()) for name in ("running_mean", "running_var"))


def _scales(reference: _Values) -> dict[tuple[str, str], float]:
    """What the errors are measured against; see `Comparison`."""
    scales = {key: value.abs().max().item() if value.numel() else 0.0 for key, value in reference.items()}
    shared = {key for key in scales if key[1].startswith("gradient of ") and key[1] != "gradient of input"}
    largest = {layer: max(scales[key] for key in shared if key[0] == layer) for layer, _ in shared}
    return {key: largest[key[0]] if key in shared else scale for key, scale in scales.items()}


def _comparison(key, ours, theirs, exact, scale: float, dtype: torch.dtype = torch.float32) -> Comparison:
    errors = [_error(value, exact, scale) for value in (ours, theirs)]
    unit = math.ulp(scale) * (torch.finfo(dtype).eps / torch.finfo(torch.float64).eps)  # the spacing of `dtype` there
    ulps = [error * scale / unit for error in errors]
    return Comparison(*key, tuple(exact.shape), *errors, _TOLERANCE[dtype], *ulps)


def _error(value: Tensor, reference: Tensor, scale: float) -> float:
    if reference.numel() == 0:
        return 0.0
    return (value.double() - reference).abs().max().item() / (scale if scale > 0 else 1.0)
