"""How the receptive field grows over the layers: in theory, and effectively, measured by gradients."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    check_writable,
    describe,
    load_subject,
    positive,
    show,
    show_json,
    table,
    track,
)
from ..field_growth import FieldGrowth, receptive_field
from ..figure import output_path, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser, __doc__, "receptive-field lenet5 1,1,28,28", "receptive-field resnet18 1,3,224,224 --output field.png"
    )
    add_model_arguments(parser)
    parser.add_argument("--examples", type=positive, default=4, metavar="N", help="to average over (default: 4)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the picture: .png or .svg")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.output:
        check_writable(output_path(arguments.output))
    subject = load_subject(arguments)
    found = receptive_field(subject.model, subject.shape, subject.name, arguments.examples, arguments.seed, track=track)
    picture = save(found.draw(), arguments.output) if arguments.output else None
    if arguments.json:
        layers = [
            {**vars(layer), "effective_size": layer.effective_size, "magnitude": layer.magnitude.tolist()}
            for layer in found.layers
        ]
        show_json({"model": found.model, "input_size": found.input_size, "layers": layers})
        return 0
    show(
        rows(found),
        "field: pixels of the input that can reach the output in the middle, some of them padding; effective: the "
        f"middle ones that hold 95 % of its gradient, averaged over {arguments.examples} random inputs",
        *([f"picture: {picture}"] if picture else []),
    )
    return 0


def rows(found: FieldGrowth):
    lines = table("layer", "operation", "output", "stride", "field", "effective", "share of the input's area", left=2)
    area = math.prod(found.input_size[2:])
    for layer in found.layers:
        effective = math.prod(layer.effective_size)
        stride = by(int(one) if one == int(one) else one for one in layer.stride)
        sizes = by(layer.output_size), stride, by(layer.size), by(layer.effective_size)
        lines.add_row(layer.name, layer.operation, *sizes, f"{100 * effective / area:.1f} %")
    return lines
