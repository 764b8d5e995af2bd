"""Measures all algorithms for every convolution of a model and writes the fastest to the cache of choices."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from ..choices import PASSES
from ..command import (
    add_json_argument,
    add_model_arguments,
    by,
    describe,
    load_subject,
    seconds,
    show,
    show_json,
    table,
)
from ..command import track as progress
from ..tuning import Tuning, tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser, __doc__, "tune resnet18 1,3,224,224", "tune resnet18 8,3,224,224 --pass forward --cache tuned.json"
    )
    add_model_arguments(parser)
    parser.add_argument("--pass", dest="passes", choices=PASSES, action="append", help="default: all three")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="default: $TORCH_CONVLAB_CACHE or the user's cache")
    parser.add_argument("--all", action="store_true", help="print also what did not change")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    subject = load_subject(arguments)
    options = {"passes": arguments.passes or PASSES, "cache": arguments.cache, "track": progress}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = tune(subject.model, subject.shape, subject.name, **options)
    if arguments.json:
        show_json(result)
        return 0
    changed = [entry for entry in result.entries if entry.changed]
    if arguments.all or changed:
        show(entry_table(result, arguments.all))
    for warning in caught:
        if "algorithm cache" in str(warning.message):
            show(f"note: {warning.message}")
    show(
        f"{len(result.entries)} problems measured with {result.threads} thread(s), {len(changed)} choices changed; "
        f"written to {result.cache}\n"
        "Use them with: torch_convlab.backends.autotune = True"
        + (f" after torch_convlab.backends.cache_path = {str(arguments.cache)!r}" if arguments.cache else "")
    )
    return 0


def entry_table(result: Tuning, everything: bool):
    title = f"{result.model}, input {by(result.input_size)}: {'all choices' if everything else 'what changed'}"
    lines = table("layers", "pass", "format", "before", "chosen", "times faster", "measured", title=title, left=5)
    lines.columns[-1].justify = "left"
    for entry in result.entries:
        if not (everything or entry.changed):
            continue
        more = f" and {len(entry.names) - 1} more" if len(entry.names) > 1 else ""
        before = entry.before or f"{entry.expected} (expected)"
        measured = ", ".join(f"{name} {seconds(value)}" for name, value in entry.seconds.items() if value == value)
        gain = f"{entry.gain:.2f}" if entry.changed and entry.gain else ""
        lines.add_row(entry.names[0] + more, entry.pass_, entry.format, before, entry.chosen, gain, measured)
    return lines
