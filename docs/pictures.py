"""Makes the pictures of these pages: `python docs/pictures.py`. Those of the report need chromium on the PATH."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from torch_convlab import explain_convolution, lab, models
from torch_convlab import functional as F
from torch_convlab.lab.figure import INK, OURS, THEIRS, mark, number_grid, save, save_svg, style
from torch_convlab.lab.gradient_sums import LECTURE_INPUT, LECTURE_KERNELS

IMAGES = Path(__file__).parent / "images"


def naive():
    """A patch of the input times the filter is one output."""
    output = F.conv2d(torch.tensor([[LECTURE_INPUT]]).float(), torch.tensor([[LECTURE_KERNELS[0]]]).float())[0, 0]
    figure, axes = pyplot.subplots(1, 3, figsize=(7, 2.6))
    number_grid(axes[0], LECTURE_INPUT, "input")
    mark(axes[0], 0, 1, 3, 3)
    number_grid(axes[1], LECTURE_KERNELS[0], "filter")
    number_grid(axes[2], output.tolist(), "output = sum of patch x filter")
    mark(axes[2], 0, 1)
    return figure


def implicit_gemm():
    """The patch matrix of the lecture's example: each row is what one output reads."""
    patches = torch.nn.functional.unfold(torch.tensor([[LECTURE_INPUT]]).float(), 3)[0].T
    where = torch.nn.functional.unfold(torch.arange(16.0).view(1, 1, 4, 4), 3)[0].T
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3), width_ratios=(4, 9, 2.4))
    number_grid(axes[0], LECTURE_INPUT, "input")
    mark(axes[0], 1, 1)
    number_grid(axes[1], patches.tolist(), "patch matrix: a row per output, a column per tap")
    for row, column in (where == 5).nonzero().tolist():  # the marked input is in four rows
        mark(axes[1], row, column)
    filters = torch.tensor(LECTURE_KERNELS).view(2, 9).T
    number_grid(axes[2], filters.tolist(), "filters")
    return figure


def winograd():
    """Overlapping 6 x 6 tiles of the input make 4 x 4 tiles of the output; multiplications and error."""
    figure, (tiles, counts, errors) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for line in range(13):
        tiles.axhline(line, color=INK, linewidth=0.2), tiles.axvline(line, color=INK, linewidth=0.2)
    tiles.add_patch(Rectangle((1, 1), 4, 4, color=OURS, alpha=0.45))
    tiles.add_patch(Rectangle((5, 1), 4, 4, color=THEIRS, alpha=0.45))
    for left, color in ((0, OURS), (4, THEIRS)):
        tiles.add_patch(Rectangle((left, 0), 6, 6, fill=False, edgecolor=color, linewidth=2.5))
    tiles.set(xlim=(0, 12), ylim=(7, 0), aspect="equal", title="6x6 tiles read for 4x4 tiles written")
    tiles.axis("off")
    counts.bar(["patches", "F(4x4, 3x3)"], [144, 36], color=[THEIRS, OURS])
    counts.bar_label(counts.containers[0])
    counts.set_title("multiplications per tile and channel pair")
    torch.manual_seed(0)
    channels = [8, 32, 128, 512]
    measured = {"implicit_gemm": [], "winograd": [], "torch": []}
    for c in channels:
        x, w = torch.randn(1, c, 16, 16), torch.randn(16, c, 3, 3)
        exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
        for name, values in measured.items():
            if name == "torch":
                y = torch.nn.functional.conv2d(x, w, padding=1)
            else:
                y = F.conv2d(x, w, padding=1, algorithm=name)
            values.append(((y - exact).abs().max() / exact.abs().max()).item())
    for (name, values), color in zip(measured.items(), ("#2b8a3e", OURS, THEIRS)):
        errors.loglog(channels, values, "o-", color=color, label=name)
    errors.set(xlabel="channels", title="float32 error / max|reference|")
    errors.legend(fontsize=8)
    return figure


def direct():
    """Which channel each lane reads, step after step: 8 written channels in 4 groups of 2."""
    figure, axes = pyplot.subplots(3, 1, figsize=(5, 3.6))
    lanes = range(8)
    number_grid(axes[0], [[f"y{lane}" for lane in lanes]], "one vector: written channels of four groups")
    for step, one in enumerate(axes[1:]):
        number_grid(one, [[f"x{lane // 2 * 2 + step}" for lane in lanes]], f"a pixel over the lanes, step {step}")
        for group in range(4):
            mark(one, 0, 2 * group, 1, 2, color=OURS if group % 2 else THEIRS)
    return figure


def depthwise():
    """The weights as a matrix from input channels to output channels: dense, grouped, depthwise."""
    figure, axes = pyplot.subplots(1, 3, figsize=(8, 3))
    for one, groups in zip(axes, (1, 4, 8)):
        for k in range(8):
            for c in range(8):
                used = k * groups // 8 == c * groups // 8
                look = {"facecolor": OURS, "alpha": 0.6} if used else {"fill": False}
                one.add_patch(Rectangle((c, k), 0.9, 0.9, edgecolor=INK, linewidth=0.4, **look))
        kind = {1: "dense", 4: "4 groups", 8: "depthwise"}[groups]
        one.set(xlim=(-0.2, 8.1), ylim=(8.1, -0.2), aspect="equal")
        one.set_title(f"{kind}: {64 // groups} kernels of 3x3", fontsize=10)
        one.axis("off")
    return figure


