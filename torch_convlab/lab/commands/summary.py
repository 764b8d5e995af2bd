"""Per layer: output and weight size, parameters, multiply-adds, bytes moved and kept, receptive field."""

from __future__ import annotations

import argparse

from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    describe,
    engineering,
    load_subject,
    show,
    show_json,
    table,
)
from ..layers import Layer, Summary, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "summary lenet5 1,1,28,28", "summary torchvision.models:resnet18 1,3,224,224 --json")
    add_model_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    subject = load_subject(arguments)
    result = summary(subject.model, subject.shape, subject.name)
    if arguments.json:
        show_json(result)
    else:
        show(rows(result), totals(result))
    return 0


def rows(result: Summary):
    """One line per layer; sizes without the batch, linear weights as inputs x outputs, as the lecture writes them."""
    title = f"{result.model}, input {by(result.input_size)} (the sizes of layers are without the batch)"
    columns = "layer", "operation", "output", "weights", "parameters", "multiply-adds", "bytes", "saved", "by torch"
    lines = table(*columns, "field", "stride", "centre", title=title, left=2)
    for layer in result.layers:
        work = (layer.parameters, layer.multiply_adds, layer.bytes, layer.saved_bytes, layer.saved_bytes_torch)
        lines.add_row(
            layer.name, layer.operation, by(layer.output_size[1:]), _weights(layer),
            *(f"{value:,}" if value else "" for value in work),
            _axes(layer.receptive_field), _axes(layer.stride), _axes(layer.center),
        )  # fmt: skip
    return lines


def totals(result: Summary) -> str:
    unused = f" ({result.unused_parameters:,} of them never read)" if result.unused_parameters else ""
    return (
        f"{result.parameters:,} parameters{unused}, {result.multiply_adds:,} multiply-adds "
        f"({engineering(2 * result.multiply_adds, 'FLOP')}), {engineering(result.bytes, 'B')} moved,\n"
        f"{engineering(result.saved_bytes, 'B')} saved for a backward pass "
        f"(torch.nn: {engineering(result.saved_bytes_torch, 'B')}).\n"
        "multiply-adds: of convolutions and matrix products, without biases. bytes: every tensor read or written once. "
        "saved: added to what backward keeps.\n"
        "field, stride, centre: pixels of the input that reach one output, between outputs, in the middle of output 0; "
        "–: none, or not known."
    )


def _weights(layer: Layer) -> str:
    return by(reversed(layer.weight_size)) if layer.operation == "linear" else by(layer.weight_size)


def _axes(values: tuple) -> str:
    """One number where all axes agree."""
    texts = ["–" if value is None else f"{value:g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " x ".join(texts)
