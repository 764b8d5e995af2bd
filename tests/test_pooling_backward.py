"""Max pooling's gradient on each of its ways: vectors of channels, of a phase, planes scattered, past the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torch_convlab import functional

SHAPES = {  # size of the input, kernel, stride, padding, dilation
    "whole and single vectors": ((2, 85, 11, 23), 3, 2, 1, 1),
    "odd channels": ((3, 20, 13, 14), 3, 2, 1, 1),
    "few channels": ((2, 3, 9, 40), 3, 2, 0, 1),
    "stride 1": ((2, 50, 9, 12), 3, 1, 1, 1),
    "disjoint, odd": ((2, 50, 15, 13), 2, 2, 0, 1),
    "stride beyond kernel": ((2, 20, 17, 19), 2, 3, 0, 1),
    "dilated": ((2, 20, 17, 19), 3, 2, 1, 2),
    "many windows": ((1, 20, 12, 14), 9, 1, 4, 1),
    "long rows": ((1, 5, 3, 700), (1, 5), (1, 2), (0, 2), 1),
    "3-D": ((1, 18, 7, 9, 14), 3, 2, 1, 1),
    "3-D, stride 1": ((1, 35, 5, 6, 9), 3, 1, 1, 1),
    "past the cache": ((1, 64, 290, 290), 3, 2, 1, 1),
    "past the cache, disjoint": ((1, 64, 290, 290), 2, 2, 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient(name, channels_last, dtype):
    size, *windows = SHAPES[name]
    spatial = len(size) - 2
    format = (torch.channels_last, torch.channels_last_3d)[spatial - 2] if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(size, generator=generator).to(dtype).to(memory_format=format).requires_grad_()
    ours, theirs = (getattr(library, f"max_pool{spatial}d") for library in (functional, F))
    output = ours(input, *windows)
    grad_output = torch.randn(output.shape, generator=generator).to(dtype)
    (grad,) = torch.autograd.grad(output, input, grad_output.to(memory_format=format))

    exact = input.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(exact, *windows), exact, grad_output.double())
    assert grad.is_contiguous(memory_format=format)
    # Sums of the gradients of at most 81 windows, rounded once each in float32, and once more where it is stored.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8 * expected.abs().max().item()}[dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=tolerance)
