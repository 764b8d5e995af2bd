"""The computational graph of a model's forward and backward: shapes, multiply-adds, saved tensors and their bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    check_writable,
    describe,
    engineering,
    load_subject,
    show,
    show_json,
    table,
)
from ..computational_graph import Graph, graph
from ..errors import LabError
from ..figure import save_svg


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "graph lenet5 1,1,28,28", "graph resnet18 1,3,64,64 --output graph.svg")
    add_model_arguments(parser)
    parser.add_argument(
        "--input-gradient", action="store_true", help="as if a layer in front of the model were trained too"
    )
    parser.add_argument("--eval", action="store_true", help="in eval mode (default: training mode)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the picture: .svg")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.output:
        if arguments.output.suffix != ".svg":
            raise LabError(f"expected a file name that ends in .svg, but got {str(arguments.output)!r}")
        check_writable(arguments.output)
    subject = load_subject(arguments)
    found = graph(subject.model.train(not arguments.eval), subject.inputs, arguments.input_gradient)
    if arguments.output:
        save_svg(found.svg(), arguments.output)
    if arguments.json:
        show_json({**vars(found), "saved_bytes": found.saved_bytes})
        return 0
    show(rows(found), totals(found), *([f"picture: {arguments.output}"] if arguments.output else []))
    return 0


def rows(found: Graph):
    lines = table("step", "kind", "reads", "output", "forward MACs", "backward", "backward MACs", "saved", left=2)
    for step in found.steps:
        reads = ", ".join("input" if source < 0 else found.steps[source].name for source in step.inputs)
        lines.add_row(
            step.name,
            step.kind,
            reads,
            by(step.size),
            engineering(step.multiply_adds),
            step.backward_name,
            engineering(step.backward_multiply_adds),
            engineering(step.saved_bytes, "B"),
        )
    return lines


def totals(found: Graph) -> str:
    return (
        f"{len(found.steps)} steps; multiply-adds: {engineering(found.multiply_adds)} forward, "
        f"{engineering(found.backward_multiply_adds)} backward; "
        f"saved between them: {engineering(found.saved_bytes, 'B')} besides parameters and input"
    )
