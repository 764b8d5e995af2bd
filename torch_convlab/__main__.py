"""The command line: ``python -m torch_convlab VERB``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# Each verb is a module of torch_convlab.lab.commands (with _ for -): `add_arguments(parser)`, `run(arguments)`.
VERBS = {
    "info": "how this library was built, and what machine it runs on",
    "doctor": "what is missing or in the way, and how to mend it",
    "summary": "sizes, parameters, multiply-adds, bytes and receptive field of every layer of a model",
    "explain": "which algorithm computes each convolution and why: refusals, costs, workspace, bound, time",
    "tune": "measure all algorithms for every convolution of a model and write the cache of choices",
    "bench": "this library against torch in both memory formats, by layer and in total",
    "verify": "outputs, gradients and running statistics against torch.nn and float64",
    "roofline": "every layer against the measured peak and bandwidth of this machine",
    "advise": "the lecture's devils in the details, looked for in a model",
    "demo": "train LeNet-5 on real digits, verify and time a converted ResNet-50, write report.html",
    "gradients": "the products that the gradient of one weight, and of one input, of a convolution sum over",
    "graph": "the computational graph of a model: forward, backward, saved tensors, bytes",
    "normalize": "which elements share statistics in batch, layer, instance and group norm",
    "receptive-field": "how the receptive field grows over the layers, in theory and measured by gradients",
    "report": "all of it about one model, in one HTML file that opens offline",
    "train": "train LeNet-5 on handwritten digits, with checkpoints",
}
LAB_PACKAGES = {"jinja2", "matplotlib", "numpy", "rich", "sklearn"}


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; its exit status: 0 all is well, 1 a check failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    width = max(map(len, VERBS))
    parser = argparse.ArgumentParser(
        prog="python -m torch_convlab",
        description=importlib.import_module("torch_convlab").__doc__,
        epilog="example:\n  python -m torch_convlab demo --help\n\nverbs:\n"
        + "\n".join(f"  {verb:<{width}} {description}" for verb, description in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below")
    verb = parser.parse_args(arguments[:1]).verb
    prefix = f"{parser.prog} {verb}"
    try:
        module = importlib.import_module(f"torch_convlab.lab.commands.{verb.replace('-', '_')}")
        verb_parser = argparse.ArgumentParser(prog=prefix, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(verb_parser)
        return _run(module, verb_parser.parse_args(arguments[1:]), prefix)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in LAB_PACKAGES:
            raise
        message = f"needs {error.name}; install the lab's packages: pip install 'torch_convlab[lab]'"
        print(f"{prefix} {message}", file=sys.stderr)
        return 2


def _run(module, arguments: argparse.Namespace, prefix: str) -> int:
    from .lab.errors import LabError

    try:
        return module.run(arguments)
    except LabError as error:
        print(f"{prefix}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{prefix}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
