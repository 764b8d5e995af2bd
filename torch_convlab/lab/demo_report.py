"""Writes what a demo run found as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import torch

from .. import build_info
from . import charts
from .data import Digits
from .timing import FORMATS, Timing
from .train import Recipe, Run, differences
from .verification import Comparison


@dataclass
class Results:
    """Everything a demo run found; filled step by step."""

    recipe: Recipe
    digits: Digits
    ours: Run
    theirs: Run
    ours_float64: Run
    theirs_float64: Run
    model_name: str = ""
    input_size: tuple[int, ...] = ()
    layers: list[Comparison] = field(default_factory=list)
    network: list[Comparison] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    checks: list[tuple[bool, str]] = field(default_factory=list)  # filled by `check`

    def check(self, passed: bool, text: str) -> None:
        """Note what was checked and found."""
        self.checks.append((passed, text))

    @property
    def passed(self) -> bool:
        return all(passed for passed, _ in self.checks)


def write_report(results: Results, path: Path) -> None:
    """Render `results` into `path`; folders in between are made."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["scientific"] = lambda value: f"{value:.1e}"
    page = environment.get_template("demo.html.jinja").render(
        results=results,
        build=build_info(),
        threads=torch.get_num_threads(),
        charts=_charts(results),
        samples=_samples(results),
        filters=[
            charts.picture(kernel[0], "RdBu", symmetric=True) for kernel in results.ours.model.conv1.weight.detach()
        ],
        speeds=[_speed(timing, name) for timing in results.timings for name in FORMATS],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _charts(results: Results) -> dict[str, str]:
    ours, theirs = results.ours, results.theirs
    steps_per_epoch = len(ours.losses) // results.recipe.epochs
    return {
        "losses": charts.losses(ours.losses, theirs.losses, steps_per_epoch),
        "differences": charts.differences(
            differences(ours, theirs), differences(results.ours_float64, results.theirs_float64), steps_per_epoch
        ),
        "accuracies": charts.accuracies(ours.accuracies, theirs.accuracies),
        "timings": charts.timings(results.timings),
    }


def _samples(results: Results, count: int = 24) -> list[tuple[str, int, int]]:
    """Test images with prediction and label: all that are wrong (up to the half), then the first right ones."""
    predictions, labels = results.ours.predictions, results.digits.test_labels
    wrong = (predictions != labels).nonzero().flatten()[: count // 2]
    right = (predictions == labels).nonzero().flatten()[: count - len(wrong)]
    return [
        (charts.picture(results.digits.test_images[index, 0]), predictions[index].item(), labels[index].item())
        for index in (*wrong, *right)
    ]


def _filters(results: Results) -> list[str]:
    weight = results.ours.model.conv1.weight.detach()
    return [charts.picture(kernel[0], "RdBu", symmetric=True) for kernel in weight]


def _speed(timing: Timing, format_name: str) -> dict[str, object]:
    ours, theirs = f"ours {format_name}", f"torch {format_name}"
    return {
        "task": timing.task,
        "format": format_name,
        "ours": 1e3 * timing.median(ours),
        "theirs": 1e3 * timing.median(theirs),
        "ratio": timing.ratio(ours, theirs),
    }
