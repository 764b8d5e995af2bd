"""The command line: ``python -m torch_convlab VERB``."""

from __future__ import annotations

import argparse
import importlib
import sys

# Each verb is a module of torch_convlab.lab with `add_arguments(parser)` and `run(arguments) -> exit status`.
VERBS = {
    "demo": "train LeNet-5 on real digits, verify and time a converted ResNet-50, write report.html",
}
LAB_PACKAGES = {"jinja2", "matplotlib", "numpy", "rich", "sklearn"}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m torch_convlab",
        description=importlib.import_module("torch_convlab").__doc__,
        epilog="example:\n  python -m torch_convlab demo --help\n\nverbs:\n"
        + "\n".join(f"  {verb:<10} {description}" for verb, description in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below")
    verb = parser.parse_args(arguments[:1]).verb
    try:
        module = importlib.import_module(f"torch_convlab.lab.{verb}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in LAB_PACKAGES:
            raise
        print(
            f"{parser.prog} {verb} needs {error.name}; install the lab's packages: pip install 'torch_convlab[lab]'",
            file=sys.stderr,
        )
        return 2
    verb_parser = argparse.ArgumentParser(
        prog=f"{parser.prog} {verb}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(verb_parser)
    return module.run(verb_parser.parse_args(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
