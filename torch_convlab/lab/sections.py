"""The sections of a model's report: each asks one function of the lab and shows what it says."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from .. import algorithms
from ..convert import convert
from . import charts
from .advice import advise
from .benchmark import bench, geometric_mean
from .ceilings import roofline, roofline_figure
from .choices import explain
from .command import by, engineering, seconds
from .commands import bench as bench_command
from .commands import graph as graph_command
from .commands import receptive_field as field_command
from .commands import roofline as roofline_command
from .commands import summary as summary_command
from .computational_graph import Graph, graph
from .environment import info
from .errors import LabError
from .field_growth import receptive_field
from .figure import inline_svg, style
from .gradient_sums import gradients
from .layers import Summary, summary
from .model_report import Block
from .shared_statistics import normalize
from .verification import verify

_ROUNDS = 3
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


def _algorithms(subject: Subject) -> list[Block]:
    found = explain(subject.model, subject.shape, subject.name)
    if not found:
        raise LabError("it has no convolution and no linear layer")
    names = list(algorithms())
    columns = [("layers", True), ("input", False), ("weight", False), ("chosen", True)]
    columns += [*((name, False) for name in names), ("bound", False), ("of bound", False)]
    rows, refusals = [], {}
    for one in found:
        cells = []
        for report in one.algorithms:
            if report.refusal:
                refusals.setdefault(report.refusal, []).append(_layer_names(one.names))
            cells.append("refuses" if report.refusal else "-" if report.seconds is None else seconds(report.seconds))
            if report.chosen:
                share = "" if report.seconds is None else f"{100 * one.bound / report.seconds:.0f} %"
        problem = by(one.problem.input_size), by(one.problem.weight_size)
        bound = f"{seconds(one.bound)} by {one.bound_by}"
        rows.append((_layer_names(one.names), *problem, one.chosen, *cells, bound, share))
    text = (
        "Forward, NCHW, one row for each distinct convolution (a linear layer is one of 1x1), and the measured time of "
        "each algorithm that accepts and is not hopeless. Chosen: what auto takes, by its cost model. Bound: the least "
        "time by this machine's measured peak and bandwidth; winograd computes fewer multiplications and may be faster."
    )
    reasons = [(reason, "; ".join(layers)) for reason, layers in refusals.items()]
    return [
        Block("text", text=text),
        Block("rows", columns=columns, rows=rows),
        Block("rows", title="Why an algorithm refuses", columns=[("reason", True), ("layers", True)], rows=reasons),
    ]


def _layer_names(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _roofline(subject: Subject) -> list[Block]:
    found = roofline(subject.model, subject.shape, subject.name, rounds=_ROUNDS)
    with style():
        figure = roofline_figure(found)
    return [
        Block(
            "picture", svg=inline_svg(figure), caption="Each layer against what this machine can do at its intensity."
        ),
        Block.of_table(roofline_command.point_table(found)),
    ]


def _speed(subject: Subject) -> list[Block]:
    found = bench(subject.model, subject.shape, subject.name, rounds=_ROUNDS)
    wrong = [layer.names[0] for layer in found.layers if not layer.speed.ours]
    text = (
        f"{_ROUNDS} rounds in turns in one process; medians. Ratio: torch's time over ours, each in its better memory "
        "format, so above 1 ours is faster; in brackets the quartiles of the rounds."
    )
    right = [layer for layer in found.layers if layer.speed.ours]
    mean = f"; geometric mean of the ratios {geometric_mean(right):.2f}" if right else ""
    return [
        Block("text", text=text),
        Block.of_table(bench_command.total_table(found)),
        Block.of_table(bench_command.layer_table(found)),
        Block("checks", checks=[(not wrong, f"outputs of all layers agree before timing{mean}")]),
    ]


def _verification(subject: Subject) -> list[Block]:
    model = copy.deepcopy(subject.model).train()
    try:
        found = verify(model, subject.inputs)
    except (RuntimeError, ValueError) as error:  # batch norm of a single value, say
        raise LabError(f"in training mode: {error}") from error
    checks = [
        (
            all(row.passes for row in found.layers),
            f"every layer alone in float32: {len(found.layers)} outputs, gradients and statistics, error at most "
            f"{max(row.ours for row in found.layers):.1e} of max|reference| "
            f"(torch.nn {max(row.theirs for row in found.layers):.1e})",
        ),
        (
            all(row.passes for row in found.network),
            f"the whole model in float64: {len(found.network)} outputs and gradients, at most "
            f"{max(row.ours for row in found.network):.1e} from torch.nn",
        ),
        (
            found.output.passes,
            f"the whole model's output in float32: error {found.output.ours:.1e} (torch.nn {found.output.theirs:.1e})",
        ),
    ]
    columns = [("layer", True), ("tensor", True), ("size", False), ("ours", False), ("torch.nn", False)]
    columns += [("ours, ulps", False), ("torch.nn, ulps", False), ("", False)]
    rows = [
        (
            *(row.name, row.kind, by(row.size), f"{row.ours:.1e}", f"{row.theirs:.1e}"),
            *(f"{row.ours_ulps:.1f}", f"{row.theirs_ulps:.1f}", "✓" if row.passes else "✗"),
        )
        for row in found.layers
    ]
    text = "Training mode; max|error| / max|reference| against float64, each layer alone on what it reads in the model."
    blocks = [Block("checks", checks=checks), Block("rows", title=text, columns=columns, rows=rows)]
    if found.first_divergence:
        blocks.insert(1, Block("text", text=f"The first that diverges: {found.first_divergence}"))
    return blocks


def _advice(subject: Subject) -> list[Block]:
    found = advise(subject.model, subject.inputs, subject.name)
    rows = [(one.rule, _layer_names(one.where) if one.where else "", one.message) for one in found]
    if not rows:
        return [Block("text", text="Nothing to remark.")]
    return [Block("rows", columns=[("rule", True), ("where", True), ("remark", True)], rows=rows)]


def _environment(_: Subject) -> list[Block]:
    rows = [(part, name, str(value)) for part, facts in info().items() for name, value in facts.items()]
    return [Block("rows", columns=[("", True), ("", True), ("", True)], rows=rows)]


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
    "algorithms": ("Algorithms", _algorithms),
    "roofline": ("Roofline", _roofline),
    "speed": ("Speed", _speed),
    "verification": ("Verification", _verification),
    "advice": ("Advice", _advice),
    "gradients": ("Gradients by hand", _gradients),
    "normalization": ("Normalization", _normalization),
    "environment": ("Environment", _environment),
}
