"""Trains LeNet-5 on handwritten digits, with this library's layers or torch.nn's, from a seed, with checkpoints."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ..command import add_json_argument, check_writable, describe, positive, progress, show, show_json
from ..data import bundled_digits, mnist_folder
from ..errors import LabError
from ..train import Recipe, Run, train_lenet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        __doc__,
        "train lenet5",
        "train lenet5 --epochs 20 --checkpoint lenet5.pt --resume",
        "train lenet5 --torch --data ~/mnist",
    )
    parser.add_argument("model", choices=["lenet5"], metavar="MODEL", help="lenet5")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST's four IDX files, plain or .gz (default: scikit-learn's digits)"
    )
    parser.add_argument("--epochs", type=positive, default=Recipe.epochs, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and shifts (default: 0)")
    parser.add_argument(
        "--batch-size", type=positive, default=Recipe.batch_size, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=Recipe.learning_rate, metavar="X", help="default: %(default)s"
    )
    parser.add_argument("--torch", action="store_true", help="torch.nn's layers, for comparison")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="where to keep the state after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """1 if the loss became no number, else 0."""
    if not arguments.learning_rate > 0:
        raise LabError(f"expected a learning rate above 0, but got {arguments.learning_rate}")
    _check_checkpoint(arguments)
    digits = mnist_folder(arguments.data) if arguments.data else bundled_digits()
    recipe = Recipe(arguments.epochs, arguments.seed, arguments.batch_size, arguments.learning_rate)
    library = "torch.nn" if arguments.torch else "torch_convlab"
    steps = -(-len(digits.train_images) // recipe.batch_size)
    if not arguments.json:
        show(f"LeNet-5 of {library}; {digits}; {recipe.epochs} epochs of {steps} steps, seed {recipe.seed}")
    start, before = time.perf_counter(), []

    def on_epoch(run: Run) -> None:
        before.append(time.perf_counter() - start)
        if not arguments.json:
            loss = sum(run.losses[-steps:]) / steps
            epoch, seconds = len(run.accuracies), before[-1] - (before[-2] if len(before) > 1 else 0)
            show(f"epoch {epoch:3}  loss {loss:.5f}  test accuracy {100 * run.accuracy:.2f} %  {seconds:.1f} s")

    with progress("steps", recipe.epochs * steps) as advance:
        result = train_lenet(
            digits,
            recipe,
            torch.nn if arguments.torch else None,
            on_step=lambda _: advance(),
            on_epoch=on_epoch,
            checkpoint=arguments.checkpoint,
            resume=arguments.resume,
        )
    if arguments.json:
        show_json(
            {
                "library": library,
                "recipe": recipe,
                "data": str(digits),
                "losses": result.losses,
                "accuracies": result.accuracies,
                "seconds": result.seconds,
            }
        )
    elif not before:
        show(f"nothing left to do: the checkpoint has all {recipe.epochs} epochs")
    else:
        show(f"{result.seconds:.1f} s; test accuracy {100 * result.accuracy:.2f} %")
    return 0 if all(loss == loss for loss in result.losses) else 1


def _check_checkpoint(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.checkpoint is None:
        raise LabError("--resume needs --checkpoint FILE")
    if arguments.checkpoint is None:
        return
    if not arguments.resume and arguments.checkpoint.exists():
        raise LabError(f"{arguments.checkpoint} is there already; --resume goes on from it")
    check_writable(arguments.checkpoint)
