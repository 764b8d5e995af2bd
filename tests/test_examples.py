"""Every example runs, and prints what it is there to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS_LAB = {"lecture"}
SHOWN = {
    "add_your_own_algorithm": ["gradients: right", "fft cannot compute this convolution: the spectrum is"],
    "convert_a_model": ["are computed by torch_convlab", "the same parameter as before: True", "reverted: torch.nn"],
    "fold_batch_norm": ["20 batch norms", "bn1: folded into conv1", "left after folding: 0"],
    "gradients_by_hand": ["gradient of x: ", "gradient of w: ", "conv_transpose2d(g, w): (2, 3, 7, 7)"],
    "lecture": [
        "output (10, 32, 32), 760 parameters, 768,000 multiply-adds", "[3, 5, 7, 9, 11]",
        "weight (0, 1): 3*g00 + 2*g01 + 6*g10 + 6*g11", "max [6.0, 8.0, 3.0, 4.0] average [4.0, 5.0, 2.0, 2.0]",
        "conv2    (50, 14, 14)   (50, 20, 5, 5)", "flatten  (2450,)",
    ],
    "pick_an_algorithm": [
        "3x3: auto takes winograd", "depthwise: auto takes depthwise", "winograd needs stride 1, but stride is",
    ],
    "winograd_accuracy": ["channels  implicit_gemm  winograd", "     512  ", "{'naive': 9, 'winograd': "],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_example(name, capsys):
    if name in NEEDS_LAB:
        pytest.importorskip("rich")
        pytest.importorskip("matplotlib")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in SHOWN[name]:
        assert expected in printed


def test_the_list_of_examples_is_complete():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(SHOWN) == {path.stem for path in FOLDER.glob("*.py")}
    assert all(f"[{name}.py]({name}.py)" in listed for name in SHOWN)
