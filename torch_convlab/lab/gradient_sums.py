"""Where the gradients of a convolution come from (lecture items L7 and L8): every product of the sums, named and drawn.

With ``y[n,k,o] = sum_{c,t} x[n,c, o*stride - padding + t*dilation] * w[k,c,t]`` each weight meets one input value per
output position, so its gradient sums over patches; each input value meets one weight per output that reads it, so its
gradient sums over kernels. The sums are written out here in Python, term by term, and held against autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from .. import _C
from .. import functional as F
from .errors import LabError
from .figure import OURS, THEIRS, mark, number_grid, style

LECTURE_INPUT = ((2, 3, 2, 4), (5, 6, 6, 8), (3, 2, 1, 0), (1, 2, 3, 4))
LECTURE_KERNELS = (((1, 2, 3), (4, 5, 6), (7, 8, 9)), ((10, 11, 12), (13, 14, 15), (16, 17, 18)))
_MOST = 12  # rows or columns that a picture can show
_PANELS, _FILTERS = 9, 4  # products of one sum, and filters, that a picture shows


@dataclass(frozen=True)
class Term:
    """One product of a gradient's sum.

    `output` is the place ``(n, k, row, column)`` of the output whose gradient is one factor; `place` that of the other
    factor: in the input ``(n, c, row, column)`` for a weight's gradient, in the weight ``(k, c, row, column)`` for an
    input's. `grad_output` and `factor` are the two values.
    """

    output: tuple[int, int, int, int]
    place: tuple[int, int, int, int]
    grad_output: float
    factor: float

    @property
    def product(self) -> float:
        return self.factor * self.grad_output

    @property
    def gradient_name(self) -> str:
        """``g01`` is the gradient of the output in row 0, column 1; filters and examples other than 0 follow it."""
        n, k, row, column = self.output
        name = f"g{row}{column}" if max(row, column) < 10 else f"g[{row},{column}]"
        return name + (f"[k={k}]" if k else "") + (f"[n={n}]" if n else "")

    def __str__(self) -> str:
        return f"{self.factor:g}*{self.gradient_name}"


@dataclass(frozen=True)
class Gradients:
    """A small convolution, float64, and where its gradients come from. Made by `gradients`."""

    input: Tensor  # N x C x H x W
    weight: Tensor  # K x C x kH x kW
    grad_output: Tensor  # N x K x H_out x W_out
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def weight_terms(self, row: int, column: int, out_channel: int = 0, in_channel: int = 0) -> list[Term]:
        """The products that the gradient of ``weight[out_channel, in_channel, row, column]`` sums (lecture item L7).

        One per output position and example whose patch puts a value, not padding, under that weight.
        """
        self._inside("weight", self.weight, out_channel, in_channel, row, column)
        terms = []
        for n, out_row, out_column in self._outputs():
            y, x = self._read(out_row, out_column, row, column)
            if 0 <= y < self.input.shape[2] and 0 <= x < self.input.shape[3]:
                output, place = (n, out_channel, out_row, out_column), (n, in_channel, y, x)
                terms.append(Term(output, place, self.grad_output[output].item(), self.input[place].item()))
        return terms

    def input_terms(self, row: int, column: int, in_channel: int = 0, example: int = 0) -> list[Term]:
        """The products that the gradient of ``input[example, in_channel, row, column]`` sums (lecture item L8).

        One per filter and output position whose patch holds that input value.
        """
        self._inside("input", self.input, example, in_channel, row, column)
        terms = []
        for k in range(self.weight.shape[0]):
            for n, out_row, out_column in self._outputs():
                if n != example:
                    continue
                for tap_row in range(self.weight.shape[2]):
                    for tap_column in range(self.weight.shape[3]):
                        if self._read(out_row, out_column, tap_row, tap_column) == (row, column):
                            output, place = (n, k, out_row, out_column), (k, in_channel, tap_row, tap_column)
                            terms.append(
                                Term(output, place, self.grad_output[output].item(), self.weight[place].item())
                            )
        return terms

    def bias_terms(self, out_channel: int = 0) -> list[float]:
        """The output gradients that the gradient of ``bias[out_channel]`` sums: that filter's (lecture item L7)."""
        return self.grad_output[:, out_channel].flatten().tolist()

    @cached_property
    def weight_gradient(self) -> Tensor:
        """Gradient of every weight, each as the sum of its terms."""
        sums = torch.zeros_like(self.weight)
        for k, c, row, column in _places(self.weight):
            sums[k, c, row, column] = sum(term.product for term in self.weight_terms(row, column, k, c))
        return sums

    @cached_property
    def input_gradient(self) -> Tensor:
        """Gradient of every input value, each as the sum of its terms."""
        sums = torch.zeros_like(self.input)
        for n, c, row, column in _places(self.input):
            sums[n, c, row, column] = sum(term.product for term in self.input_terms(row, column, c, n))
        return sums

    def autograd_error(self, algorithm: str = "naive") -> float:
        """Largest difference of the summed gradients from what autograd gives, by torch and by `algorithm` of ours."""
        errors = []
        for convolve in (torch.nn.functional.conv2d, lambda *a, **k: F.conv2d(*a, **k, algorithm=algorithm)):
            input, weight = self.input.clone().requires_grad_(), self.weight.clone().requires_grad_()
            output = convolve(input, weight, stride=self.stride, padding=self.padding, dilation=self.dilation)
            by_autograd = torch.autograd.grad(output, (input, weight), self.grad_output)
            for exact, summed in zip(by_autograd, (self.input_gradient, self.weight_gradient)):
                errors.append((exact - summed).abs().max().item())
        return max(errors)

    def draw(self, weight: tuple[int, ...] = (0, 1), input: tuple[int, ...] = (1, 1)) -> Figure:
        """Both sums as a picture: the gradient of `weight` (row, column, filter, channel) and that of `input` (row,
        column, channel, example).

        Raises:
            LabError: a place outside the tensor, or tensors too large to draw.
        """
        if max(*self.input.shape[2:], *self.weight.shape[2:]) > _MOST:
            raise LabError(f"expected an input and a kernel of at most {_MOST} rows and columns to draw")
        of_weight, of_input = self.weight_terms(*weight), self.input_terms(*input)
        rows = [self._weight_panels(weight, of_weight)]
        for k in range(min(self.weight.shape[0], _FILTERS)):
            rows.append(self._input_panels(input, k, [term for term in of_input if term.place[0] == k]))
        headings = {0: _sum_text("weight", weight, of_weight), 1: _sum_text("input", input, of_input)}
        columns = max(map(len, rows))
        with style():
            figure, grid = pyplot.subplots(len(rows), columns, figsize=(1.75 * columns, 2.4 * len(rows)), squeeze=False)
            for axes, panel in zip(grid.flat, (panel for row in rows for panel in row + [None] * (columns - len(row)))):
                axes.axis("off")
                if panel is not None:
                    panel(axes)
            figure.tight_layout(h_pad=3)
            for row, text in headings.items():
                place = grid[row][0].get_position()
                figure.text(place.x0, place.y1 + 0.12 / len(rows), text, fontsize=10, fontweight="bold")
        return figure

    def _weight_panels(self, place, terms):
        row, column, k, c = (*place, 0, 0)[:4]

        def kernel(axes):
            number_grid(axes, self.weight[k, c].tolist(), f"filter {k}")
            mark(axes, row, column, color=OURS)

        def patch(term):
            def draw(axes):
                number_grid(axes, self.input[term.place[:2]].tolist(), str(term))
                self._outline(axes, term.output)
                mark(axes, *term.place[2:], color=OURS)

            return draw

        return [kernel, self._output_panel(0, k), *map(patch, terms[:_PANELS]), *_more(terms)]

    def _input_panels(self, place, k, terms):
        row, column, c, n = (*place, 0, 0)[:4]

        def read(axes):
            number_grid(axes, self.input[n, c].tolist(), f"input, read by filter {k}")
            mark(axes, row, column, color=THEIRS)
            for term in terms:
                self._outline(axes, term.output)

        def kernel(term):
            def draw(axes):
                number_grid(axes, self.weight[term.place[:2]].tolist(), str(term))
                mark(axes, *term.place[2:], color=THEIRS)

            return draw

        return [read, self._output_panel(n, k), *map(kernel, terms[:_PANELS]), *_more(terms)]

    def _output_panel(self, n, k):
        title = f"grad_output, k={k}"
        return lambda axes: number_grid(axes, self.grad_output[n, k].tolist(), title)

    def _outline(self, axes, output):
        """The extent of the patch that output position `output` reads."""
        y, x = self._read(*output[2:], 0, 0)
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:]))
        mark(axes, y, x, height, width, color=THEIRS, fill=False)
        axes.set_xlim(min(axes.get_xlim()[0], x - 0.6), max(axes.get_xlim()[1], x + width - 0.4))
        axes.set_ylim(max(axes.get_ylim()[0], y + height - 0.4), min(axes.get_ylim()[1], y - 0.6))

    def _outputs(self):
        n, _, height, width = self.grad_output.shape
        return _ranges(n, height, width)

    def _read(self, out_row, out_column, row, column):
        """Input row and column that an output reads through a weight; outside the input it is padding."""
        return (
            out_row * self.stride[0] - self.padding[0] + row * self.dilation[0],
            out_column * self.stride[1] - self.padding[1] + column * self.dilation[1],
        )

    @staticmethod
    def _inside(name, tensor, *place):
        if not all(0 <= at < size for at, size in zip(place, tensor.shape)):
            raise LabError(f"expected a place inside {name} of size {tuple(tensor.shape)}, but got {place}")


