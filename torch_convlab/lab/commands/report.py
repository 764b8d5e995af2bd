"""All that the lab finds out about a model, in one HTML file that opens offline."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..command import (
    add_json_argument,
    add_model_arguments,
    check_writable,
    describe,
    load_subject,
    show,
    show_json,
    track,
)
from ..errors import LabError
from ..model_report import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        __doc__,
        "report resnet50 1,3,224,224",
        "report lenet5 8,1,28,28 --sections overview,layers,graph --output lenet5.html",
    )
    add_model_arguments(parser)
    parser.add_argument("--sections", metavar="KEYS", help="some of them, such as overview,layers (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report-MODEL.html in the current folder")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 if every check of the report passed, 1 if one failed."""
    start = time.perf_counter()
    path = arguments.output or Path(f"report-{arguments.model.rpartition(':')[2]}.html")
    if path.suffix not in (".html", ".htm"):
        raise LabError(f"expected a file name that ends in .html, but got {str(path)!r}")
    check_writable(path)
    subject = load_subject(arguments)
    keys = arguments.sections.split(",") if arguments.sections else None
    found = report(subject.model, subject.shape, subject.name, arguments.seed, keys, track)
    found.html(path)
    if arguments.json:
        sections = [
            {"key": section.key, "passed": section.passed, "seconds": section.seconds, "checks": _checks(section)}
            for section in found.sections
        ]
        show_json({"model": found.model, "input_size": found.input_size, "path": str(path), "sections": sections})
    else:
        lines = [
            f"{'✓' if passed else '✗'} {section.title}: {text}"
            for section in found.sections
            for passed, text in _checks(section)
        ]
        size = path.stat().st_size / 1e6
        show(*lines, f"{path}: {len(found.sections)} sections, {size:.1f} MB, {time.perf_counter() - start:.0f} s")
    return 0 if found.passed else 1


def _checks(section) -> list[tuple[bool, str]]:
    return [check for block in section.blocks for check in block.checks]
