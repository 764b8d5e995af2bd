"""The verb `train`: checkpoints, resuming bit for bit, the same run by torch.nn, bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from verbs import assert_refused, run

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from torch_convlab import lab
from torch_convlab.lab import data, train
from torch_convlab.lab.commands import train as command

RECIPE = train.Recipe(epochs=3)


@pytest.fixture(scope="module")
def digits():
    return data.bundled_digits().first(96)


class Interrupted(Exception):
    pass


def test_resumed_training_is_the_same_bit_for_bit(digits, tmp_path):
    straight = train.train_lenet(digits, RECIPE)
    path = tmp_path / "new" / "lenet5.pt"

    def interrupt(run):
        if len(run.losses) == 5:  # in the middle of the second epoch
            raise Interrupted

    with pytest.raises(Interrupted):
        train.train_lenet(digits, RECIPE, on_step=interrupt, checkpoint=path)
    torch.randn(100)  # the global generator's state does not matter
    resumed = train.train_lenet(digits, RECIPE, checkpoint=path, resume=True)
    assert resumed.losses == straight.losses and len(straight.losses) == 9
    assert resumed.accuracies == straight.accuracies
    for one, other in zip(resumed.model.parameters(), straight.model.parameters()):
        assert torch.equal(one, other)
    again = train.train_lenet(digits, RECIPE, checkpoint=path, resume=True)  # nothing left to do
    assert again.losses == straight.losses and torch.equal(again.predictions, straight.predictions)
    assert [file.name for file in path.parent.iterdir()] == ["lenet5.pt"]


def test_a_checkpoint_of_another_training_is_refused(digits, tmp_path):
    path = tmp_path / "lenet5.pt"
    train.train_lenet(digits, replace(RECIPE, epochs=1), checkpoint=path)
    with pytest.raises(lab.LabError, match="is of epochs 1, not 3"):
        train.train_lenet(digits, RECIPE, checkpoint=path, resume=True)
    with pytest.raises(lab.LabError, match=r"is of images .*96 training images.*, not .*64 training images"):
        train.train_lenet(digits.first(64), replace(RECIPE, epochs=1), checkpoint=path, resume=True)
    with pytest.raises(lab.LabError, match=r"no file .*nowhere\.pt"):
        train.train_lenet(digits, RECIPE, checkpoint=tmp_path / "nowhere.pt", resume=True)
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(lab.LabError, match=r"lenet5.pt is no checkpoint of a training, or is damaged"):
            train.train_lenet(digits, RECIPE, checkpoint=path, resume=True)


def test_train_command(capsys, monkeypatch, digits, tmp_path):
    monkeypatch.setattr(command, "bundled_digits", lambda: digits)
    path = tmp_path / "lenet5.pt"
    status, printed, _ = run(capsys, "train", "lenet5", "--epochs", 1, "--checkpoint", path)
    assert status == 0 and "LeNet-5 of torch_convlab" in printed and "epoch   1  loss 2." in printed
    status, printed, _ = run(capsys, "train", "lenet5", "--epochs", 1, "--checkpoint", path, "--resume")
    assert status == 0 and "nothing left to do" in printed
    assert_refused(capsys, ["train", "lenet5", "--checkpoint", path], "is there already; --resume goes on from it")
    runs = [json.loads(run(capsys, "train", "lenet5", "--epochs", 1, "--json", *more)[1]) for more in ([], ["--torch"])]
    assert [one["library"] for one in runs] == ["torch_convlab", "torch.nn"]
    assert len(runs[0]["losses"]) == 3
    assert all(abs(one - other) < 1e-4 for one, other in zip(*(one["losses"] for one in runs)))
    status, printed, _ = run(capsys, "train", "lenet5", "--epochs", 1, "--learning-rate", "1e30")
    assert status == 1 and "loss nan" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resnet50"], "invalid choice: 'resnet50'"),
        (["lenet5", "--resume"], "--resume needs --checkpoint FILE"),
        (["lenet5", "--learning-rate", "-1"], "expected a learning rate above 0, but got -1.0"),
        (["lenet5", "--data", "/nowhere"], "/nowhere is not a folder"),
        (["lenet5", "--checkpoint", "/proc/x.pt"], "cannot write /proc/x.pt"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert_refused(capsys, ["train", *arguments], message)
