"""How the receptive field grows through a model (lecture items L3 and L21): by theory, and measured by gradients.

The theoretical field is what can reach an output; the effective one is what does. Its gradient falls off from the
middle, like a binomial distribution, so that most of it lies in a small part (Luo, Li, Urtasun and Zemel,
"Understanding the effective receptive field in deep convolutional neural networks", NeurIPS 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from . import exported
from .errors import LabError
from .fields import Field, receptive_fields
from .figure import INK, OURS, THEIRS, style

SHARE = 0.95  # of the gradient's magnitude that the effective field holds
_MAPS = 6  # that the picture shows


@dataclass(frozen=True)
class LayerField:
    """One layer at which the field grows. Places are pixels of the input, one pair or number per spatial axis.

    `theoretical` are the first and the last pixel that can reach the output in the middle; both may lie in the padding.
    `effective` are those of the smallest interval around its centre that holds 95 % of the gradient's magnitude.
    `magnitude` is the mean over examples, and the sum over channels, of the absolute gradient.
    """

    name: str
    operation: str
    output_size: tuple[int, ...]  # spatial
    size: tuple[int, ...]
    stride: tuple[float, ...]
    theoretical: tuple[tuple[float, float], ...]
    effective: tuple[tuple[int, int], ...]
    magnitude: Tensor = field(repr=False)

    @property
    def effective_size(self) -> tuple[int, ...]:
        return tuple(last - first + 1 for first, last in self.effective)


@dataclass(frozen=True)
class FieldGrowth:
    """The layers at which the receptive field grows, in order. Made by `receptive_field`."""

    model: str
    input_size: tuple[int, ...]
    layers: list[LayerField]

    def draw(self) -> Figure:
        """The theoretical fields as squares on the input, both sizes by depth, and where the gradients are.

        Raises:
            LabError: an input that is not two-dimensional.
        """
        if len(self.input_size) != 4:
            raise LabError(f"expected an input N x C x H x W to draw, but got {self.input_size}")
        shown = _spread_out(self.layers, _MAPS)
        with style():
            figure = pyplot.figure(figsize=(11, 6.4))
            rows = figure.subfigures(2, 1, height_ratios=(1.5, 1))
            fields_axes, sizes_axes = rows[0].subplots(1, 2)
            self._draw_fields(fields_axes)
            self._draw_sizes(sizes_axes)
            for axes, layer in zip(rows[1].subplots(1, len(shown), squeeze=False)[0], shown):
                self._draw_map(axes, layer)
        return figure

    def _draw_fields(self, axes):
        height, width = self.input_size[2:]
        colors = pyplot.get_cmap("turbo")  # all of it is seen on white and on black
        for place, layer in enumerate(self.layers):
            color = colors(0.1 + 0.8 * place / max(1, len(self.layers) - 1))
            axes.add_patch(_box(layer.theoretical, edgecolor=color, linewidth=1.5, gid=f"field-{place}"))
            axes.plot([], [], color=color, label=f"{layer.name} {layer.size[0]}") if len(self.layers) <= 12 else None
        axes.add_patch(Rectangle((-0.5, -0.5), width, height, facecolor="#808080", alpha=0.2, gid="input"))
        low = min(0, *(first for layer in self.layers for first, _ in layer.theoretical))
        high = max(height, width, *(last for layer in self.layers for _, last in layer.theoretical))
        axes.set(xlim=(low - 1, high + 1), ylim=(high + 1, low - 1), aspect="equal")
        axes.set_title(f"fields of the middle outputs on the {height} x {width} input (grey)", fontsize=10)
        if len(self.layers) <= 12:
            axes.legend(fontsize=7, loc="upper left")

    def _draw_sizes(self, axes):
        depth = range(1, len(self.layers) + 1)
        axes.plot(
            depth,
            [layer.size[0] for layer in self.layers],
            "o-",
            color=THEIRS,
            label="theoretical",
            linewidth=4,
            alpha=0.6,
        )
        effective = [layer.effective_size[0] for layer in self.layers]
        axes.plot(depth, effective, "o-", color=OURS, label="effective (95 % of the gradient)", markersize=4)
        axes.axhline(self.input_size[2], color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="layer at which the field grows", ylabel="pixels of the input")
        axes.set_title("growth with depth; dotted: the input", fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)

    def _draw_map(self, axes, layer):
        axes.imshow(
            (layer.magnitude / layer.magnitude.max().clamp_min(1e-30)).sqrt().numpy(), cmap="magma", vmin=0, vmax=1
        )
        limits = axes.get_xlim(), axes.get_ylim()
        axes.add_patch(_box(layer.theoretical, edgecolor=THEIRS, linewidth=1.5, gid="theoretical"))
        axes.add_patch(_box(layer.effective, edgecolor=OURS, linewidth=1.5, gid="effective"))
        axes.set(xlim=limits[0], ylim=limits[1], xticks=[], yticks=[])
        sizes = f"{layer.size[0]}, effective {layer.effective_size[0]}"
        axes.set_title(f"{layer.name}\n{sizes}", fontsize=8)


def receptive_field(
    model: nn.Module,
    shape: tuple[int, ...],
    name: str = "model",
    examples: int = 4,
    seed: int = 0,
    most: int | None = None,
    track: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> FieldGrowth:
    """Receptive field of the output in the middle, at every layer that makes it larger.

    Args:
        model: any module that `torch.export` can follow; computed in eval mode, not changed.
        shape: of the input, ``N x C x *spatial``; N does not matter.
        name: of the model, for messages.
        examples: random inputs (normal, mean 0, deviation 1) over which the gradient's magnitude is averaged.
        seed: of inputs, and of the random direction among the channels whose gradient is taken.
        most: look at no more layers than this, evenly spread; default: at all.
        track: wraps the loop over the layers, for progress.

    Raises:
        LabError: the model cannot be exported, or no layer has a receptive field along all axes.
    """
    if len(shape) < 3:
        raise LabError(f"expected an input with spatial axes such as 1,3,224,224, but got {shape}")
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, *shape[1:], generator=generator)
    program = exported.export(model, torch.zeros(shape), name)
    fields = receptive_fields(program)
    growing, largest = {}, (1,) * (len(shape) - 2)
    for step in program.steps:
        known = fields[step.node]
        if any(one is None or one.whole for one in known) or step.output.dim() != len(shape):
            continue
        size = tuple(one.size for one in known)
        if any(one > before for one, before in zip(size, largest)) and not any(
            map(math.isnan, (f.jump for f in known))
        ):
            growing[step.node] = step
            largest = tuple(map(max, size, largest))
    if not growing:
        raise LabError(f"{name} has no layer whose receptive field grows and is known along all axes")
    if most is not None:
        growing = dict(_spread_out(list(growing.items()), most))
    if shape[0] != examples:  # export fixes the batch
        program = exported.export(model, torch.zeros(examples, *shape[1:]), name)
    middles = _middles(program, inputs.requires_grad_(), {step.name for step in growing.values()}, generator)
    layers = []
    for node, step in track(growing.items(), "layers"):
        (gradient,) = torch.autograd.grad(middles[step.name], inputs, retain_graph=True)
        layers.append(_layer(step, fields[node], gradient.abs().sum(1).mean(0)))
    return FieldGrowth(name, tuple(shape), layers)


def _middles(program, inputs: Tensor, names: set[str], generator) -> dict[str, Tensor]:
    """By name of the step: its output in the middle in one random direction among the channels, over all examples."""
    result = {}

    def call(step, function, arguments, keywords):
        output = function(*arguments, **keywords)
        if step is not None and step.name in names:
            value = output[0] if isinstance(output, (tuple, list)) else output
            middle = value[(slice(None), slice(None), *(size // 2 for size in value.shape[2:]))]
            # Taken now: a later operator may work in place.
            result[step.name] = (middle * torch.randn(middle.shape[1], generator=generator)).sum()
        return output

    exported.run(program, inputs, call)
    return result


def _layer(step, known: tuple[Field, ...], magnitude: Tensor) -> LayerField:
    output_size = tuple(step.output.shape[2:])
    theoretical, effective = [], []
    for axis, (one, outputs) in enumerate(zip(known, output_size)):
        center = one.center + (outputs // 2) * one.jump
        theoretical.append((center - (one.size - 1) / 2, center + (one.size - 1) / 2))
        profile = magnitude.movedim(axis, 0).flatten(1).sum(1) if len(known) > 1 else magnitude
        effective.append(central_interval(profile, center))
    return LayerField(
        step.name,
        step.operation,
        output_size,
        tuple(one.size for one in known),
        tuple(one.jump for one in known),
        tuple(theoretical),
        tuple(effective),
        magnitude.detach(),
    )


def central_interval(profile: Tensor, center: float, share: float = SHARE) -> tuple[int, int]:
    """First and last place of the smallest interval around `center` that holds `share` of the sum of `profile`."""
    distance = (torch.arange(len(profile)) - center).abs()
    order = distance.argsort(stable=True)
    held = profile.double()[order].cumsum(0) / profile.double().sum().clamp_min(1e-300)
    last = int((held < share - 1e-12).sum().clamp_max(len(profile) - 1))
    inside = (distance <= distance[order[last]] + 1e-9).nonzero().flatten()
    return int(inside[0]), int(inside[-1])


def _box(intervals, **look) -> Rectangle:
    (top, bottom), (left, right) = intervals
    return Rectangle((left - 0.5, top - 0.5), right - left + 1, bottom - top + 1, fill=False, **look)


def _spread_out(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
