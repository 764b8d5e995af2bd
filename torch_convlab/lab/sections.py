"""The sections of a model's report: each asks one function of the lab and shows what it says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..convert import convert
from . import charts
from .command import by, engineering
from .commands import graph as graph_command
from .commands import receptive_field as field_command
from .commands import summary as summary_command
from .computational_graph import Graph, graph
from .errors import LabError
from .field_growth import receptive_field
from .figure import inline_svg
from .gradient_sums import gradients
from .layers import Summary, summary
from .model_report import Block
from .shared_statistics import normalize
from .timing import FORMATS, Timing, time_model
from .verification import verify_layers, verify_network

_ROUNDS = 5
_FIELDS = 8  # layers whose effective receptive field is measured


@dataclass
class Subject:
    """The model, and what several sections need of it."""

    name: str
    model: nn.Module
    inputs: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape)

    @cached_property
    def summary(self) -> Summary:
        return summary(self.model, self.shape, self.name)

    @cached_property
    def graph(self) -> Graph:
        return graph(convert(copy.deepcopy(self.model)).train(), self.inputs)


def _overview(subject: Subject) -> list[Block]:
    found = subject.summary
    facts = [
        ("parameters", engineering(found.parameters)),
        ("multiply-adds forward", engineering(found.multiply_adds)),
        ("moved, every tensor once", engineering(found.bytes, "B")),
        ("saved for backward", engineering(found.saved_bytes, "B")),
        ("saved by torch.nn", engineering(found.saved_bytes_torch, "B")),
        ("operators", str(len(found.layers))),
    ]
    return [Block("facts", facts=facts), Block("picture", svg=charts.layers(found), caption="Layer by layer.")]


def _layers(subject: Subject) -> list[Block]:
    found = subject.summary
    return [Block.of_table(summary_command.rows(found)), Block("text", text=summary_command.totals(found))]


def _pyramid(subject: Subject) -> list[Block]:
    text = (
        "Strides and pooling make the maps smaller while channels grow, and so each output sees more of the input. "
        "One bar for each size of map: as wide as the map, as high as it has channels (root)."
    )
    return [Block("text", text=text), Block("picture", svg=charts.pyramid(subject.summary))]


def _fields(subject: Subject) -> list[Block]:
    found = receptive_field(subject.model, subject.shape, subject.name, examples=1, most=_FIELDS)
    caption = "Blue: what can reach the middle output. Orange: the part that holds 95 % of its gradient, on one input."
    return [
        Block("picture", svg=inline_svg(found.draw()), caption=caption),
        Block.of_table(field_command.rows(found)),
    ]


def _graph(subject: Subject) -> list[Block]:
    found = subject.graph
    caption = (
        "A training step: forward on the left, backward on the right, and between them what is kept. "
        "Point at a step to see each saved tensor."
    )
    return [
        Block("picture", svg=found.svg(), caption=caption, scrolled=True),
        Block.of_table(graph_command.rows(found)),
        Block("text", text=graph_command.totals(found)),
    ]


def _speed(subject: Subject) -> list[Block]:
    if subject.inputs.dim() != 4:
        raise LabError(f"two memory formats need an input N x C x H x W, not {by(subject.shape)}")
    timings = time_model(subject.model, subject.inputs, rounds=_ROUNDS)
    columns = [("task", True), ("format", True), ("ours", False), ("torch", False), ("torch / ours", False)]
    columns.append(("middle half", False))
    rows = [_speed_row(timing, *pair) for timing in timings for pair in _pairs(timing)]
    text = (
        f"The whole model, {_ROUNDS} rounds in turns in one process; median. Ratio: torch's time over ours, so above 1 "
        "ours is faster. Best of each compares the faster format of either."
    )
    return [
        Block("text", text=text),
        Block("picture", svg=charts.timings(timings), caption="Lines: the middle half of the rounds."),
        Block("rows", columns=columns, rows=rows),
    ]


def _pairs(timing: Timing):
    yield from ((name, f"ours {name}", f"torch {name}") for name in FORMATS)
    yield "best of each", timing.best("ours"), timing.best("torch")


def _speed_row(timing: Timing, label: str, ours: str, theirs: str) -> tuple[str, ...]:
    ratio, low, high = timing.ratio(ours, theirs)
    milliseconds = [f"{1e3 * timing.median(contestant):.1f} ms" for contestant in (ours, theirs)]
    return (timing.task, label, *milliseconds, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")


def _verification(subject: Subject) -> list[Block]:
    model = copy.deepcopy(subject.model).train()
    with torch.no_grad():
        try:
            output = copy.deepcopy(model)(subject.inputs)
        except ValueError as error:  # batch norm of a single value
            raise LabError(f"training mode: {error}") from error
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)) / subject.shape[0]

    def loss(output: Tensor) -> Tensor:
        return (output * direction.to(output.dtype)).sum()

    alone, together = (check(model, subject.inputs, loss) for check in (verify_layers, verify_network))
    checks = [
        (
            all(row.passes for row in alone),
            f"every layer alone in float32: {len(alone)} outputs and gradients, error at most "
            f"{max(row.ours for row in alone):.1e} of max|reference| (torch.nn {max(row.theirs for row in alone):.1e})",
        ),
        (
            all(row.passes for row in together),
            f"the whole model in float64: {len(together)} outputs and gradients, at most "
            f"{max(row.ours for row in together):.1e} from torch.nn",
        ),
    ]
    columns = [("layer", True), ("tensor", True), ("size", False), ("ours", False), ("torch.nn", False), ("", False)]
    rows = [
        (row.name, row.kind, by(row.size), f"{row.ours:.1e}", f"{row.theirs:.1e}", "✓" if row.passes else "✗")
        for row in alone
    ]
    text = (
        "Training mode; max|error| / max|reference| against torch.nn in float64, on what the layer reads in the model."
    )
    return [Block("checks", checks=checks), Block("rows", title=text, columns=columns, rows=rows)]


def _gradients(_: Subject) -> list[Block]:
    found = gradients()
    text = (
        "A weight's gradient sums over the patches that it touched, an input's over "
        "the kernels that touched it: here for the lecture's 4 x 4 example, checked by autograd."
    )
    error = found.autograd_error()
    caption = "Orange: the weight, and what it met in each patch. Blue: the input value, and the weights that met it."
    return [
        Block("text", text=text),
        Block("picture", svg=inline_svg(found.draw()), caption=caption),
        Block("checks", checks=[(error == 0, f"autograd gives the same: largest difference {error:.1e}")]),
    ]


def _normalization(_: Subject) -> list[Block]:
    caption = (
        "Orange: what shares mean and variance with the first element, read off the gradients of our layers. "
        "Below, what that leaves of the differences between examples (rows) and channels (columns)."
    )
    return [Block("picture", svg=inline_svg(normalize().draw()), caption=caption)]


# Key, which is the address inside the page: title and what makes it.
SECTIONS = {
    "overview": ("Overview", _overview),
    "layers": ("Layers", _layers),
    "pyramid": ("Feature pyramid", _pyramid),
    "field": ("Receptive fields", _fields),
    "graph": ("Computational graph", _graph),
    "speed": ("Speed", _speed),
    "verification": ("Verification", _verification),
    "gradients": ("Gradients by hand", _gradients),
    "normalization": ("Normalization", _normalization),
}
