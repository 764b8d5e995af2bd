"""The demo: LeNet-5 learns real digits, a ResNet-50 is converted, verified and timed, and a report is written."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ... import build_info, convert, models
from ..command import describe, positive, progress
from ..data import Digits, bundled_digits, mnist_folder
from ..demo_report import Results, write_report
from ..timing import FORMATS, time_model
from ..train import Recipe, Run, differences, train_lenet
from ..verification import Comparison, verify_layers, verify_network

_ACCURACY = 0.98
_FLOAT32_STEPS, _FLOAT32_DIFFERENCE = 10, 1e-4  # later, training amplifies rounding
_FLOAT64_EPOCHS, _FLOAT64_DIFFERENCE = 4, 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(parser, __doc__, "demo", "demo --data ~/mnist --epochs 2 --output mnist.html")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST's four IDX files, plain or .gz (default: scikit-learn's digits)"
    )
    parser.add_argument("--epochs", type=positive, metavar="N", help="default: 12; with --data 2")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and shifts (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 epochs without a demand on accuracy, ResNet-18, few rounds: a smoke test",
    )


def run(arguments: argparse.Namespace) -> int:
    """0 if every check passed, 1 if one failed."""
    start = time.perf_counter()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    info = build_info()
    console.print(
        f"torch_convlab {info['version']}, torch {info['torch']}, {info['instruction_set']} kernels, "
        f"{torch.get_num_threads()} thread(s)"
    )
    digits = mnist_folder(arguments.data) if arguments.data else bundled_digits()
    epochs = arguments.epochs or (2 if arguments.quick or arguments.data else Recipe.epochs)
    results = _train(console, digits, Recipe(epochs=epochs, seed=arguments.seed), arguments.quick)
    _verify_and_time(console, results, arguments.quick)
    write_report(results, arguments.output)
    console.rule("Summary")
    for passed, text in results.checks:
        console.print(Text.assemble(("✓ ", "green") if passed else ("✗ ", "red"), text))
    console.print(f"{time.perf_counter() - start:.0f} s; report: {arguments.output}", soft_wrap=True)
    return 0 if results.passed else 1


def _train(console: Console, digits: Digits, recipe: Recipe, quick: bool) -> Results:
    console.rule("1. LeNet-5 learns handwritten digits")
    console.print(f"{digits}; {recipe.epochs} epochs, seed {recipe.seed}")
    short, few = replace(recipe, epochs=min(recipe.epochs, _FLOAT64_EPOCHS)), digits.first(320 if quick else 1500)
    ours = _train_one(console, "torch_convlab", digits, recipe, None)
    theirs = _train_one(console, "torch.nn", digits, recipe, torch.nn)
    ours_exact = _train_one(console, "torch_convlab, float64", few, short, None, torch.float64)
    theirs_exact = _train_one(console, "torch.nn, float64", few, short, torch.nn, torch.float64)
    results = Results(recipe, digits, ours, theirs, ours_exact, theirs_exact)
    console.print(_epochs(results))

    read = f"LeNet-5 reads {100 * ours.accuracy:.2f} % of the test images (torch.nn {100 * theirs.accuracy:.2f} %)"
    if quick:
        results.check(True, read)
    else:
        results.check(ours.accuracy >= _ACCURACY, f"{read}; at least {100 * _ACCURACY:.0f} % wanted")
    apart, exact = differences(ours, theirs), max(differences(ours_exact, theirs_exact))
    first = max(apart[:_FLOAT32_STEPS])
    results.check(
        first <= _FLOAT32_DIFFERENCE,
        f"float32 losses of both runs agree to {first:.1e} over the first {_FLOAT32_STEPS} steps; training amplifies "
        f"rounding, later they are up to {max(apart):.1e} apart",
    )
    results.check(
        exact <= _FLOAT64_DIFFERENCE,
        f"float64 losses agree to {exact:.1e} over {short.epochs} epochs: what is left in float32 is rounding",
    )
    return results


def _epochs(results: Results) -> Table:
    table = Table("epoch", "loss, ours", "loss, torch.nn", "largest difference", "accuracy, ours", "accuracy, torch.nn")
    runs = results.ours, results.theirs
    apart, steps = differences(*runs), len(results.ours.losses) // results.recipe.epochs
    for epoch in range(results.recipe.epochs):
        part = slice(epoch * steps, (epoch + 1) * steps)
        losses = [f"{sum(run.losses[part]) / steps:.5f}" for run in runs]
        accuracies = [f"{100 * run.accuracies[epoch]:.2f} %" for run in runs]
        table.add_row(str(epoch + 1), *losses, f"{max(apart[part]):.1e}", *accuracies)
    return table


def _train_one(console, label, digits, recipe, layers, dtype=torch.float32) -> Run:
    steps = recipe.epochs * -(-len(digits.train_images) // recipe.batch_size)
    with progress(label, steps) as advance:
        run = train_lenet(digits, recipe, layers, on_step=lambda _: advance(), dtype=dtype)
    console.print(f"{label}: {run.seconds:.1f} s, test accuracy {100 * run.accuracy:.2f} %")
    return run


def _verify_and_time(console: Console, results: Results, quick: bool) -> None:
    build, size = (models.resnet18, (2, 3, 64, 64)) if quick else (models.resnet50, (4, 3, 128, 128))
    results.model_name, results.input_size = build.__name__.replace("resnet", "ResNet-"), size
    console.rule(f"2. {results.model_name}, converted and verified")
    torch.manual_seed(results.recipe.seed)
    model = convert(build(layers=torch.nn))
    inputs, direction = torch.randn(size), torch.randn(size[0], model.fc.out_features)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output * direction.to(output.dtype)).sum() / size[0]

    with console.status("every layer alone, float32 against float64"):
        results.layers = verify_layers(model, inputs, loss)
    with console.status("the whole network, float64"):
        results.network = verify_network(model, inputs, loss)
    console.print(_worst(results.layers))
    worst = max(row.ours for row in results.layers), max(row.theirs for row in results.layers)
    results.check(
        all(row.passes for row in results.layers),
        f"{results.model_name}, every layer alone in float32: {len(results.layers)} outputs and gradients, "
        f"error at most {worst[0]:.1e} (torch.nn {worst[1]:.1e})",
    )
    results.check(
        all(row.passes for row in results.network),
        f"{results.model_name} as a whole in float64: {len(results.network)} outputs and gradients, "
        f"at most {max(row.ours for row in results.network):.1e} from torch.nn",
    )
    console.rule(f"3. {results.model_name}, timed")
    rounds = 3 if quick else 9
    with progress("rounds", 2 * rounds) as advance:
        results.timings = time_model(model, inputs, rounds, on_round=advance)
    console.print(_speeds(results))


def _worst(comparisons: list[Comparison], count: int = 10) -> Table:
    table = Table(
        "layer", "tensor", "size", "ours", "torch.nn", title=f"The {count} largest of {len(comparisons)} errors"
    )
    for row in sorted(comparisons, key=lambda row: -row.ours)[:count]:
        table.add_row(row.name, row.kind, " x ".join(map(str, row.size)), f"{row.ours:.1e}", f"{row.theirs:.1e}")
    table.caption = "max|error| / max|reference| against float64; all of them are in the report"
    return table


def _speeds(results: Results) -> Table:
    table = Table("task", "format", "ours", "torch", "torch / ours", "middle half")
    rounds = len(results.timings[0].seconds["ours NCHW"])
    table.caption = f"median of {rounds} rounds in turns, input {results.input_size}; above 1: ours is faster"
    for timing in results.timings:
        pairs = [(name, f"ours {name}", f"torch {name}") for name in FORMATS]
        for name, ours, theirs in [*pairs, ("best of each", timing.best("ours"), timing.best("torch"))]:
            ratio, low, high = timing.ratio(ours, theirs)
            milliseconds = [f"{1e3 * timing.median(contestant):.0f} ms" for contestant in (ours, theirs)]
            table.add_row(timing.task, name, *milliseconds, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
    return table
