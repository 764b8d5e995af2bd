"""The table of a model's layers: the lecture's own, FLOPs against torch's counter, fields against gradients."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("rich")

import torch_convlab
from torch_convlab import __main__ as command_line
from torch_convlab import lab, models
from torch_convlab.lab import exported
from torch_convlab.lab.layers import Summary

LENET5 = """\
  layer     operation          output           weights   parameters   multiply-adds       bytes    saved   by torch   field   stride   centre
 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
  conv1     conv2d       20 x 28 x 28    20 x 1 x 5 x 5          520         392,000      67,936                           5        1        0
  relu1     relu         20 x 28 x 28                                                    125,440   62,720     62,720       5        1        0
  pool1     max_pool2d   20 x 14 x 14                                                     78,400    3,920     31,360       6        2      0.5
  conv2     conv2d       50 x 14 x 14   50 x 20 x 5 x 5       25,050       4,900,000     155,080   15,680     15,680      14        2      0.5
  relu2     relu         50 x 14 x 14                                                     78,400   39,200     39,200      14        2      0.5
  pool2     max_pool2d     50 x 7 x 7                                                     49,000    2,450     19,600      16        4      1.5
  flatten   flatten              2450                                                                                     16        –        –
  fc1       linear                500        2450 x 500    1,225,500       1,225,000   4,913,800    9,800      9,800      28        –        –
  relu3     relu                  500                                                      4,000    2,000      2,000      28        –        –
  fc2       linear                 10          500 x 10        5,010           5,000      22,080                          28        –        –
