"""Trains LeNet-5 on digits; everything that is random comes from the recipe's seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models import LeNet5
from . import checkpoints
from .data import Digits, shifted


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, the learning rate falling to zero along a cosine; images moved at random by `shift` pixels."""

    epochs: int = 12
    seed: int = 0
    batch_size: int = 32
    learning_rate: float = 0.03
    momentum: float = 0.9
    shift: int = 2


@dataclass
class Run:
    """A trained model and how it got there."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)  # one per step
    accuracies: list[float] = field(default_factory=list)  # on the test images, one per epoch
    predictions: Tensor | None = None  # of the test images
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


def train_lenet(
    digits: Digits,
    recipe: Recipe,
    layers: ModuleType | None = None,
    on_step: Callable[[Run], None] = lambda run: None,
    dtype: torch.dtype = torch.float32,
    on_epoch: Callable[[Run], None] = lambda run: None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Train a LeNet-5 made of `layers` (this library's by default).

    Initial weights, the order of the images and their shifts follow from the recipe's seed alone, so two runs that
    differ in `layers` alone compute the same numbers but for rounding; a resumed run computes those of one that was
    never interrupted, bit for bit.

    Args:
        on_step, on_epoch: called with the run so far, after each step and each epoch.
        checkpoint: file in which to keep the state of training after every epoch.
        resume: go on from `checkpoint`, which must be of the same recipe, images and dtype.

    Raises:
        LabError: `checkpoint` cannot be read, or is of another training.
    """
    torch.manual_seed(recipe.seed)
    run = Run(LeNet5(layers=layers).to(dtype))
    optimizer = torch.optim.SGD(run.model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps_per_epoch = -(-len(digits.train_images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps_per_epoch)
    state = checkpoints.State(run, optimizer, schedule, generator, recipe, str(digits), dtype)
    if resume:
        state.load(checkpoint)
    start = time.perf_counter() - run.seconds
    for _ in range(len(run.accuracies), recipe.epochs):
        run.model.train()
        order = torch.randperm(len(digits.train_images), generator=generator)
        for batch in order.split(recipe.batch_size):
            images = shifted(digits.train_images[batch], recipe.shift, generator).to(dtype)
            loss = functional.cross_entropy(run.model(images), digits.train_labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            on_step(run)
        run.predictions = predict(run.model, digits.test_images.to(dtype))
        run.accuracies.append((run.predictions == digits.test_labels).double().mean().item())
        run.seconds = time.perf_counter() - start
        if checkpoint is not None:
            state.save(checkpoint)
        on_epoch(run)
    return run


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely digit of every image."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in images.split(250)])


def differences(first: Run, second: Run) -> list[float]:
    """How far the losses of two runs are apart, step by step; infinitely far if one is no number."""
    pairs = zip(first.losses, second.losses)
    return [abs(one - other) if math.isfinite(one - other) else math.inf for one, other in pairs]
