"""Every layer against this machine's measured peak and bandwidth, as a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..ceilings import Roofline, roofline, save_roofline
from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    check_writable,
    describe,
    engineering,
    load_subject,
    seconds,
    show,
    show_json,
    table,
    track,
)
from ..errors import LabError

_ENDINGS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "roofline resnet18 1,3,224,224 --output roofline.png")
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"picture, {', '.join(_ENDINGS)} (default: none)")
    parser.add_argument("--channels-last", action="store_true", help="tensors in that memory format")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.output:
        if arguments.output.suffix not in _ENDINGS:
            raise LabError(f"expected --output to end in {', '.join(_ENDINGS)}, but got {arguments.output}")
        check_writable(arguments.output)
    subject = load_subject(arguments)
    result = roofline(subject.model, subject.shape, subject.name, channels_last=arguments.channels_last, track=track)
    if arguments.output:
        save_roofline(result, arguments.output)
    if arguments.json:
        show_json(result)
        return 0
    show(point_table(result))
    if arguments.output:
        show(f"picture: {arguments.output}")
    return 0


def point_table(result: Roofline):
    machine = result.machine
    title = (
        f"{result.model}, input {by(result.input_size)}, {result.format}; {machine.cpu}, {machine.threads} thread(s): "
        f"peak {engineering(machine.peak, 'FLOP/s')} ({machine.peak_of}), copy {engineering(machine.bandwidth, 'B/s')}"
    )
    columns = "layers", "operation", "FLOP/byte", "time", "FLOP/s", "bytes/s", "bound", "by", "of bound"
    lines = table(*columns, title=title, left=2)
    lines.caption = "of bound: 100 % runs at a roof; winograd computes fewer multiplications than are counted"
    for point in result.points:
        more = f" and {len(point.names) - 1} more" if len(point.names) > 1 else ""
        lines.add_row(
            point.names[0] + more,
            point.operation,
            f"{point.intensity:.1f}" if point.multiply_adds else "",
            seconds(point.seconds),
            engineering(point.speed) if point.multiply_adds else "",
            engineering(point.bytes / point.seconds),
            seconds(point.bound),
            point.bound_by,
            f"{100 * point.bound / point.seconds:.0f} %",
        )
    return lines