"""  # noqa: E501


def test_lenet5_is_the_lectures_table(capsys):
    assert command_line.main(["summary", "lenet5", "1,1,28,28"]) == 0
    printed = capsys.readouterr().out
    assert LENET5 in printed
    assert "1,256,080 parameters, 6,522,000 multiply-adds" in printed


def test_json_holds_the_same(capsys):
    assert command_line.main(["summary", "lenet5", "2,1,28,28", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == Summary.__dataclass_fields__.keys()
    assert result["parameters"] == 1_256_080 and result["multiply_adds"] == 2 * 6_522_000
    conv2 = result["layers"][3]
    assert (conv2["name"], conv2["output_size"], conv2["weight_size"]) == ("conv2", [2, 50, 14, 14], [50, 20, 5, 5])
    assert conv2["receptive_field"] == [14, 14] and conv2["center"] == [0.5, 0.5]


@pytest.mark.parametrize("arguments, message", [
    (["lenet6", "1,1,28,28"], "unknown model 'lenet6'"),
    (["lenet5", "1,3,28,28"], "lenet5 does not accept an input of 1 x 3 x 28 x 28"),
    (["nothing.here:model", "1,3,28,28"], "cannot load model"),
])  # fmt: skip
def test_bad_input(arguments, message, capsys):
    assert command_line.main(["summary", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Unusual(nn.Module):
    """Transposed, grouped, dilated and "same"-padded convolutions, branches, functional calls, a shared layer."""

    def __init__(self, dimensions: int):
        super().__init__()
        convolution = getattr(nn, f"Conv{dimensions}d")
        self.down = convolution(4, 8, 3, stride=2, padding=1, groups=2)
        self.dilated = convolution(8, 8, 3, padding="same", dilation=2)
        self.even = convolution(8, 8, 2, padding="same", bias=False)
        self.depthwise = convolution(8, 8, 3, padding=1, groups=8)
        self.up = getattr(nn, f"ConvTranspose{dimensions}d")(8, 6, 4, stride=2, padding=1, groups=2)
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, input):
        output = self.down(input)
        output = torch.relu(self.dilated(output)) + self.even(output)
        output = self.depthwise(self.depthwise(output))
        output = self.up(output).flatten(2).mean(-1)
        weight = self.head.weight * 2
        return functional.linear(output, weight, self.head.bias) @ weight


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_multiply_adds_are_those_of_torchs_counter(dimensions):
    torch.manual_seed(0)
    model = Unusual(dimensions).eval()
    inputs = torch.randn(2, 4, *(9, 8, 7)[:dimensions])
    result = lab.summary(model, tuple(inputs.shape))
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    assert 2 * result.multiply_adds == counter.get_total_flops() > 0
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.unused_parameters == 2 * 2 + 2
    names = [layer.name for layer in result.layers]
    assert names[:7] == ["down", "dilated", "relu", "even", "add", "depthwise", "depthwise (call 2)"]
    assert result.layers[5].parameters == 8 * 3**dimensions + 8 and result.layers[6].parameters == 0
    converted = lab.summary(torch_convlab.convert(Unusual(dimensions)), tuple(inputs.shape))
    assert converted.multiply_adds == result.multiply_adds


@pytest.mark.parametrize("build, shape, multiply_adds, field", [
    (models.alexnet, (1, 3, 224, 224), 714_188_480, 195),
    (models.resnet18, (1, 3, 224, 224), 1_814_073_344, 435),
    (models.resnet50, (1, 3, 224, 224), 4_089_184_256, 427),
])  # fmt: skip
def test_known_networks(build, shape, multiply_adds, field):
    """Multiply-adds as torch counts them; the receptive fields are the published ones of these networks."""
    model = build()
    result = lab.summary(model, shape)
    assert result.multiply_adds == multiply_adds
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert max(layer.receptive_field[0] for layer in result.layers if layer.stride[0]) == field
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(shape, device="meta"))
    assert counter.get_total_flops() == 2 * multiply_adds


def seen(model: nn.Module, length: int, position: int) -> tuple[int, int]:
    """First and last of the inputs that reach one output of a network along one axis, by its gradient."""
    input = torch.zeros(1, 1, length, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(input)[0, 0, position], input)
    where = gradient[0, 0].nonzero().flatten()
    return int(where[0]), int(where[-1])


class Branches(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, input):
        return torch.cat([branch(input) for branch in self.branches], 1).sum(1, keepdim=True)


def layer(kind, *arguments, **keywords):
    built = kind(1, 1, *arguments, **keywords)
    nn.init.ones_(built.weight)
    return built


NETWORKS = {
    "plain": lambda: nn.Sequential(layer(nn.Conv1d, 3), layer(nn.Conv1d, 5, stride=2, padding=1), nn.AvgPool1d(2)),
    "dilated": lambda: nn.Sequential(layer(nn.Conv1d, 3, dilation=3, padding=3), layer(nn.Conv1d, 2, stride=3)),
    "branches": lambda: Branches(layer(nn.Conv1d, 3, padding=1), layer(nn.Conv1d, 4, padding="same"), nn.Identity()),
    "shifted branches": lambda: Branches(nn.ConstantPad1d((2, 0), 0.0), layer(nn.Conv1d, 1, padding=1)),
    "transposed": lambda: nn.Sequential(layer(nn.Conv1d, 3, stride=2), layer(nn.ConvTranspose1d, 4, stride=2)),
    "upsampled": lambda: nn.Sequential(layer(nn.Conv1d, 3, stride=2), nn.Upsample(scale_factor=3)),
    "adaptive": lambda: nn.Sequential(layer(nn.Conv1d, 2), nn.AdaptiveAvgPool1d(6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_fields_are_where_gradients_arrive(name):
    """Size, stride and centre of every network predict the inputs that one output of it sees."""
    model, length = NETWORKS[name](), 49
    row = lab.summary(model, (1, 1, length)).layers[-1]
    (size,), (stride,), (center,) = row.receptive_field, row.stride, row.center
    position = row.output_size[-1] // 2
    first, last = seen(model, length, position)
    exact = name not in ("transposed", "upsampled")
    middle = center + position * stride
    if exact:
        assert (last - first + 1, (first + last) / 2) == (size, middle)
    else:  # outputs between two inputs: the field is the most that one sees, the centre the mean of all phases
        phases = [seen(model, length, position + phase) for phase in range(round(1 / (stride / 2)) or 1)]
        assert max(last - first + 1 for first, last in phases) == size
        assert abs((first + last) / 2 - middle) <= 2


def test_fields_that_are_the_whole_input_or_not_known():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, input):
            tokens = self.patches(input).flatten(2).transpose(1, 2)
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    rows = {row.name: row for row in lab.summary(Attention(), (1, 3, 16, 16)).layers}
    assert rows["patches"].receptive_field == (4, 4) and rows["patches"].stride == (4, 4)
    assert rows["transpose"].receptive_field == (4, 4) and rows["transpose"].stride == (None, None)
    assert list(rows.values())[-1].receptive_field == (16, 16)
    strange = nn.Sequential(nn.Conv1d(1, 1, 3), nn.AdaptiveAvgPool1d(5))
    assert lab.summary(strange, (1, 1, 11)).layers[-1].receptive_field == (None,)


def kept_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """What autograd keeps of a call, without the inputs, parameters and buffers."""
    own = {tensor.untyped_storage()._cdata for tensor in (inputs, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("build, shape", [(models.LeNet5, (2, 1, 28, 28)), (models.resnet18, (2, 3, 32, 32))])
def test_saved_bytes_are_those_that_autograd_keeps(build, shape):
    """Summed over the layers, as `saved_tensors_hooks` sees them in a training step of the real model."""
    torch.manual_seed(0)
    result = lab.summary(build(), shape)
    assert result.saved_bytes == kept_bytes(build().train(), torch.randn(shape))
    assert result.saved_bytes_torch == kept_bytes(build(layers=nn).train(), torch.randn(shape))
    assert result.saved_bytes < result.saved_bytes_torch


def test_every_operator_of_ours_is_called_like_torchs():
    """The table by which exported graphs run on this library's functions: same arguments, same results."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.AvgPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, 2), nn.InstanceNorm2d(4, affine=True), nn.AdaptiveMaxPool2d(3),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    inputs, table, used = torch.randn(2, 3, 12, 12), exported.ours(), set()

    def call(step, function, arguments, keywords):
        used.add(function) if function in table else None
        return table.get(function, function)(*arguments, **keywords)

    (output,) = exported.run(exported.export(model, inputs), inputs, call)
    torch.testing.assert_close(output, model(inputs), rtol=1e-5, atol=1e-5)
    assert len(used) == 11


