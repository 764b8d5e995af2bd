"""Pointwise and depthwise convolutions that a run computes a strip of lines at a time: the bits of single layers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import torch_convlab.nn as layers
from torch_convlab import _C, backends, fuse
from torch_convlab._runs import Run


class Block(nn.Module):
    """Expands, convolves each channel by itself, projects; with an addition where it can be one."""

    def __init__(self, channels, inner, outputs, kernel=3, stride=1, padding=1, bias=True, between=nn.ReLU6):
        super().__init__()
        torch.manual_seed(0)
        self.expand = layers.Conv2d(channels, inner, 1, bias=bias)
        self.depthwise = layers.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=bias)
        self.project = layers.Conv2d(inner, outputs, 1, bias=bias)
        self.between = between()
        self.adds = channels == outputs and stride == 1 and padding != 0 and padding != 2

    def forward(self, input):
        output = self.project(self.between(self.depthwise(self.between(self.expand(input)))))
        return input + output if self.adds else output


class Pair(Block):
    """The first two of the layers."""

    def forward(self, input):
        return torch.sin(self.between(self.depthwise(self.between(self.expand(input)))))


CASES = {  # the block, and the input's batch, height and width
    "stride 1": (lambda: Block(24, 144, 24), 1, 28, 29),
    "stride 2": (lambda: Block(16, 96, 24, stride=2), 1, 57, 40),
    "5x5": (lambda: Block(24, 144, 40, kernel=5, padding=2), 1, 41, 31),
    "5x5, stride 2": (lambda: Block(40, 240, 40, kernel=5, stride=2, padding=2), 2, 45, 28),
    "no padding": (lambda: Block(24, 120, 30, padding=0), 1, 40, 27),
    "much padding": (lambda: Block(24, 120, 30, padding=2), 1, 40, 27),
    "stride 3, lines that nobody reads": (lambda: Block(16, 96, 24, stride=3, kernel=2, padding=0), 1, 47, 46),
    "more padding than kernel": (lambda: Block(24, 120, 30, padding=5), 1, 40, 27),
    "more padding than image": (lambda: Block(24, 240, 30, kernel=2, padding=40), 1, 33, 12),
    "7x3": (lambda: Block(24, 120, 24, kernel=(7, 3), padding=(3, 1)), 3, 40, 20),
    "odd channels, no bias": (lambda: Block(7, 99, 13, bias=False), 1, 33, 35),
    "batch": (lambda: Block(32, 192, 32), 5, 14, 14),
    "no clamp": (lambda: Block(24, 144, 24, between=nn.Identity), 1, 28, 28),
    "silu": (lambda: Block(24, 144, 24, between=nn.SiLU), 1, 28, 28),
    "hardswish, pair": (lambda: Pair(24, 144, 24, between=nn.Hardswish), 1, 28, 28),
    "pair": (lambda: Pair(24, 144, 24), 1, 28, 28),
    "pair, stride 2": (lambda: Pair(16, 96, 16, stride=2), 2, 51, 40),
}


def images(batch, channels, height, width, dtype=torch.float32):
    drawn = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype, memory_format=torch.channels_last)


def fused(block: nn.Module) -> fx.GraphModule:
    return fuse(block.eval())


def unseen(run: Run, input: torch.Tensor) -> int:
    """How many of the layers return what nobody gets to see."""
    places, code, hooks, steps = run._program
    values, count = [input], len(steps)
    with torch.no_grad():
        assert _C.run((places, code, hooks, tuple((*step[:5], (), step[6]) for step in steps)), values) == count
    assert values[-1] is not None
    return sum(value is None for value in values[1:])


def check(model, input, together=True):
    with torch.no_grad():
        expected = fx.Interpreter(model).run(input)
        for _ in range(2):  # the first call packs the weights
            assert torch.equal(model(input), expected)
        assert unseen(model._runs[0], input) == (len(model._runs[0]._paths) - 1 if together else 0)
    return expected


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_layers(name, threads):
    make, batch, height, width = CASES[name]
    block, before = make(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(fused(block), images(batch, block.expand.in_channels, height, width))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(fused(Block(24, 144, 24).to(dtype)), images(1, 24, 40, 24, dtype))


def test_against_torch():
    block, input = Block(24, 144, 24), images(2, 24, 30, 30)
    with torch.no_grad():
        convolutions = (block.expand, block.depthwise, block.project)
        twin = Block(24, 144, 24).double()
        for own, other in zip(convolutions, (twin.expand, twin.depthwise, twin.project)):
            assert torch.equal(own.weight.double(), other.weight)
            other.__class__ = nn.Conv2d
        expected = twin.eval()(input.double())
    actual = check(fused(block), input)
    assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


REFUSED = {
    "what lies between is small": (lambda: Block(8, 48, 8), (1, 8, 20, 20), torch.channels_last),
    "strips would share most of their lines": (
        lambda: Block(8, 96, 8, kernel=15, padding=7),
        (1, 8, 20, 40),
        torch.channels_last,
    ),
    "a strip of one line reads three": (lambda: Block(16, 64, 16), (7, 16, 3, 700), torch.channels_last),
    "channels first": (lambda: Block(24, 144, 24), (1, 24, 40, 40), torch.contiguous_format),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    make, size, format = REFUSED[reason]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        check(fused(make()), torch.randn(size).contiguous(memory_format=format), together=False)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_changed_weights_and_settings_count():
    model, input = fused(Block(24, 144, 24)), images(1, 24, 40, 40)
    before = check(model, input)
    model.depthwise.weight.mul_(2)
    assert not torch.equal(check(model, input), before)
    model.project.bias = None
    check(model, input)
    model.expand.weight = nn.Parameter(model.expand.weight.flip(0))
    check(model, input)
    with backends.flags(precision="highest"):
        check(model, input)
    check(model, images(2, 24, 33, 31))  # of another size
    model.project.algorithm = "naive"  # of which no weight is packed
    model(input)
    assert unseen(model._runs[0], input) == 1  # the other two
    model.project.algorithm = "auto"
    handle = model.depthwise.register_forward_hook(lambda module, args, output: output * 2)
    hooked = model(input)
    handle.remove()
    assert not torch.equal(hooked, check(model, input))


@pytest.mark.parametrize("algorithm", ["winograd", "naive"])
@torch.no_grad()
def test_algorithms_that_cannot_take_some_lines_by_themselves(algorithm):
    model, input = fused(Block(24, 144, 24)), images(1, 24, 80, 60)
    model.depthwise.algorithm = algorithm
    check(model, input, together=False)
    model.depthwise.algorithm = "auto"
    with backends.flags(algorithm=algorithm):
        check(model, input, together=False)


@pytest.mark.parametrize("threads", [1, 4])
@torch.no_grad()
def test_strassen_depends_on_how_pixels_are_cut(threads):
    """Weights packed for another size, by another algorithm than the layers would take."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = fused(Block(512, 512, 512))
        for size in ((1, 512, 40, 7), (2, 512, 30, 4), (1, 512, 40, 7)):
            input, fresh = images(*size), fused(Block(512, 512, 512))
            expected = fx.Interpreter(fresh).run(input)
            for _ in range(2):
                assert torch.equal(model(input), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "layer, name, value",
    [
        ("depthwise", "stride", (0, 0)),
        ("depthwise", "stride", (-1, 1)),
        ("depthwise", "padding", (-1, 0)),
        ("expand", "dilation", (0, 1)),
        ("project", "stride", (0, 1)),
    ],
)
@torch.no_grad()
def test_impossible_parameters(layer, name, value):
    model, input = fused(Block(24, 144, 24)), images(1, 24, 40, 40)
    model(input)
    setattr(model.get_submodule(layer), name, value)
    with pytest.raises(RuntimeError, match=name):
        model(input)


@torch.no_grad()
def test_errors_are_those_of_the_layers():
    model = fused(Block(24, 144, 24))
    model(images(1, 24, 40, 40))
    with pytest.raises(RuntimeError, match="channels"):
        model(images(1, 25, 40, 40))
    model.depthwise.bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(RuntimeError, match="bias"):
        model(images(1, 24, 40, 40))
