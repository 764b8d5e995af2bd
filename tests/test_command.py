"""What all verbs of the command line share: models and shapes as arguments, errors, tables, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from torch_convlab import __main__ as command_line
from torch_convlab import lab, models
from torch_convlab.lab import command


def test_shapes():
    assert command.parse_shape("1,3,224,224") == command.parse_shape("1x3x224x224") == (1, 3, 224, 224)
    for text in ("", "1,,3", "1,0,5", "1,-2", "a,b", "7"):
        with pytest.raises(argparse.ArgumentTypeError, match="sizes such as 1,3,224,224, but got"):
            command.parse_shape(text)


def test_models(tmp_path, monkeypatch):
    assert isinstance(command.load_model("lenet5"), models.LeNet5)
    assert isinstance(command.load_model("torch.nn:Identity"), nn.Identity)
    assert not command.load_model("torch_convlab.models:resnet18").training
    (tmp_path / "someones_models.py").write_text(
        "import torch\nlayer = torch.nn.Linear(3, 2)\nnumber = lambda: 5\n"
        "def broken():\n    raise RuntimeError('first line\\nsecond line')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert command.load_model("someones_models:layer").out_features == 2
    for name, message in {
        "resnet51": "unknown model 'resnet51': expected one of lenet5, alexnet, ",
        "nowhere:model": "cannot load model 'nowhere:model': ModuleNotFoundError",
        "someones_models:missing": "no attribute 'missing'",
        "someones_models:number": "gave a int, expected a torch.nn.Module",
        "someones_models:broken": "RuntimeError: first line$",
        "someones_models:": "unknown model",
    }.items():
        with pytest.raises(lab.LabError, match=message):
            command.load_model(name)


def test_inputs_that_a_model_refuses():
    model = models.LeNet5()
    command.check_accepts(model, torch.zeros(2, 1, 28, 28), "lenet5")
    with pytest.raises(lab.LabError, match="lenet5 does not accept an input of 1 x 3 x 28 x 28: RuntimeError: Giv"):
        command.check_accepts(model, torch.zeros(1, 3, 28, 28), "lenet5")

    class ReadsValues(nn.Module):  # cannot be tried on the meta device
        def forward(self, input):
            return input if input.sum().item() > 0 else -input

    command.check_accepts(ReadsValues(), torch.zeros(2, 2), "it")


def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch):
    def fail(arguments):
        raise error

    demo = command_line.importlib.import_module("torch_convlab.lab.commands.demo")
    monkeypatch.setattr(demo, "run", fail)
    bad = {
        lab.LabError("what is wrong"): "what is wrong",
        PermissionError(13, "Permission denied", "/x/y"): "/x/y: Permission denied",
    }
    for error, message in bad.items():  # noqa: B007
        assert command_line.main(["demo"]) == 2
        assert capsys.readouterr().err == f"python -m torch_convlab demo: {message}\n"
    error = KeyboardInterrupt()
    assert command_line.main(["demo"]) == 130
    error = ZeroDivisionError("a defect of ours keeps its traceback")
    with pytest.raises(ZeroDivisionError):
        command_line.main(["demo"])


def test_every_verb_helps_with_an_example(capsys):
    for verb in command_line.VERBS:
        with pytest.raises(SystemExit) as stop:
            command_line.main([verb, "--help"])
        assert stop.value.code == 0
        assert f"python -m torch_convlab {verb}" in capsys.readouterr().out.split("example", 1)[1]


def test_functions_of_the_lab_exist_and_are_documented():
    for name, module in lab._FUNCTIONS.items():
        assert name != module, "the module would hide the function"
        assert getattr(lab, name).__doc__
        assert name in dir(lab)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lab.nothing


def test_tables_in_a_pipe_are_whole_and_plain(capsys):
    table = command.table("layer", "size", title="A title")
    table.add_row("a name [with brackets] " + "that goes on" * 20, "1 x 2")
    command.show(table, "a line " * 40)
    printed = capsys.readouterr().out
    assert "a name [with brackets] " + "that goes on" * 20 in printed and "a line " * 40 in printed
    assert "\x1b" not in printed and all(line == line.rstrip() for line in printed.splitlines()[:-1])


def test_json(capsys):
    @dataclasses.dataclass
    class Row:
        name: str
        size: tuple[int, ...]
        ratio: float
        dtype: torch.dtype

    command.show_json({"rows": [Row("a", (1, 2), math.inf, torch.float32)], "good": True})
    expected = {"rows": [{"name": "a", "size": [1, 2], "ratio": None, "dtype": "torch.float32"}], "good": True}
    assert json.loads(capsys.readouterr().out) == expected


def test_progress_goes_to_stderr_and_not_into_pipes(capsys):
    assert list(command.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    assert not sys.stderr.isatty()


def test_numbers():
    assert [command.engineering(value, "FLOP") for value in (0, 12, 999.7, 4.0891e9)] == [
        "0 FLOP", "12 FLOP", "1 kFLOP", "4.09 GFLOP",
    ]  # fmt: skip
    assert [command.seconds(value) for value in (2, 0.00231, 0.9999e-3, 4e-6)] == ["2 s", "2.31 ms", "1 ms", "4 us"]


def test_writable(tmp_path):
    path = command.check_writable(tmp_path / "new" / "file.html")
    assert path.parent.is_dir() and not path.exists()
    (tmp_path / "file").write_text("kept")
    command.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    for bad in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(lab.LabError, match="cannot write"):
            command.check_writable(bad)
