"""What is missing or in the way of right and fast results on this machine, and how to mend it."""

from __future__ import annotations

import argparse

from ..command import add_json_argument, describe, show, show_json
from ..environment import doctor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "doctor")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """1 if something spoils results or speed."""
    checks = doctor()
    if arguments.json:
        show_json(checks)
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = "✗" if check.severe else "!" if check.mend else "✓"
            show(f"{mark} {check.name:<{width}}  {check.found}", *([f"    {check.mend}"] if check.mend else []))
    return 1 if any(check.severe for check in checks) else 0
