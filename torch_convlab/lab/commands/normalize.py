"""Which elements share statistics in batch, layer, instance and group norm, and what that does to a batch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command import add_json_argument, by, check_writable, describe, parse_shape, positive, show, show_json, table
from ..errors import LabError
from ..figure import save
from ..shared_statistics import example_batch, normalize, spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "normalize", "normalize --shape 4,6,4,4 --groups 3 --output normalize.png")
    parser.add_argument("--shape", type=parse_shape, default=(4, 6, 4, 4), metavar="N,C,S,S", help="default: 4,6,4,4")
    parser.add_argument("--groups", type=positive, default=2, metavar="N", help="of the group norm (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the batch (default: 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the picture: .png or .svg")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.shape) != 4 or arguments.shape[2] != arguments.shape[3]:
        raise LabError(f"expected a shape N,C,S,S such as 4,6,4,4, but got {','.join(map(str, arguments.shape))}")
    if arguments.output:
        check_writable(arguments.output)
    found = normalize(example_batch(*arguments.shape[:3], seed=arguments.seed), arguments.groups)
    picture = save(found.draw(), arguments.output) if arguments.output else None
    kinds = [
        {
            "name": kind.name,
            "sets": kind.set_count,
            "elements_per_set": kind.set_size,
            "depends_on_other_examples": kind.depends_on_batch,
            "spread_of_example_means": kind.spread()[0],
            "spread_of_channel_means": kind.spread()[1],
        }
        for kind in found.kinds
    ]
    if arguments.json:
        before = dict(zip(("spread_of_example_means", "spread_of_channel_means"), spread(found.input)))
        show_json({"shape": found.input.shape, "groups": found.groups, "input": before, "kinds": kinds})
        return 0
    rows = table(
        "normalization", "sets", "elements each", "depends on the batch", "spread of examples", "spread of channels"
    )
    rows.add_row("(input)", "", "", "", *(f"{value:.3f}" for value in spread(found.input)))
    for kind in kinds:
        name, sets, elements, depends, *spreads = kind.values()
        rows.add_row(name, str(sets), str(elements), "yes" if depends else "no", *(f"{value:.3f}" for value in spreads))
    show(
        f"batch of {by(found.input.shape)}; a set is what shares one mean and one variance, read off the gradients",
        rows,
        "spread: standard deviation of the means of the examples, or channels; 0.000 where the layer takes it away",
        *([f"picture: {picture}"] if picture else []),
    )
    return 0
