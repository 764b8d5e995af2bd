"""Folds batch norm into the layer before it, for inference (lecture item L15: "free at test time").

In eval mode batch norm is a line per channel, ``y = scale*x + shift`` with ``scale = weight / sqrt(running_var + eps)``
and ``shift = bias - running_mean*scale``. A convolution or linear layer absorbs it: its filters are multiplied by
``scale``, and its bias becomes ``bias*scale + shift``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import nn as layers
from ._activation import NONE, as_clamp, module_of
from ._hooks import has_hooks
from .convert import conversions
from .nn import timm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BATCH_NORMS_RELU = (layers.BatchNormReLU1d, layers.BatchNormReLU2d, layers.BatchNormReLU3d)


@dataclass(frozen=True)
class Fusion:
    """What became, or would become, of one batch norm: `reason` is empty if it is folded into `producer`."""

    batch_norm: str
    producer: str
    reason: str

    @property
    def folds(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.folds:
            return f"{self.batch_norm}: folded into {self.producer}"
        return f"{self.batch_norm}: left alone, {self.reason}"


def plan(model: nn.Module, graph: fx.Graph | None) -> list[Fusion]:
    """What to do with every batch norm; without the model's graph, pairs are looked for in `torch.nn.Sequential`."""
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if graph is None:
        producers = dict(_sequential_pairs(model))
        missing = "not directly after another layer inside torch.nn.Sequential"
    else:
        producers = _traced_pairs(graph)
        missing = "tracing does not reach it: it is not called, or inside a layer taken as a whole"
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(parameter) for module in model.modules() for parameter in vars(module)["_parameters"].values())
    fusions = []
    for name, norm in norms.items():
        producer, reason = producers.get(name, ("", missing))
        if not reason:
            reason = _refusal(model.get_submodule(producer), norm, uses, owners)
        fusions.append(Fusion(name, producer, reason))
    return fusions


def _traced_pairs(graph: fx.Graph) -> dict[str, tuple[str, str]]:
    """Name of a batch norm -> name of what it reads, and a reason not to fold it, seen from the graph."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {
        ".".join(path[:length])
        for path in (node.target.split(".") for node in graph.nodes if node.op in ("get_attr", "call_module"))
        for length in range(1, len(path))
    }
    pairs = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            pairs[node.target] = "", "it does not read the output of a layer"
        elif calls[node.target] > 1:
            pairs[node.target] = source.target, "it is called several times"
        elif calls[source.target] > 1:
            pairs[node.target] = source.target, f"{source.target} is called several times"
        elif len(source.users) > 1:
            pairs[node.target] = source.target, f"the output of {source.target} is read elsewhere too"
        elif read & {node.target, source.target}:
            pairs[node.target] = source.target, "forward reads the parameters or parts of one of the two itself"
        else:
            pairs[node.target] = source.target, ""
    return pairs


def _sequential_pairs(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            names = [f"{prefix}.{name}" if prefix else name for name in module._modules]
            for first, second in itertools.pairwise(names):
                yield second, (first, "")


def _refusal(producer: nn.Module, norm: nn.Module, uses: Counter, owners: Counter) -> str:
    """Why `norm` cannot be folded into `producer`, empty if it can. Exact types only: a subclass may do anything."""
    kind = _plain(producer)
    if kind not in PRODUCERS:
        return f"what it reads is a {type(producer).__name__}"
    if _plain(norm) not in _BATCH_NORMS + _BATCH_NORMS_RELU and not timm.is_batch_norm(norm):
        return f"its type is {type(norm).__name__}"
    if norm.training or producer.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.num_features != _channels(producer):
        return f"it has {norm.num_features} features, the layer before it {_channels(producer)} channels"
    if "forward" in vars(norm) or "forward" in vars(producer):
        return "one of the two has a forward of its own"
    if has_hooks(norm) or has_hooks(producer):
        return "one of the two has hooks"
    if uses[id(norm)] > 1 or uses[id(producer)] > 1:
        return "one of the two appears in several places"
    folded = [producer.weight, producer.bias]
    if any(owners[id(parameter)] > 1 for parameter in folded if parameter is not None):
        return "its parameters are shared with another layer"
    return ""


def fold(model: nn.Module, fusion: Fusion):
    """Folds one pair; returns a function that takes it back."""
    producer, norm = model.get_submodule(fusion.producer), model.get_submodule(fusion.batch_norm)
    weight, bias = producer.weight, producer.bias
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        if bias is not None:
            shift = shift + bias.double() * scale
        folded = weight.double() * _per_filter(scale, producer)
        producer.weight = nn.Parameter(folded.to(weight.dtype), requires_grad=weight.requires_grad)
        producer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    model.set_submodule(fusion.batch_norm, _remainder(norm))

    def restore() -> None:
        producer.weight, producer.bias = weight, bias
        model.set_submodule(fusion.batch_norm, norm)

    return restore


def _remainder(norm: nn.Module) -> nn.Module:
    """What the batch norm computes besides."""
    if timm.is_batch_norm(norm):
        return timm.remainder(norm)
    return module_of(as_clamp(norm.relu) if type(norm) in _BATCH_NORMS_RELU else NONE).eval()


def _per_filter(scale: Tensor, producer: nn.Module) -> Tensor:
    """`scale`, one number per output channel, in the shape in which it multiplies the weight."""
    weight = producer.weight
    ones = [1] * (weight.dim() - 2)
    if _plain(producer) not in _TRANSPOSED:
        return scale.view(-1, 1, *ones)
    # A transposed weight is (groups * inputs) x outputs: every group has its own outputs.
    per_group = scale.view(producer.groups, 1, -1).expand(-1, weight.shape[0] // producer.groups, -1)
    return per_group.reshape(weight.shape[0], -1, *ones)


def _channels(producer: nn.Module) -> int:
    return producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels


def _plain(module: nn.Module) -> type:
    """The torch.nn type of which `module` is an instance, or the twin in this library; else its own type."""
    return {ours: theirs for theirs, ours in conversions().items()}.get(type(module), type(module))
