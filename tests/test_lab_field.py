"""The lab's receptive fields: theory against what gradients reach, the effective size, the picture, the verb."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from verbs import assert_refused, run

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from torch_convlab import lab, models
from torch_convlab.lab import field_growth


def chain(count):
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(count)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def test_l3_theory_and_binomial_effect():
    """L layers of 3x3: 1 + 2L in theory; with all weights 1, the gradient is the L-fold sum of three ones."""
    found = lab.receptive_field(chain(6), (1, 1, 41, 41), examples=1)
    assert [layer.size for layer in found.layers] == [(1 + 2 * depth,) * 2 for depth in range(1, 7)]
    profile = torch.ones(1, dtype=torch.float64)
    for layer in found.layers:
        profile = torch.nn.functional.conv1d(profile[None, None], torch.ones(1, 1, 3).double(), padding=2)[0, 0]
        measured = layer.magnitude.sum(0)
        reach = len(profile) // 2
        torch.testing.assert_close(
            (measured / measured.sum())[20 - reach : 21 + reach].double(), profile / profile.sum(), rtol=1e-5, atol=0
        )
        held = [profile[reach - half : reach + half + 1].sum() / profile.sum() for half in range(reach + 1)]
        half = next(half for half, share in enumerate(held) if share >= 0.95)
        assert layer.effective_size == (2 * half + 1,) * 2
    assert found.layers[-1].effective_size == (9, 9)  # of 13


class Branches(nn.Module):
    """Branches, a dilated and a strided convolution, a functional call."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(4, 4, (3, 5), padding=(2, 4), dilation=2)
        self.narrow = nn.Conv2d(4, 4, 1)

    def forward(self, input):
        features = self.stem(input)
        return nn.functional.avg_pool2d(torch.relu(self.wide(features)) + self.narrow(features), 2)


@pytest.mark.parametrize(
    "model, shape", [(Branches(), (1, 2, 40, 44)), (models.LeNet5(), (1, 1, 28, 28))], ids=["branches", "lenet5"]
)
def test_gradients_stay_inside_the_theoretical_field_and_reach_its_border(model, shape):
    for layer in lab.receptive_field(model, shape).layers:
        reached = layer.magnitude.nonzero()
        for axis, (first, last) in enumerate(layer.theoretical):
            low, high = max(first, 0), min(last, shape[2 + axis] - 1)
            assert (reached[:, axis].min(), reached[:, axis].max()) == (low, high), layer.name
            assert low <= layer.effective[axis][0] <= layer.effective[axis][1] <= high


def test_lenet_by_hand():
    found = lab.receptive_field(models.LeNet5(), (1, 1, 28, 28))
    assert [(layer.name, layer.size[0], layer.stride[0], layer.output_size[0]) for layer in found.layers] == [
        ("conv1", 5, 1, 28), ("pool1", 6, 2, 14), ("conv2", 14, 2, 14), ("pool2", 16, 4, 7),
    ]  # fmt: skip


def test_one_dimension_and_few_layers():
    model = nn.Sequential(*(nn.Conv1d(1, 1, 3, dilation=2**depth) for depth in range(4)))
    found = lab.receptive_field(model, (1, 1, 64))
    assert [layer.size for layer in found.layers] == [(3,), (7,), (15,), (31,)]
    assert [layer.size for layer in lab.receptive_field(model, (1, 1, 64), most=2).layers] == [(3,), (31,)]
    with pytest.raises(lab.LabError, match="expected an input N x C x H x W to draw"):
        found.draw()


def test_central_interval():
    for center, share in itertools.product((0, 3, 4.5, 9), (0.5, 0.95, 1.0)):
        first, last = field_growth.central_interval(torch.ones(10), center, share)
        assert last - first + 1 >= 10 * share
    assert field_growth.central_interval(torch.tensor([0, 1, 8, 1, 0.0]), 2, 0.8) == (2, 2)
    assert field_growth.central_interval(torch.tensor([0, 1, 8, 1, 0.0]), 2, 0.81) == (1, 3)


def test_picture_shows_every_field_in_its_place():
    found = lab.receptive_field(models.LeNet5(), (1, 1, 28, 28))
    drawn = found.draw()
    fields, sizes, *maps = drawn.axes
    boxes = {patch.get_gid(): patch for patch in fields.patches}
    assert boxes["input"].get_width() == boxes["input"].get_height() == 28
    for place, layer in enumerate(found.layers):
        box = boxes[f"field-{place}"]
        assert box.get_width() == layer.size[1] and box.get_x() + 0.5 == layer.theoretical[1][0]
    lines = {line.get_label(): list(line.get_ydata()) for line in sizes.lines}
    assert lines["theoretical"] == [5, 6, 14, 16]
    assert lines["effective (95 % of the gradient)"] == [layer.effective_size[0] for layer in found.layers]
    assert [axes.get_title().partition("\n")[0] for axes in maps] == ["conv1", "pool1", "conv2", "pool2"]
    assert all(axes.images[0].get_array().shape == (28, 28) for axes in maps)


def test_receptive_field_command(capsys, tmp_path):
    path = tmp_path / "field.png"
    status, printed, _ = run(capsys, "receptive-field", "lenet5", "1,1,28,28", "--output", path)
    assert status == 0 and "16 x 16" in printed and path.stat().st_size > 10_000
    status, printed, _ = run(capsys, "receptive-field", "lenet5", "1,1,28,28", "--json")
    layers = json.loads(printed)["layers"]
    assert status == 0 and [layer["size"][0] for layer in layers] == [5, 6, 14, 16]
    assert len(layers[0]["magnitude"]) == 28


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["lenet6", "1,1,28,28"], "unknown model 'lenet6'"),
        (["lenet5", "1,3,28,28"], "lenet5 does not accept an input of 1 x 3 x 28 x 28"),
        (["torch.nn:Identity", "1,3"], "expected an input with spatial axes such as 1,3,224,224"),
        (["torch.nn:Identity", "1,3,8,8"], "has no layer whose receptive field grows"),
        (["lenet5", "1,1,28,28", "--examples", "0"], "expected at least 1, but got 0"),
        (["lenet5", "1,1,28,28", "--output", "field.pdf"], "ends in .svg or .png, but got 'field.pdf'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert_refused(capsys, ["receptive-field", *arguments], message)
