"""The lecture's "devils in the details", looked for in a model (items L12, L14 to L17) and in how it is called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .. import build_info
from .errors import LabError
from .exported import Program, Step, export

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_SAMPLES = 8  # per device, for batch statistics (item L17)
_WASTE = 0.2  # of the lanes of a vector
_LANES = {"baseline": 4, "avx2": 8, "avx512": 16}  # of float32


@dataclass(frozen=True)
class Advice:
    """One finding; `where` names the layers."""

    rule: str
    where: list[str]
    message: str


def advise(model: nn.Module, inputs: Tensor, name: str = "model") -> list[Advice]:
    """Looks for common mistakes in a model in the mode (training or eval) in which it is.

    Rules: ``small-batch``, ``train-mode-norm``, ``norm-without-statistics``, ``bias-before-norm``, ``flatten-head``,
    ``memory-format``, ``vector-lanes``, ``foldable-norm``.

    Args:
        inputs: what it is called with on one device: their size and memory format matter, not their values.

    Returns:
        No entry where there is nothing to say. Rules that need the graph are skipped where it cannot be exported.
    """
    found = [*_modes(model), *_small_batch(model, inputs), *_memory_format(model, inputs)]
    try:
        program = export(model, inputs, name)
    except LabError:
        return found
    return [*found, *_bias_before_norm(program), *_flatten_head(program), *_lanes(program), *_foldable(program, model)]


def _modes(model: nn.Module) -> Iterator[Advice]:
    sensitive = (_BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.modules.dropout._DropoutNd)
    training = [name for name, module in model.named_modules() if isinstance(module, sensitive) and module.training]
    if training and not model.training:
        yield Advice(
            "train-mode-norm", training,
            "in training mode although the model is in eval mode: outputs then depend on the other samples of the "
            "batch (batch norm) or on chance (dropout). Call eval() on the whole model before testing",
        )  # fmt: skip
    without = [
        name for name, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS) and not module.track_running_stats
    ]  # fmt: skip
    if without:
        yield Advice(
            "norm-without-statistics", without,
            "batch norm without running statistics uses those of the batch at test time too: a sample's output depends "
            "on the other samples",
        )  # fmt: skip


def _small_batch(model: nn.Module, inputs: Tensor) -> Iterator[Advice]:
    norms = [name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)]
    synchronized = all(
        isinstance(module, nn.SyncBatchNorm) for module in model.modules() if isinstance(module, _BATCH_NORMS)
    )
    batch = inputs.shape[0]
    if norms and not synchronized and batch < _SAMPLES:
        yield Advice(
            "small-batch", norms,
            f"training with {batch} sample(s) per device makes the statistics of batch norm poor; at least "
            f"{_SAMPLES} are wanted. Otherwise synchronize them over devices (torch.nn.SyncBatchNorm."
            "convert_sync_batchnorm) or use group norm",
        )  # fmt: skip


def _memory_format(model: nn.Module, inputs: Tensor) -> Iterator[Advice]:
    last, first = [], []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Conv2d) or not isinstance(weight, Tensor):
            continue
        if weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
            continue  # both at once: 1x1, or one channel
        (first if weight.is_contiguous() else last).append(name)
    if first and last:
        yield Advice(
            "memory-format", min(first, last, key=len),
            f"some weights are channels_last ({len(last)}) and some are not ({len(first)}): a weight in the other "
            "format than its input is copied at every call. Call model.to(memory_format=...) once, on the whole model",
        )  # fmt: skip
    elif inputs.dim() == 4 and (first or last):
        ambiguous = inputs.is_contiguous() and inputs.is_contiguous(memory_format=torch.channels_last)
        is_last = inputs.is_contiguous(memory_format=torch.channels_last)
        if not ambiguous and is_last != bool(last):
            own, other = ("channels_last", "NCHW") if last else ("NCHW", "channels_last")
            yield Advice(
                "memory-format", last or first,
                f"the weights are {own} and the input is {other}: one of the two is reordered in every layer. Bring "
                "both to one format",
            )  # fmt: skip


def _bias_before_norm(program: Program) -> Iterator[Advice]:
    where = []
    for step in program.steps:
        linear = step.is_convolution or step.is_linear
        users = [user for user in step.node.users if user.op == "call_function"]
        if linear and isinstance(step.arguments.get("bias"), fx.Node) and len(users) == 1:
            target = getattr(users[0].target, "overloadpacket", None)
            if getattr(target, "__name__", "") in ("batch_norm", "instance_norm", "_native_batch_norm_legit"):
                where.append(step.name)
    if where:
        yield Advice(
            "bias-before-norm", where,
            "the normalization that follows subtracts the mean and the bias with it: the bias learns nothing and costs "
            "memory and time. Build these layers with bias=False",
        )  # fmt: skip


def _flatten_head(program: Program) -> Iterator[Advice]:
    """A linear layer that reads a flattened image (item L12)."""
    steps = {step.node: step for step in program.steps}
    for step in program.steps:
        if not step.is_linear:
            continue
        source = step.reads[0]
        while source in steps and steps[source].operation in ("dropout", "relu", "contiguous"):
            source = steps[source].reads[0]
        if source not in steps or steps[source].operation not in ("flatten", "view", "reshape"):
            continue
        image = steps[source].reads[0].meta["val"]
        if image.dim() != 4 or math.prod(image.shape[2:]) <= 1 or step.weight_size[1] != math.prod(image.shape[1:]):
            continue
        channels, pixels, outputs = image.shape[1], math.prod(image.shape[2:]), step.weight_size[0]
        yield Advice(
            "flatten-head", [step.name],
            f"reads a flattened image of {' x '.join(map(str, image.shape[1:]))}: {channels * pixels * outputs:,} "
            f"weights, and one input size only. Global average pooling in front leaves {channels * outputs:,} "
            f"({pixels} times fewer) and takes any size",
        )  # fmt: skip


def _lanes(program: Program) -> Iterator[Advice]:
    lanes = _LANES.get(str(build_info()["instruction_set"]), 16)
    where: dict[str, int] = {}
    for step in program.steps:
        if not step.is_convolution or _is_depthwise(step):
            continue
        channels = step.convolution().weight_size[1 if step.convolution().transposed else 0]
        per_group = channels if step.convolution().transposed else channels // step.convolution().groups
        used = per_group / (math.ceil(per_group / lanes) * lanes)
        if used < 1 - _WASTE:
            where[step.name] = per_group
    if where:
        spelled = ", ".join(f"{name}: {channels}" for name, channels in list(where.items())[:6])
        yield Advice(
            "vector-lanes", list(where),
            f"output channels (per group) that leave over {100 * _WASTE:.0f} % of the lanes of {lanes} float32 idle: "
            f"{spelled}{', ...' if len(where) > 6 else ''}. Multiples of {lanes} use them all",
        )  # fmt: skip


def _is_depthwise(step: Step) -> bool:
    problem = step.convolution()
    return problem.groups == problem.input_size[1] == problem.weight_size[0]


def _foldable(program: Program, model: nn.Module) -> Iterator[Advice]:
    """Batch norm directly behind a convolution that nothing else reads (item L15)."""
    where = []
    producers = {step.node: step for step in program.steps if step.is_convolution or step.is_linear}
    for step in program.steps:
        if step.operation == "batch_norm" and step.reads[0] in producers and len(step.reads[0].users) == 1:
            where.append(step.name)
    if where and not model.training:
        yield Advice(
            "foldable-norm", where,
            "at test time this batch norm is a line per channel, which the layer before it can absorb: "
            "torch_convlab.fuse(model) makes it free",
        )  # fmt: skip
