"""recompute_batch_norm: what is kept for backward shrinks, outputs and gradients stay the same to the bit."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import torch_convlab
import torch_convlab.functional as ours
from torch_convlab import nn as layers
from torch_convlab.recompute import RecomputingGraphModule


class Block(nn.Module):
    """A residual block in its two forms: with a projection of the shortcut, or without."""

    def __init__(self, inputs, width):
        super().__init__()
        self.conv1, self.bn1 = layers.Conv2d(inputs, width, 3, padding=1, bias=False), layers.BatchNormReLU2d(width)
        self.conv2, self.bn2 = layers.Conv2d(width, width, 3, padding=1), layers.BatchNormAddReLU2d(width)
        self.projection = nn.Identity() if inputs == width else layers.Conv2d(inputs, width, 1)
        self.norm = nn.Identity() if inputs == width else layers.BatchNorm2d(width)

    def forward(self, input):
        shortcut = self.norm(self.projection(input))
        return self.bn2(self.conv2(self.bn1(self.conv1(input))), shortcut)


class Branching(Block):
    """Not to be traced."""

    def forward(self, input):
        return super().forward(input) if input.sum() > 0 else input


def network(blocks=4):
    torch.manual_seed(0)
    return nn.Sequential(Block(3, 8), *(Block(8, 8) for _ in range(blocks - 1)), layers.Conv2d(8, 2, 1))


def step(model, input, context):
    """Loss, gradients and running statistics of a training step on a copy of the model."""
    model, input = copy.deepcopy(model), input.clone().requires_grad_()
    with context:
        loss = model(input).square().sum()
    loss.backward()
    return [loss.detach(), input.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def kept(call):
    """Bytes that `call` and its result leave allocated, as the allocator reports them."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as record:
        result = call()
    events = record.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_same_bits(dtype, format, depth):
    model = network().to(dtype).to(memory_format=format)
    input = torch.randn(2, 3, 9, 9).to(dtype).contiguous(memory_format=format)
    for plain, again in zip(
        step(model, input, nullcontext()), step(model, input, torch_convlab.recompute_batch_norm(depth))
    ):
        assert torch.equal(plain, again)


def test_less_is_kept():
    model, input = network(), torch.randn(8, 3, 24, 24)
    amounts = []
    for context in (nullcontext(), *(torch_convlab.recompute_batch_norm(depth) for depth in (1, 2, 5))):
        with context:
            amounts.append(kept(lambda: model(input))[0])
    # Of a block (its input not counted) two outputs of convolutions and two of batch norms; the projection adds two.
    activation = 8 * 8 * 24 * 24 * 4
    saved = [round((amounts[0] - amount) / activation) for amount in amounts]
    # Inner outputs always (4 and the projection's); of the chain of 4 block outputs all but the kept ones. A block
    # output whose shortcut is recomputed is of depth 2.
    assert saved == [0, 5 + 2, 5 + 3, 5 + 4]


def test_one_output_read_by_two_layers_is_computed_once():
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    convolutions = [layers.Conv2d(8, 8, 1, bias=False) for _ in range(2)]
    with torch_convlab.recompute_batch_norm():
        y = ours.batch_norm_relu(x, None, None, training=True)
        z = convolutions[0](y) + convolutions[1](y)
    del y
    with torch.profiler.profile() as record:
        z.sum().backward()
    counts = {event.key: event.count for event in record.key_averages()}
    assert counts["convlab::batch_norm_eval"] == 1


def test_the_output_is_freed():
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    convolution = layers.Conv2d(8, 8, 1)
    alive = []
    for context in (nullcontext(), torch_convlab.recompute_batch_norm()):
        with context:
            y = ours.batch_norm_relu(x, None, None, training=True)
            z = convolution(y)
        reference = StorageWeakRef(y.untyped_storage())
        del y
        gc.collect()
        alive.append(not reference.expired())
        z.sum().backward()
    assert alive == [True, False]


def test_outputs_changed_in_place_are_kept():
    """torch's ReLU(inplace=True) after the batch norm: what is saved is not what the batch norm gave."""
    torch.manual_seed(0)
    model = nn.Sequential(layers.BatchNorm2d(4), nn.ReLU(inplace=True), layers.Conv2d(4, 4, 3))
    input = torch.randn(2, 4, 6, 6)
    for plain, again in zip(
        step(model, input, nullcontext()), step(model, input, torch_convlab.recompute_batch_norm())
    ):
        assert torch.equal(plain, again)


def test_changed_operands_raise():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    weight = torch.ones(4)
    middle = x * 1
    with torch_convlab.recompute_batch_norm():
        y = ours.batch_norm_relu(middle, None, None, weight, training=True)
        z = layers.Conv2d(4, 4, 1)(y)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="size \\[4\\], has been modified by an inplace operation"):
        z.sum().backward()


def test_double_backward_and_retained_graphs():
    results = []
    for context in (nullcontext(), torch_convlab.recompute_batch_norm()):
        model, x = network(2).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator())
        x = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x).sin().requires_grad_()
        with context:
            loss = model(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.equal(first, grad)
        results.append(torch.autograd.grad(grad.square().sum(), [x, *model.parameters()], allow_unused=True))
    for plain, again in zip(*results):
        assert (plain is None and again is None) or torch.equal(plain, again)


def test_fuse():
    torch.manual_seed(0)
    model = torch_convlab.convert(torch_convlab.models.resnet18(layers=nn, num_classes=5)).train()
    input = torch.randn(2, 3, 64, 64)
    plain = torch_convlab.fuse(model, input)
    lean = torch_convlab.fuse(model, input, recompute=True)
    assert isinstance(lean, RecomputingGraphModule) and list(lean.state_dict()) == list(plain.state_dict())
    for one, other in zip(step(plain, input, nullcontext()), step(lean, input, nullcontext())):
        assert torch.equal(one, other)
    amounts = [kept(lambda m=m: m(input))[0] for m in (plain, lean, copy.deepcopy(lean))]
    assert amounts[1] == amounts[2] < 0.75 * amounts[0]
    with torch.no_grad():
        assert torch.equal(plain.eval()(input), lean.eval()(input))


def test_errors():
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        torch_convlab.recompute_batch_norm(0)
    with pytest.raises(ValueError, match="in eval mode"):
        torch_convlab.fuse(network().eval(), recompute=True)
    with pytest.raises(ValueError, match="can be traced, which this Branching is not"), pytest.warns(UserWarning):
        torch_convlab.fuse(Branching(3, 8).train(), recompute=True)


def test_compile():
    model = network(2)
    input = torch.randn(2, 3, 6, 6)
    expected = step(model, input, nullcontext())
    compiled = torch.compile(torch_convlab.fuse(model, input, recompute=True), backend="aot_eager")
    leaf = input.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected[1])
