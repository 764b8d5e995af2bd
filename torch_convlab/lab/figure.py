"""The look of every matplotlib figure, and how one becomes a file or part of a page.

Text and axes are drawn in one ink, which SVG output replaces by ``currentColor``: a figure inside a page follows its
dark or light colours. Fills are translucent, so that they read on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .errors import LabError

matplotlib.use("Agg")  # draws without a display

OURS, THEIRS = "#d9480f", "#4c7fd0"  # readable on white and on black
INK = "#010203"  # stands for the colour of the page's text
PAGE_COLORS = (
    "svg{color:#1c1e21;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6e8eb;background:#15171a}}"
)
SUFFIXES = (".svg", ".png")

STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "torch_convlab",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def style():
    """A context in which figures are to be made and drawn."""
    return pyplot.rc_context(STYLE)


def inline_svg(figure: Figure) -> str:
    """`figure` as an ``<svg>`` element in the colours of the page around it; closes it."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def save(figure: Figure, path: str | Path, dpi: int = 100) -> Path:
    """Write `figure` as PNG (on white) or SVG (dark or light as the viewer's), and close it.

    Raises:
        LabError: another suffix than ``.png`` or ``.svg``.
        OSError: `path` cannot be written.
    """
    path = output_path(path)
    if path.suffix == ".svg":
        return save_svg(inline_svg(figure), path)
    with style():
        figure.savefig(path, dpi=dpi, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return path


def save_svg(svg: str, path: str | Path) -> Path:
    """Write an ``<svg>`` element as a file of its own."""
    path = output_path(path)
    head, _, body = svg.partition(">")
    path.write_text(f"{head}><style>{PAGE_COLORS}</style>{body}", encoding="utf-8")
    return path


def output_path(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """`path`, with the folders above it made."""
    path = Path(path)
    if path.suffix not in suffixes:
        raise LabError(f"expected a file name that ends in {' or '.join(suffixes)}, but got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def number_grid(axes: Axes, values: Sequence[Sequence[object]], title: str = "") -> Axes:
    """A matrix of numbers in squares of side 1; the square of row r and column c has its centre at (c, r)."""
    rows, columns = len(values), len(values[0])
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=0.6))
            text = value if isinstance(value, str) else f"{value:g}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9 if len(text) < 4 else 7)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    return axes


def mark(axes: Axes, row: float, column: float, height: float = 1, width: float = 1, color: str = OURS, fill=True):
    """Mark the squares of a `number_grid` from (row, column): filled, or by an outline."""
    look = {"facecolor": color, "alpha": 0.35} if fill else {"fill": False, "edgecolor": color, "linewidth": 2.2}
    patch = Rectangle((column - 0.5, row - 0.5), width, height, **look)
    patch.set_gid(f"mark-{'fill' if fill else 'outline'}-{row}-{column}")
    axes.add_patch(patch)
