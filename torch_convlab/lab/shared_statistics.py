"""Which elements of a batch share statistics in batch, layer, instance and group norm (lecture items L14 and L17).

Nothing here knows the answer beforehand: the sets are read off the gradients of this library's layers, since an
element of the output depends on exactly the inputs whose mean and variance it was normalised by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from .. import nn
from .errors import LabError
from .figure import INK, OURS, style


@dataclass(frozen=True)
class Normalization:
    """What one kind of normalization did to a batch.

    `sets` numbers, per element of the input (``N x C x H x W``), the set of elements that it shares mean and variance
    with; `output` is the normalised batch, without learnable scale and shift.
    """

    name: str
    sets: Tensor
    output: Tensor
    depends_on_batch: bool  # whether an example's output changes when the others do

    @property
    def set_count(self) -> int:
        return int(self.sets.max()) + 1

    @property
    def set_size(self) -> int:
        """Elements per set; all sets are of one size."""
        return self.sets.numel() // self.set_count

    def spread(self) -> tuple[float, float]:
        """Standard deviation of the examples' means, and of the channels' means: 0 if the layer takes the difference
        between examples, or channels, away."""
        return spread(self.output)


@dataclass(frozen=True)
class Normalizations:
    """The four kinds, applied to one batch. Made by `normalize`."""

    input: Tensor
    groups: int
    kinds: list[Normalization]

    def __getitem__(self, name: str) -> Normalization:
        return next(kind for kind in self.kinds if kind.name == name)

    def draw(self) -> Figure:
        """Per kind: the first set marked among all elements, then means and deviations per example and channel."""
        n, c, height, width = self.input.shape
        columns = [("input", None, self.input), *((kind.name, kind.sets, kind.output) for kind in self.kinds)]
        with style():
            figure, grid = pyplot.subplots(3, len(columns), figsize=(2.6 * len(columns), 7.4), squeeze=False)
            for (sets_axes, mean_axes, deviation_axes), (name, sets, output) in zip(grid.T, columns):
                if sets is None:
                    sets_axes.axis("off")
                    sets_axes.text(
                        0, 0.5, f"{n} examples (rows)\n{c} channels (columns)\n{height} x {width} pixels each"
                    )
                else:
                    self._draw_sets(sets_axes, name, sets)
                title = "mean" if sets is not None else "mean per example and channel"
                _heat(mean_axes, output.mean((2, 3)), title, self.input)
                title = "deviation" if sets is not None else "deviation per example and channel"
                _heat(deviation_axes, output.std((2, 3), correction=0), title, self.input)
            figure.tight_layout()
        return figure

    def _draw_sets(self, axes, name, sets):
        n, c, height, width = sets.shape
        first = (sets == sets[0, 0, 0, 0]).double()
        axes.imshow(
            first.permute(0, 2, 1, 3).reshape(n * height, c * width).numpy(),
            cmap=_two_colors(),
            vmin=0,
            vmax=1,
            aspect="equal",
        )
        for row in range(n + 1):
            axes.axhline(row * height - 0.5, color=INK, linewidth=0.8)
        for column in range(c + 1):
            axes.axvline(column * width - 0.5, color=INK, linewidth=0.8)
        axes.set_xticks([(channel + 0.5) * width - 0.5 for channel in range(c)], [str(channel) for channel in range(c)])
        axes.set_yticks(
            [(example + 0.5) * height - 0.5 for example in range(n)], [str(example) for example in range(n)]
        )
        count = len(torch.unique(sets))
        axes.set(title=f"{name}\n{count} sets of {sets.numel() // count}", xlabel="channel", ylabel="example")
        axes.tick_params(length=0)


def normalize(input: Tensor | None = None, groups: int = 2) -> Normalizations:
    """Apply batch, layer, instance and group norm to one batch and find which elements share statistics.

    Args:
        input: ``N x C x H x W``, with at least 3 pixels; default: `example_batch`.
        groups: of the group norm; divides C.

    Raises:
        LabError: another number of dimensions, too few elements, or `groups` that do not divide C.

    >>> {kind.name: (kind.set_count, kind.set_size) for kind in normalize().kinds}["batch"]
    (6, 64)
    """
    input = example_batch() if input is None else input.detach().double()
    if input.dim() != 4 or input.shape[2] * input.shape[3] < 3:
        raise LabError(f"expected input N x C x H x W with at least 3 pixels, but got {tuple(input.shape)}")
    n, c = input.shape[:2]
    if n < 1 or c < 1 or groups < 1 or c % groups:
        raise LabError(f"expected groups to divide the {c} channels, but got {groups}")
    layers = {
        "batch": nn.BatchNorm2d(c, affine=False, track_running_stats=False),
        "layer": nn.LayerNorm(input.shape[1:], elementwise_affine=False),
        "instance": nn.InstanceNorm2d(c),
        "group": nn.GroupNorm(groups, c, affine=False),
    }
    kinds = []
    for name, layer in layers.items():
        layer = layer.double()
        output = layer(input)
        depends = n > 1 and not torch.equal(layer(torch.cat([input[:1], 2 * input[1:] + 1]))[0], output[0])
        kinds.append(Normalization(name, _shared_sets(layer, input), output, depends))
    return Normalizations(input, groups, kinds)


def example_batch(n: int = 4, c: int = 6, size: int = 4, seed: int = 0) -> Tensor:
    """A batch whose examples differ in brightness and contrast, and whose channels differ in offset; float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, c, size, size, generator=generator, dtype=torch.float64)
    example = torch.linspace(-1, 2, n, dtype=torch.float64).view(n, 1, 1, 1)
    channel = torch.linspace(-2, 2, c, dtype=torch.float64).view(1, c, 1, 1)
    return (1 + 0.5 * example.abs()) * noise + 2 * example + channel


def spread(values: Tensor) -> tuple[float, float]:
    """Standard deviation (biased) of the means of the examples, and of the means of the channels."""
    return tuple(values.mean(dims).std(correction=0).item() for dims in ((1, 2, 3), (0, 2, 3)))


def _shared_sets(layer, input: Tensor) -> Tensor:
    input = input.clone().requires_grad_()
    output = layer(input)
    sets, found = torch.full(input.shape, -1), 0
    while (sets < 0).any():
        place = tuple((sets < 0).nonzero()[0].tolist())
        (gradient,) = torch.autograd.grad(output[place], input, retain_graph=True)
        sets[gradient != 0] = found
        found += 1
    return sets


def _two_colors():
    from matplotlib.colors import ListedColormap

    return ListedColormap([(0.5, 0.5, 0.5, 0.12), OURS])


def _heat(axes, values: Tensor, title: str, input: Tensor):
    reach = input.abs().max().item() / 2
    axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, alpha=0.8)
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            axes.text(
                column,
                row,
                f"{value:.1f}".replace("-0.0", "0.0"),
                ha="center",
                va="center",
                fontsize=7,
                color="#101418",
            )
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])
