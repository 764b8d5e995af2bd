"""The lecture's "devils in the details": common mistakes in a model and in how it is called."""

from __future__ import annotations

import argparse

import torch

from ..advice import advise
from ..command import add_json_argument, add_model_arguments, describe, load_subject, show, show_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "advise alexnet 4,3,224,224")
    add_model_arguments(parser)
    parser.add_argument("--channels-last", action="store_true", help="the input is in that memory format")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    subject = load_subject(arguments)
    inputs = subject.inputs
    if arguments.channels_last and inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    found = advise(subject.model, inputs, subject.name)
    if arguments.json:
        show_json(found)
        return 0
    for advice in found:
        more = f" and {len(advice.where) - 4} more" if len(advice.where) > 4 else ""
        show(f"{advice.rule}: {', '.join(advice.where[:4])}{more}\n  {advice.message}.")
    show(f"{len(found)} remark(s) on {subject.name}" if found else f"nothing to remark on {subject.name}")
    return 0
