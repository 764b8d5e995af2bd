"""This library against torch, both in both memory formats: layer by layer, and the whole model."""

from __future__ import annotations

import argparse

from ..benchmark import Benchmark, Speed, bench, geometric_mean
from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    describe,
    load_subject,
    positive,
    seconds,
    show,
    show_json,
    table,
    track,
)
from ..timing import formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "bench resnet18 1,3,224,224", "bench resnet18 8,3,64,64 --train --layers-only")
    add_model_arguments(parser)
    parser.add_argument("--train", action="store_true", help="layers forward with backward, instead of inference")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="turns of each contestant (default: 7)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--layers-only", action="store_true", help="do not time the whole model")
    what.add_argument("--total-only", action="store_true", help="do not time single layers")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """1 if a layer's result differs from torch's."""
    subject = load_subject(arguments)
    result = bench(
        subject.model, subject.shape, subject.name, train=arguments.train, rounds=max(2, arguments.rounds),
        whole=not arguments.layers_only, by_layer=not arguments.total_only, track=track,
    )  # fmt: skip
    wrong = [layer for layer in result.layers if not layer.speed.ours]
    if arguments.json:
        show_json(result)
    else:
        _print(result)
        for layer in wrong:
            show(f"{layer.names[0]}: not timed, its output is {layer.error:.1e} off torch's")
    return 1 if wrong else 0


def _print(result: Benchmark) -> None:
    if result.layers:
        show(layer_table(result))
        right = [layer for layer in result.layers if layer.speed.ours]
        show(f"geometric mean over all layers: {geometric_mean(right):.2f}" if right else "no layer is right")
    if result.tasks:
        show(total_table(result))
    show("torch / ours: the better format of each, above 1 this library is faster; in brackets the rounds' quartiles")


def layer_table(result: Benchmark):
    names = list(formats(len(result.input_size)))
    head = [f"{owner} {name}" for name in names for owner in ("ours", "torch")]
    what = "forward and backward" if result.train else "forward"
    title = f"{result.model}, input {by(result.input_size)}, {result.threads} thread(s), {what}"
    lines = table("layers", "operation", "output", *head, "torch / ours", "", title=title, left=2)
    for layer in result.layers:
        more = f" and {len(layer.names) - 1} more" if len(layer.names) > 1 else ""
        plain = {names[0]: "contiguous"} if "contiguous" in layer.speed.ours else {}
        times = [
            getattr(layer.speed, owner).get(plain.get(name, name)) for name in names for owner in ("ours", "torch")
        ]
        cells = ["" if value is None else seconds(value) for value in times]
        lines.add_row(layer.names[0] + more, layer.operation, by(layer.output_size), *cells, *_ratio(layer.speed))
    return lines


def total_table(result: Benchmark):
    names = list(next(iter(result.tasks.values())).ours)
    head = [f"{owner} {name}" for name in names for owner in ("ours", "torch")]
    lines = table("the whole model", *head, "torch / ours", "")
    for task, speed in result.tasks.items():
        cells = [seconds(getattr(speed, owner)[name]) for name in names for owner in ("ours", "torch")]
        lines.add_row(task, *cells, *_ratio(speed))
    return lines


def _ratio(speed: Speed) -> tuple[str, str]:
    return (f"{speed.ratio:.2f}", f"({speed.low:.2f} to {speed.high:.2f})") if speed.ours else ("", "")