def gradients(
    input: Tensor | None = None,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Gradients:
    """Write out the sums that a 2-D convolution's gradients are (lecture items L7, L8).

    Args:
        input: ``H x W``, ``C x H x W`` or ``N x C x H x W``, small; default: the lecture's 4 x 4 values.
        weight: ``kH x kW``, ``K x kH x kW`` (one channel) or ``K x C x kH x kW``; default: the lecture's two.
        grad_output: of the output's size; default: powers of ten, times k + 1 for filter k, so that
            each summand can be read off a sum.
        stride, padding, dilation: integers, or one per axis.

    Raises:
        LabError: sizes that do not fit together.

    >>> terms = gradients().weight_terms(0, 1)
    >>> " + ".join(map(str, terms))
    '3*g00 + 2*g01 + 6*g10 + 6*g11'
    """
    input = torch.tensor(LECTURE_INPUT) if input is None else torch.as_tensor(input)
    weight = torch.tensor(LECTURE_KERNELS) if weight is None else torch.as_tensor(weight)
    if not (2 <= input.dim() <= 4 and 2 <= weight.dim() <= 4):
        raise LabError(f"expected input and weight of 2 to 4 dimensions, got {input.dim()} and {weight.dim()}")
    input = input.double().reshape((1,) * (4 - input.dim()) + tuple(input.shape))
    weight = weight.double()
    weight = weight[None, None] if weight.dim() == 2 else weight[:, None] if weight.dim() == 3 else weight
    if input.shape[1] != weight.shape[1]:
        raise LabError(f"expected as many channels in weight as in input, got {weight.shape[1]} and {input.shape[1]}")
    stride, padding, dilation = (
        _pair(*one) for one in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    sizes = [
        _C.output_size(size, kernel, *rest)
        for size, kernel, *rest in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    ]
    if min(sizes) < 1:
        raise LabError(
            f"expected a kernel that fits the padded input, got kernel {tuple(weight.shape[2:])}, dilation {dilation} "
            f"and input {tuple(input.shape[2:])}, padding {padding}"
        )
    size = (input.shape[0], weight.shape[0], *sizes)
    if grad_output is None:
        powers = 10.0 ** torch.arange(min(sizes[0] * sizes[1], 7)).double()
        plane = powers.repeat(-(-sizes[0] * sizes[1] // len(powers)))[: sizes[0] * sizes[1]].view(*sizes)
        grad_output = plane * torch.arange(1, size[1] + 1).view(-1, 1, 1).double()
        grad_output = grad_output.expand(size).clone()
    grad_output = torch.as_tensor(grad_output).double()
    if grad_output.numel() != torch.Size(size).numel():
        raise LabError(f"expected grad_output of size {size}, but got {tuple(grad_output.shape)}")
    return Gradients(input, weight, grad_output.reshape(size), stride, padding, dilation)


def _more(terms: list[Term]) -> list:
    left = len(terms) - _PANELS
    return [lambda axes: axes.text(0.1, 0.5, f"and {left} more")] if left > 0 else []


def _sum_text(name: str, place: tuple[int, ...], terms: list[Term]) -> str:
    shown = " + ".join(map(str, terms)) if len(terms) <= 16 else f"{len(terms)} products"
    return f"gradient of {name} ({place[0]}, {place[1]}) = {shown or 0} = {sum(term.product for term in terms):g}"


def _pair(name, value, least) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise LabError(f"expected {name} to be one or two integers of at least {least}, but got {value}")
    return pair


def _places(tensor: Tensor):
    return _ranges(*tensor.shape)


def _ranges(*sizes):
    return torch.cartesian_prod(*map(torch.arange, sizes)).tolist() if len(sizes) > 1 else ((i,) for i in range(*sizes))
