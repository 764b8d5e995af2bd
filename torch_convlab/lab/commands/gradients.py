"""Where a convolution's gradients come from: the products that one weight's and one input's gradient sum over."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..command import add_json_argument, by, check_writable, describe, show, show_json, table
from ..errors import LabError
from ..figure import save
from ..gradient_sums import Gradients, Term, gradients

_TOLERANCE = 1e-12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        __doc__ + " Without options: the lecture's 4 x 4 input and two 3 x 3 kernels.",
        "gradients",
        "gradients --weight 0,1 --input-value 1,1 --output gradients.png",
        "gradients --input '1 2 3; 4 5 6; 7 8 9' --kernel '1 0; 0 -1' --padding 1 --stride 2",
    )
    parser.add_argument("--input", type=_matrix, metavar="ROWS", help="numbers, rows parted by ; (one channel)")
    parser.add_argument("--kernel", type=_matrix, action="append", metavar="ROWS", help="the same; may be repeated")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--padding", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--dilation", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--weight", type=_place, default=(0, 1), metavar="ROW,COLUMN", help="of filter 0; default: 0,1")
    parser.add_argument("--input-value", type=_place, default=(1, 1), metavar="ROW,COLUMN", help="default: 1,1")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the picture: .png or .svg")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 if autograd gives the same gradients, 1 if not."""
    if arguments.output:
        check_writable(arguments.output)
    kernels = None
    if arguments.kernel:
        if len({tuple(kernel.shape) for kernel in arguments.kernel}) > 1:
            raise LabError("expected kernels of one size")
        kernels = torch.stack(arguments.kernel)
    found = gradients(
        arguments.input, kernels, stride=arguments.stride, padding=arguments.padding, dilation=arguments.dilation
    )
    of_weight, of_input = found.weight_terms(*arguments.weight), found.input_terms(*arguments.input_value)
    error = found.autograd_error()
    passes = error <= _TOLERANCE * max(1, found.weight_gradient.abs().max().item())
    picture = save(found.draw(arguments.weight, arguments.input_value), arguments.output) if arguments.output else None
    if arguments.json:
        show_json(_data(found, arguments, of_weight, of_input, error))
    else:
        show(
            f"input {by(found.input.shape)}, weight {by(found.weight.shape)}, output {by(found.grad_output.shape)}",
            *(f"grad_output of filter {k}: {plane.tolist()}" for k, plane in enumerate(found.grad_output[0])),
            _sum("weight", arguments.weight, of_weight, "input"),
            _sum("input", arguments.input_value, of_input, "weight"),
            f"gradient of all weights, filter by filter: {found.weight_gradient.tolist()}",
            f"gradient of the bias: {[sum(found.bias_terms(k)) for k in range(found.weight.shape[0])]}",
            f"gradient of all inputs: {found.input_gradient.tolist()}",
            f"{'✓' if passes else '✗'} autograd gives the same: largest difference {error:.1e}",
            *([f"picture: {picture}"] if picture else []),
        )
    return 0 if passes else 1


def _sum(of: str, place: tuple[int, int], terms: list[Term], factor: str):
    total = sum(term.product for term in terms)
    shown = " + ".join(map(str, terms)) if len(terms) <= 16 else f"{len(terms)} products"
    rows = table("output", factor, f"value of {factor}", "grad_output", "product", title="")
    for term in terms:
        values = (f"{value:g}" for value in (term.factor, term.grad_output, term.product))
        rows.add_row(str(term.output), str(term.place), *values)
    rows.title = f"gradient of {of} {place} = {shown or 0} = {total:g}"
    return rows


def _data(found: Gradients, arguments, of_weight, of_input, error: float) -> dict:
    def terms(values: list[Term]) -> list[dict]:
        return [{**vars(term), "product": term.product, "text": str(term)} for term in values]

    return {
        "input": found.input.tolist(),
        "weight": found.weight.tolist(),
        "grad_output": found.grad_output.tolist(),
        "weight_place": arguments.weight,
        "weight_terms": terms(of_weight),
        "input_place": arguments.input_value,
        "input_terms": terms(of_input),
        "weight_gradient": found.weight_gradient.tolist(),
        "input_gradient": found.input_gradient.tolist(),
        "autograd_error": error,
    }


def _matrix(text: str) -> torch.Tensor:
    try:
        rows = [[float(value) for value in row.replace(",", " ").split()] for row in text.split(";")]
        return torch.tensor(rows, dtype=torch.float64)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected rows of one length such as '1 2; 3 4', but got {text!r}") from None


def _place(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROW,COLUMN such as 0,1, but got {text!r}") from None
    return row, column
