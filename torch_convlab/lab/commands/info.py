"""How this library and torch were built, and what machine they run on."""

from __future__ import annotations

import argparse

from ..command import add_json_argument, describe, show, show_json
from ..environment import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "info", "info --json")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    facts = info()
    if arguments.json:
        show_json(facts)
        return 0
    width = max(len(name) for section in facts.values() for name in section)
    for section, values in facts.items():
        show(section, *(f"  {name:<{width}}  {value}" for name, value in values.items()))
    return 0
