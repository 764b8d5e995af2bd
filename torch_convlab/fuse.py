"""Folds batch norm into the layer before it, for inference (lecture item L15: "free at test time").

In eval mode batch norm is a line per channel, ``y = scale*x + shift`` with ``scale = weight / sqrt(running_var + eps)``
and ``shift = bias - running_mean*scale``. A convolution or linear layer absorbs it: its filters are multiplied by
``scale``, and its bias becomes ``bias*scale + shift``.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from . import nn as layers
from .convert import conversions

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What is left of a folded batch norm.
_REMAINDER = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), nn.Identity),
    **dict.fromkeys((layers.BatchNormReLU1d, layers.BatchNormReLU2d, layers.BatchNormReLU3d), nn.ReLU),
}
_RECORD = "_convlab_fusions"


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


def fuse(model: nn.Module, example_inputs: Tensor | tuple | None = None) -> nn.Module:
    """Fold every batch norm that directly follows a convolution or linear layer; in place, returns `model`.

    The pairs are found by tracing the model with `torch.fx`; the batch norm must be the only reader of the layer
    before it, each of the two must be called once and carry no hooks, and the folded parameters must belong to that
    layer alone. A folded batch norm becomes `torch.nn.Identity` (`torch.nn.ReLU` if it was fused with one), so that
    the other layers keep their names, and its keys leave the state_dict. Weights are folded in float64 and rounded
    once. The layer gets new Parameters: an optimizer that holds the old ones no longer trains it.

    Where the model cannot be traced (its forward pass branches on values, say), pairs are taken from consecutive
    children of `torch.nn.Sequential`, and a warning says so: it cannot be seen then whether other code reads the
    layer in between.

    Args:
        model: in eval mode. Plain torch.nn layers and this library's are folded, in any mixture.
        example_inputs: what to call the model with (a tuple of arguments, or the one tensor), to check that the
            outputs stay the same. Without them a linear layer before a batch norm is taken to read ``N x D``.

    Raises:
        RuntimeError: the model is in training mode, in which batch norm depends on the batch; or its outputs on
            `example_inputs` changed beyond rounding (`model` is then as it was before).
    """
    if model.training:
        raise RuntimeError("fuse needs the model in eval mode, but it is in training mode; call model.eval() first")
    fusions = _plan(model)
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    before = _outputs(model, arguments) if example_inputs is not None else []
    undo = []
    for fusion in fusions:
        if fusion.folds:
            undo.append(_fold(model, fusion))
    if example_inputs is not None:
        difference = _difference(before, _outputs(model, arguments))
        if difference:
            for restore in reversed(undo):
                restore()
            raise RuntimeError(f"fusing changed the outputs beyond rounding and was undone: {difference}")
    setattr(model, _RECORD, list(vars(model).get(_RECORD, ())) + [fusion for fusion in fusions if fusion.folds])
    return model


def fusion_report(model: nn.Module) -> list[Fusion]:
    """One entry for every batch norm of `model`: folded by `fuse` already, foldable, or the reason why not."""
    return list(vars(model).get(_RECORD, ())) + _plan(model)


def _plan(model: nn.Module) -> list[Fusion]:
    """What to do with every batch norm in the model."""
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if not norms:
        return []
    try:
        graph = _trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        warnings.warn(
            f"cannot trace {type(model).__name__} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); only "
            "batch norms that directly follow a layer inside torch.nn.Sequential are folded",
            stacklevel=3,
        )
        producers = dict(_sequential_pairs(model))
        missing = "not directly after another layer inside torch.nn.Sequential"
    else:
        producers, missing = (
            _traced_pairs(graph),
            "tracing does not reach it: it is not called, or inside a layer taken as a whole",
        )
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(parameter) for module in model.modules() for parameter in vars(module)["_parameters"].values())
    fusions = []
    for name, norm in norms.items():
        producer, reason = producers.get(name, ("", missing))
        if not reason:
            reason = _refusal(model.get_submodule(producer), norm, uses, owners)
        fusions.append(Fusion(name, producer, reason))
    return fusions


class _Tracer(fx.Tracer):
    """Does not look into our layers, nor into modules with hooks, which must not run on placeholders."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__.startswith(layers.__name__)
        return (ours and not module._modules) or _has_hooks(module) or super().is_leaf_module(module, name)


def _trace(model: nn.Module) -> fx.Graph:
    if "forward" in vars(model):
        raise TypeError("its forward is set on the instance, and torch.fx would trace that of the class")
    return _Tracer().trace(model, concrete_args=_defaults(model))


def _defaults(model: nn.Module) -> dict[str, object]:
    """Arguments of forward that have a default, at that default: a placeholder would take other branches."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _traced_pairs(graph: fx.Graph) -> dict[str, tuple[str, str]]:
    """Name of a batch norm -> name of what it reads, and a reason not to fold it, seen from the graph."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
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
            pairs[node.target] = source.target, "forward reads the parameters of one of the two itself"
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
    if kind not in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear):
        return f"what it reads is a {type(producer).__name__}"
    if _plain(norm) not in _REMAINDER:
        return f"its type is {type(norm).__name__}"
    if norm.training or producer.training:
        return "it is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm.num_features != _channels(producer):
        return f"it has {norm.num_features} features, the layer before it {_channels(producer)} channels"
    if "forward" in vars(norm) or "forward" in vars(producer):
        return "one of the two has a forward of its own"
    if _has_hooks(norm) or _has_hooks(producer):
        return "one of the two has hooks"
    if uses[id(norm)] > 1 or uses[id(producer)] > 1:
        return "one of the two appears in several places"
    folded = [producer.weight, producer.bias]
    if any(owners[id(parameter)] > 1 for parameter in folded if parameter is not None):
        return "its parameters are shared with another layer"
    return ""


def _fold(model: nn.Module, fusion: Fusion):
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
    model.set_submodule(fusion.batch_norm, _REMAINDER[_plain(norm)]().eval())

    def restore() -> None:
        producer.weight, producer.bias = weight, bias
        model.set_submodule(fusion.batch_norm, norm)

    return restore


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


def _has_hooks(module: nn.Module) -> bool:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _outputs(model: nn.Module, arguments: tuple) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(*arguments)
    return [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(before: list[Tensor], after: list[Tensor]) -> str:
    """Where the outputs differ by more than rounding through a deep network explains; empty if nowhere."""
    for index, (old, new) in enumerate(zip(before, after)):
        if not old.is_floating_point():
            continue
        tolerance = torch.finfo(old.dtype).eps * 1e4 if old.dtype in (torch.float32, torch.float64) else 0.1
        old, new = old.double(), new.double()
        limit = tolerance * old[old.isfinite()].abs().max().item() if old.isfinite().any() else 0.0
        if not torch.allclose(old, new, rtol=0, atol=limit, equal_nan=True):
            return f"output {index} differs by {(new - old).abs().max().item():.2e}, more than {limit:.2e}"
    return ""