def inner_product():
    """What a weight costs, by the number of pixels it meets, with and without being packed."""
    pixels, weight = [2**power for power in range(8)], (512, 512, 1, 1)
    figure, one = pyplot.subplots(figsize=(5, 3))
    for name, colour in (("inner_product", OURS), ("implicit_gemm", THEIRS)):
        verdicts = [explain_convolution((count, 512, 1, 1), weight).verdicts[name] for count in pixels]
        one.loglog(pixels, [verdict.cost / 512**2 for verdict in verdicts], marker="o", color=colour, label=name)
    one.set_xticks(pixels, pixels)
    one.minorticks_off()
    one.set(xlabel="pixels", ylabel="estimated multiply-adds per weight")
    one.legend(frameon=False)
    return figure


def strassen():
    """The eight products of halves as cells of a grid, and the seven sums that replace them."""
    figure, (eight, seven) = pyplot.subplots(1, 2, figsize=(8, 3), width_ratios=(1, 1.5))
    parts = [["A11 B11\n+ A12 B21", "A11 B12\n+ A12 B22"], ["A21 B11\n+ A22 B21", "A21 B12\n+ A22 B22"]]
    for one, cells, title in (
        (eight, parts, "eight products of halves"),
        (seven, [["P1 + P2", "U4 + S4 B22"], ["U3 - A22 T4", "U4 + S3 T3"]], "seven: P1 = A11 B11, P2 = A12 B21"),
    ):
        for row in range(2):
            for column in range(2):
                one.add_patch(Rectangle((column, row), 0.96, 0.96, edgecolor=INK, facecolor=OURS, alpha=0.25))
                one.text(column + 0.48, row + 0.48, cells[row][column], ha="center", va="center", fontsize=10)
        one.set(xlim=(-0.05, 2), ylim=(2, -0.05))
        one.set_title(title, fontsize=10)
        one.axis("off")
    seven.text(0, 2.15, "U2 = P1 + S2 T2,  U3 = U2 + S3 T3,  U4 = U2 + S1 T1", fontsize=9, va="top")
    return figure


def amx():
    """A number's digits in three parts, and which products of parts are kept."""
    figure, (digits, table) = pyplot.subplots(1, 2, figsize=(8, 2.6), width_ratios=(1.6, 1))
    for row, (name, parts) in enumerate((("float32", 3), ("float16", 2), ("bfloat16", 1))):
        digits.text(-0.3, row + 0.35, name, ha="right", va="center", fontsize=10)
        for part in range(parts):
            bits = min(8, {3: 24, 2: 11, 1: 8}[parts] - 8 * part)
            digits.add_patch(
                Rectangle((8 * part, row), bits - 0.2, 0.7, edgecolor=INK, facecolor=OURS, alpha=0.6 / 2**part)
            )
            digits.text(8 * part + bits / 2, row + 0.35, str(bits), ha="center", va="center", fontsize=9)
    digits.set(xlim=(-5, 24), ylim=(2.9, -0.2))
    digits.set_title("significant bits, as parts of bfloat16", fontsize=10)
    for row in range(3):
        for column in range(3):
            kept = row + column < 3
            table.add_patch(
                Rectangle((column, row), 0.94, 0.94, edgecolor=INK, facecolor=OURS if kept else "none", alpha=0.5)
            )
            table.text(column + 0.47, row + 0.47, f"x{row} y{column}", ha="center", va="center", fontsize=9)
    table.set(xlim=(-0.05, 3), ylim=(3, -0.05))
    table.set_title("float32: 6 products of 9", fontsize=10)
    for one in (digits, table):
        one.axis("off")
    return figure


def report(folder: Path):
    """The report's first screen, light and dark, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no chromium: the pictures of the report stay")
        return
    page = lab.report(models.resnet18(), (1, 3, 224, 224), "resnet18").html(folder / "report.html")
    for number, name in enumerate(("dark", "light")):
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1100,900",
        ]
        command += [f"--user-data-dir={folder / 'browser'}", f"--blink-settings=preferredColorScheme={number}"]
        command += [f"--screenshot={IMAGES / f'report-{name}.png'}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main():
    IMAGES.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for draw in (naive, implicit_gemm, winograd, direct, depthwise, inner_product, strassen, amx):
        with style():
            save(draw(), IMAGES / f"{draw.__name__}.png", dpi=90)
    save(lab.gradients().draw(), IMAGES / "gradients.png", dpi=80)
    save(lab.normalize().draw(), IMAGES / "normalize.png", dpi=80)
    field = lab.receptive_field(models.resnet18(), (1, 3, 224, 224), "resnet18")
    save(field.draw(), IMAGES / "receptive-field.png", dpi=80)
    save_svg(lab.graph(models.LeNet5(), (1, 1, 28, 28)).svg(), IMAGES / "graph.svg")
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder))


if __name__ == "__main__":
    main()
