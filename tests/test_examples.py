"""Every example runs, and prints what it is there to show."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS_LAB, STARTS_PROCESSES = {"lecture"}, {"sync_batch_norm"}
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
        "3x3: auto takes winograd", "depthwise: auto takes depthwise",
        "winograd needs windows that overlap",
    ],
    "sync_batch_norm": ["alone         processes differ by ", "synchronized  processes differ by "],
    "winograd_accuracy": ["channels  implicit_gemm  winograd", "     512  ", "{'naive': 9, 'winograd': "],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_example(name, capsys):
    if name in NEEDS_LAB:
        pytest.importorskip("rich")
        pytest.importorskip("matplotlib")
    if name in STARTS_PROCESSES:
        command = [sys.executable, str(FOLDER / f"{name}.py")]
        environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
    for expected in SHOWN[name]:
        assert expected in printed


def test_the_list_of_examples_is_complete():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(SHOWN) == {path.stem for path in FOLDER.glob("*.py")}
    assert all(f"[{name}.py]({name}.py)" in listed for name in SHOWN)
