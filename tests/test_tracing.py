"""Models seen by what traces, recomputes or recasts them: torch.compile, export, autocast, checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers import FORMATS, in_format
from torch.utils.checkpoint import checkpoint

import torch_convlab
from torch_convlab import functional as F


class Net(torch.nn.Module):
    """Every kind of convolution in one forward pass."""

    def __init__(self, nn):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.same = nn.Conv2d(8, 6, (2, 3), padding="same", padding_mode="zeros")
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1)

    def forward(self, x):
        return self.up(self.same(self.depthwise(self.first(x).relu()).relu()))


@pytest.fixture
def nets():
    theirs, ours = Net(torch.nn), Net(torch_convlab.nn)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def losses_and_gradients(net, input):
    input = input.detach().clone().requires_grad_()
    output = net(input)
    return [output, *torch.autograd.grad(output.square().mean(), [input, *net.parameters()])]


@pytest.mark.parametrize("format", FORMATS)
def test_compile(nets, format):
    torch._dynamo.reset()
    ours, theirs = nets
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    input = in_format(torch.randn(2, 3, 9, 8), format)
    torch.testing.assert_close(losses_and_gradients(compiled, input), losses_and_gradients(theirs, input))
    assert compiled(input).stride() == ours(input).stride()


def test_compile_for_every_size_at_once(nets):
    torch._dynamo.reset()
    ours, theirs = nets
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 3, 9, 8), (3, 3, 12, 10), (5, 3, 7, 21)):
        input = torch.randn(size)
        torch.testing.assert_close(losses_and_gradients(compiled, input), losses_and_gradients(theirs, input))
    assert counter.frame_count == 1


def test_export_with_dynamic_batch(nets):
    ours, theirs = nets
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    assert any("convlab" in str(node.target) for node in program.graph.nodes)
    for size in (2, 7):
        input = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(program.module()(input), theirs(input))


def test_autocast(nets):
    ours, theirs = nets
    input = torch.randn(2, 3, 9, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            actual, expected = ours(input), theirs(input)
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        double = F.conv2d(torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 3, 3).double())
        unit = torch.nn.functional.conv2d(torch.randn(1, 1, 4, 4).double(), torch.randn(1, 1, 3, 3).double())
        assert double.dtype == unit.dtype
        actual = losses_and_gradients(ours, input)
        expected = losses_and_gradients(theirs, input)
    for ours_tensor, theirs_tensor in zip(actual, expected):
        assert ours_tensor.dtype == theirs_tensor.dtype
        scale = theirs_tensor.abs().max().item()
        torch.testing.assert_close(ours_tensor, theirs_tensor, atol=0.02 * scale, rtol=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(nets, use_reentrant):
    ours, _ = nets
    input = torch.randn(2, 3, 9, 8)
    direct = losses_and_gradients(ours, input)
    again = input.clone().requires_grad_()
    output = checkpoint(ours, again, use_reentrant=use_reentrant)
    output.square().mean().backward()
    gradients = [output, again.grad, *(parameter.grad for parameter in ours.parameters())]
    assert all(torch.equal(first, second) for first, second in zip(direct, gradients))