def test_fused_layers_appear_as_their_operators():
    """Layers without a twin in torch.nn: the same work as the layers they stand for."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            ours = torch_convlab.nn
            self.first, self.second, self.last = (
                ours.ConvBNReLU2d(3, 8, 3),
                ours.BatchNormReLU2d(8),
                ours.BatchNormAddReLU2d(8),
            )

        def forward(self, input):
            output = self.first(input)
            return self.last(self.second(output), output)

    result = lab.summary(Fused(), (2, 3, 8, 8))
    assert result.multiply_adds == 2 * 8 * 8 * 8 * 27 and result.parameters == 8 * 27 + 3 * 16
    assert [layer.operation for layer in result.layers if "norm" in layer.operation] == ["batch_norm"] * 3
    assert result.layers[-1].receptive_field == (3, 3) and result.layers[-1].parameters == 16
    fused = torch_convlab.fuse(models.resnet18().eval())
    whole = lab.summary(fused, (1, 3, 64, 64))
    assert whole.multiply_adds == lab.summary(models.resnet18(), (1, 3, 64, 64)).multiply_adds
    assert max(layer.receptive_field[0] for layer in whole.layers if layer.stride[0]) == 435
    assert len({layer.name for layer in whole.layers}) == len(whole.layers)


def test_models_that_cannot_be_exported_are_refused_in_one_line():
    class Branching(nn.Module):
        def forward(self, input):
            return input if input.sum() > 0 else -input

    with pytest.raises(lab.LabError, match=r"torch\.export cannot follow it: "):
        lab.summary(Branching(), (2, 2), "it")
