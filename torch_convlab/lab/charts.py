"""Pictures of the report: charts as inline SVG in the page's own colours, small images as PNG data."""

from __future__ import annotations

import base64
import io

from matplotlib import image, pyplot
from torch import Tensor

from .figure import INK, OURS, THEIRS, inline_svg, style
from .layers import Summary
from .timing import Timing


def losses(ours: list[float], theirs: list[float], steps_per_epoch: int) -> str:
    """Loss of every step of both runs, over epochs."""
    with style():
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
        for values, color, label, line in (
            (theirs, THEIRS, "torch.nn", {"linewidth": 3, "alpha": 0.6}),
            (ours, OURS, "torch_convlab", {"linewidth": 1}),
        ):
            axes.semilogy(
                [step / steps_per_epoch for step in range(len(values))], values, color=color, label=label, **line
            )
        _epochs_and("loss of the batch", axes)
        return inline_svg(figure)


def differences(float32: list[float], float64: list[float], steps_per_epoch: int) -> str:
    """How far the losses of the two runs are apart, in both precisions."""
    with style():
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
        for values, color, label in ((float32, OURS, "float32"), (float64, THEIRS, "float64")):
            shown = [max(value, 1e-17) for value in values]
            axes.semilogy(
                [step / steps_per_epoch for step in range(len(shown))],
                shown,
                ".",
                color=color,
                label=label,
                markersize=3,
            )
        _epochs_and("|difference of the losses|", axes)
        return inline_svg(figure)


def accuracies(ours: list[float], theirs: list[float]) -> str:
    with style():
        figure, axes = pyplot.subplots(figsize=(6.4, 3.2))
        epochs = range(1, len(ours) + 1)
        axes.plot(
            epochs, [100 * value for value in theirs], "o-", color=THEIRS, label="torch.nn", linewidth=3, alpha=0.6
        )
        axes.plot(epochs, [100 * value for value in ours], "o-", color=OURS, label="torch_convlab", markersize=3)
        axes.axhline(98, color=INK, linewidth=0.8, linestyle=":")
        _epochs_and("test accuracy, %", axes)
        return inline_svg(figure)


def timings(timings: list[Timing]) -> str:
    """Median milliseconds of every contestant, with the middle half of the rounds as a line."""
    with style():
        figure, row = pyplot.subplots(1, len(timings), figsize=(6.4, 2.6), squeeze=False)
        for axes, timing in zip(row[0], timings):
            names = list(timing.seconds)
            middle = [1e3 * timing.median(name) for name in names]
            spread = [[1e3 * value for value in timing.spread(name)] for name in names]
            reach = [
                [m - low for m, (low, _) in zip(middle, spread)],
                [high - m for m, (_, high) in zip(middle, spread)],
            ]
            colors = [OURS if name.startswith("ours") else THEIRS for name in names]
            axes.barh(names, middle, xerr=reach, color=colors, ecolor=INK, error_kw={"linewidth": 0.8})
            axes.set(xlabel="milliseconds", title=timing.task)
            axes.invert_yaxis()
            if axes is not row[0][0]:
                axes.set_yticklabels([])
        figure.tight_layout()
        return inline_svg(figure)


def picture(values: Tensor, colors: str = "gray", symmetric: bool = False) -> str:
    """A 2-D tensor as a data URI, one pixel per value; `symmetric` puts zero in the middle of the colours."""
    high = values.abs().max().item() if symmetric else values.max().item()
    low = -high if symmetric else values.min().item()
    buffer = io.BytesIO()
    image.imsave(buffer, values.numpy(), cmap=colors, vmin=low, vmax=high, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _epochs_and(label: str, axes) -> None:
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def layers(summary: Summary) -> str:
    """Multiply-adds, parameters and saved bytes of every layer, in order."""
    series = [
        ("multiply-adds, M", [layer.multiply_adds / 1e6 for layer in summary.layers], OURS),
        ("parameters, k", [layer.parameters / 1e3 for layer in summary.layers], THEIRS),
        ("saved, kB", [layer.saved_bytes / 1e3 for layer in summary.layers], "#2b8a3e"),
    ]
    with style():
        figure, column = pyplot.subplots(3, 1, figsize=(11, 4.6), sharex=True)
        for axes, (label, values, color) in zip(column, series):
            axes.bar(range(len(values)), values, color=color, width=0.8)
            axes.set_ylabel(label)
        column[-1].set_xlabel("operator, in the order of computing")
        figure.align_ylabels()
        figure.tight_layout()
        return inline_svg(figure)


def pyramid(summary: Summary) -> str:
    """One bar for each size of map: its width, channels (the most at that size), receptive field and stride (L21)."""
    steps = [("input", summary.input_size[1], summary.input_size[2:], "1 pixel")]
    for layer in summary.layers:
        spatial = layer.output_size[2:]
        known = layer.receptive_field and None not in layer.receptive_field and None not in layer.stride
        if not spatial or not known:
            continue
        field = f"field {max(layer.receptive_field)}, stride {max(layer.stride):g}"
        if spatial != steps[-1][2]:
            steps.append((layer.name, layer.output_size[1], spatial, field))
        else:
            name, channels, _, _ = steps[-1]
            steps[-1] = (name, max(channels, layer.output_size[1]), spatial, field)
    with style():
        figure, axes = pyplot.subplots(figsize=(9, 0.4 + 0.75 * len(steps)))
        bottom, tallest, widest = 0.0, max(step[1] for step in steps), max(max(step[2]) for step in steps)
        for name, channels, spatial, field in steps:
            height = 0.25 + (channels / tallest) ** 0.5
            width = max(spatial)
            axes.barh(bottom - height / 2, width, height, left=-width / 2, color=THEIRS, alpha=0.5)
            text = f"{name}: {channels} x {' x '.join(map(str, spatial))}, {field}"
            axes.text(widest * 0.55, bottom - height / 2, text, va="center", fontsize=9)
            bottom -= height + 0.15
        axes.set(xlim=(-widest * 0.55, widest * 1.4), ylim=(bottom, 0.1))
        axes.axis("off")
        return inline_svg(figure)
