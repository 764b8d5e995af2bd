"""Holds every layer and the whole model against torch.nn and float64: outputs, gradients, running statistics."""

from __future__ import annotations

import argparse

from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    describe,
    load_subject,
    one_line,
    show,
    show_json,
    table,
)
from ..errors import LabError
from ..verification import Comparison, Verification, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "verify resnet18 4,3,64,64", "verify lenet5 2,1,28,28 --all")
    add_model_arguments(parser)
    parser.add_argument("--eval", action="store_true", help="in eval mode (default: training mode, without dropout)")
    parser.add_argument("--all", action="store_true", help="every tensor, not only the ten largest errors")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """1 if anything diverges."""
    subject = load_subject(arguments)
    try:
        result = verify(subject.model.train(not arguments.eval), subject.inputs)
    except ValueError as error:  # batch norm on one value per channel
        raise LabError(f"{subject.name} does not run in training mode: {one_line(error)}; try --eval") from error
    if arguments.json:
        show_json({**{name: getattr(result, name) for name in result.__dataclass_fields__}, "passes": result.passes})
    else:
        _print(subject.name, result, arguments.all)
    return 0 if result.passes else 1


def _print(name: str, result: Verification, everything: bool) -> None:
    rows = result.layers if everything else sorted(result.layers, key=lambda row: -row.ours)[:10]
    which = f"all {len(rows)}" if everything else f"the {len(rows)} largest of {len(result.layers)}"
    show(comparison_table(rows, f"{name}, every layer alone in float32: {which} errors against float64"))
    show(
        f"the whole model in float64: {len(result.network)} outputs, gradients and running statistics, at most "
        f"{max(row.ours for row in result.network):.1e} from torch.nn\n"
        f"the whole model in float32: output off by {result.output.ours:.1e} ({result.output.ours_ulps:.1f} ulp), "
        f"torch.nn's by {result.output.theirs:.1e} ({result.output.theirs_ulps:.1f} ulp)"
    )
    show("passed" if result.passes else f"FAILED: the first to diverge is {result.first_divergence}")


def comparison_table(rows: list[Comparison], title: str):
    lines = table("layer", "tensor", "size", "ours", "torch.nn", "ours, ulp", "torch.nn, ulp", "", title=title, left=2)
    lines.caption = "max|error| / max|reference|, and in units of float32's last place at max|reference|"
    for row in rows:
        ulps = f"{row.ours_ulps:.1f}", f"{row.theirs_ulps:.1f}"
        verdict = "" if row.passes else "diverges"
        lines.add_row(row.name, row.kind, by(row.size), f"{row.ours:.1e}", f"{row.theirs:.1e}", *ulps, verdict)
    return lines
