"""Which convolution algorithm runs and why: each one's refusal or cost, workspace and time, and the roofline bound."""

from __future__ import annotations

import argparse

from ..choices import PASSES, Explanation, explain, explain_layer
from ..command import (
    add_json_argument,
    by,
    check_accepts,
    describe,
    engineering,
    load_model,
    parse_shape,
    seconds,
    show,
    show_json,
    table,
    track,
)
from ..errors import LabError
from ..exported import Convolution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        __doc__,
        "explain resnet18 1,3,224,224 --layer layer1",
        "explain --input 1,64,56,56 --weight 64,64,3,3 --padding 1 --pass backward_weight",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="as for summary; every convolution of it is explained"
    )
    parser.add_argument("shape", metavar="SHAPE", nargs="?", type=parse_shape, help="of its input, such as 1,3,224,224")
    parser.add_argument("--layer", metavar="NAME", help="only this layer, or those inside this module")
    one = parser.add_argument_group("one convolution instead of a model")
    one.add_argument("--input", type=parse_shape, metavar="SHAPE", help="N,C,H,W (or of 1 or 3 spatial sizes)")
    one.add_argument("--weight", type=parse_shape, metavar="SHAPE", help="K,C/groups,kH,kW")
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
        one.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--pass", dest="pass_", choices=PASSES, default="forward", help="default: forward")
    parser.add_argument("--channels-last", action="store_true", help="tensors in that memory format")
    parser.add_argument("--no-measure", action="store_true", help="do not time the algorithms")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    result = _explanations(arguments)
    if arguments.json:
        show_json(result)
        return 0
    for index, explanation in enumerate(result):
        if index:
            show("")
        show(algorithm_table(explanation))
    show(
        "cost: expected, in multiply-adds of a perfectly running matrix product. bound: least time by the measured "
        "peak and bandwidth;\nwinograd computes fewer multiplications and may be faster."
    )
    return 0


def _explanations(arguments: argparse.Namespace) -> list[Explanation]:
    options = {
        "pass_": arguments.pass_, "channels_last": arguments.channels_last, "measure": not arguments.no_measure,
    }  # fmt: skip
    if arguments.model is not None:
        if arguments.shape is None or arguments.input or arguments.weight:
            raise LabError("expected MODEL and SHAPE, or --input and --weight, not a mixture")
        import torch

        torch.manual_seed(0)
        model = load_model(arguments.model)
        check_accepts(model, torch.zeros(arguments.shape), arguments.model)
        result = explain(model, arguments.shape, arguments.model, layer=arguments.layer, track=track, **options)
        if not result:
            where = f" called {arguments.layer!r}" if arguments.layer else ""
            raise LabError(f"{arguments.model} has no convolution or linear layer{where}")
        return result
    if not (arguments.input and arguments.weight):
        raise LabError("expected MODEL and SHAPE, or --input and --weight")
    spatial = len(arguments.input) - 2
    axes = [(getattr(arguments, name),) * spatial for name in ("stride", "padding", "dilation")]
    problem = Convolution(arguments.input, arguments.weight, *axes, arguments.groups)
    try:
        if spatial not in (1, 2, 3) or len(arguments.weight) != len(arguments.input):
            raise ValueError("expected --input and --weight of 3 to 5 sizes each, and as many")
        if min(problem.output_size) < 1:
            raise ValueError(f"the output would be {by(problem.output_size)}")
        return [explain_layer(problem, **options)]
    except ValueError as error:
        raise LabError(f"no convolution has these sizes: {error}") from error


def algorithm_table(explanation: Explanation):
    problem = explanation.problem
    names = ", ".join(explanation.names[:3]) + (", ..." if len(explanation.names) > 3 else "")
    axes = [f"{name} {by(value)}" for name, value in (
        ("stride", problem.stride), ("padding", problem.padding), ("dilation", problem.dilation)
    )]  # fmt: skip
    title = (
        f"{names + ': ' if names else ''}{explanation.pass_}, input {by(problem.input_size)}, weight "
        f"{by(problem.weight_size)}, {', '.join(axes)}, groups {problem.groups}, {explanation.format}\n"
        f"{engineering(2 * explanation.multiply_adds, 'FLOP')}, {engineering(explanation.bytes, 'B')}; bound "
        f"{seconds(explanation.bound)} by {explanation.bound_by}"
    )
    lines = table("", "algorithm", "cost", "workspace", "time", "of bound", "why not", title=title, left=2)
    lines.columns[-1].justify = "left"
    for row in explanation.algorithms:
        lines.add_row(
            "→" if row.chosen else "",
            row.algorithm,
            "" if row.cost is None else engineering(row.cost),
            "" if row.workspace is None else engineering(row.workspace, "B"),
            "" if row.seconds is None else seconds(row.seconds),
            "" if row.seconds is None else f"{100 * explanation.bound / row.seconds:.0f} %",
            row.refusal or ("" if row.seconds is not None else "not measured"),
        )
    return lines
