"""What the verbs of the command line share: models and shapes as arguments, tables, JSON, progress.

A verb is a module of `torch_convlab.lab.commands` with `add_arguments(parser)` and `run(arguments) -> exit status`:
0 if all is well, 1 if a check failed. Bad input raises `LabError`, which the command line turns into one line and
exit status 2. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from .. import models
from .errors import LabError, check_writable  # noqa: F401 - for the verbs

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": models.LeNet5,
    "alexnet": models.alexnet,
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
}


@dataclass(frozen=True)
class Subject:
    """The model that a verb looks at, in eval mode, and random inputs that it accepts."""

    name: str
    model: nn.Module
    inputs: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape)


def describe(parser: argparse.ArgumentParser, description: str, *examples: str) -> None:
    """Sets the help text; each of `examples` is what follows ``python -m torch_convlab``."""
    parser.description = description
    lines = "".join(f"  python -m torch_convlab {example}\n" for example in examples)
    parser.epilog = f"example{'s' if len(examples) > 1 else ''}:\n{lines}"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, SHAPE and --seed, which `load_subject` reads."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(MODELS)}, or package.module:function that returns a torch.nn.Module"
    )
    parser.add_argument("shape", metavar="SHAPE", type=parse_shape, help="of the input, such as 1,3,224,224")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and input (default: 0)")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"`` (or with ``x``) as integers; for argparse."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected at least two positive sizes such as 1,3,224,224, but got {text!r}")
    return shape


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, but got {text}")
    return value


def load_model(name: str) -> nn.Module:
    """A model of `MODELS`, or what ``package.module:function`` returns when called without arguments; in eval mode."""
    if name in MODELS:
        return MODELS[name]().eval()
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise LabError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}, or package.module:function")
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # the module's own code, which may raise anything
        raise LabError(f"cannot load model {name!r}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{name!r} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def load_subject(arguments: argparse.Namespace) -> Subject:
    """The model and random inputs of `add_model_arguments`; checks that the model accepts the shape."""
    torch.manual_seed(arguments.seed)
    model = load_model(arguments.model)
    inputs = torch.randn(arguments.shape)
    check_accepts(model, inputs, arguments.model)
    return Subject(arguments.model, model, inputs)


def check_accepts(model: nn.Module, inputs: Tensor, name: str) -> None:
    """Raises LabError unless `model` can be called with `inputs`; computes only if it cannot be tried without."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta")(inputs.to("meta"))
    except Exception:  # code that needs values, or the wrong shape: the real call tells
        try:
            with torch.no_grad():
                copy.deepcopy(model)(inputs)
        except Exception as error:
            raise LabError(f"{name} does not accept an input of {by(inputs.shape)}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def by(sizes: Iterable[int]) -> str:
    """``1 x 3 x 224 x 224``"""
    return " x ".join(map(str, sizes))


def engineering(value: float, unit: str = "") -> str:
    """Three digits and an SI prefix: ``4.09 G``."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def seconds(value: float) -> str:
    """Three digits and s, ms or us: ``2.31 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale * 0.9995:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def table(*columns: str, title: str | None = None, caption: str | None = None, left: int = 1) -> Table:
    """A table whose first `left` columns are flush left and the others flush right."""
    result = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < left else "right")
    return result


def show(*renderables: object) -> None:
    """Prints tables and plain text to stdout: coloured on a terminal, uncut and without control codes in a pipe."""
    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000
    for renderable in renderables:
        if isinstance(renderable, Table) and not console.is_terminal:
            with console.capture() as captured:
                console.print(renderable)
            print("\n".join(line.rstrip() for line in captured.get().splitlines()))
        else:
            console.print(renderable)


def show_json(value: object) -> None:
    """Prints plain data and dataclasses as JSON; numbers that JSON has not (infinity, NaN) become null."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: object) -> object:
    """`value` of dataclasses, tuples and dtypes as what `json` accepts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on stderr; yields what advances it by one. In a pipe there is no bar."""
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def track(items: Iterable, label: str) -> Iterator:
    """The items, with a bar on stderr that follows them: what the lab's functions take as `track`."""
    items = list(items)
    with progress(label, len(items)) as advance:
        for item in items:
            yield item
            advance()
