"""The lecture's own numbers: output sizes, parameters, multiply-adds, receptive fields and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ALGORITHMS

from torch_convlab import _C
from torch_convlab import functional as F

# Winograd's points are irrational: equal only within rounding, which test_convolution checks. inner_product and
# strassen are for 1x1, amx is not for float64.
EXACT = [name for name in ALGORITHMS if name not in ("winograd", "inner_product", "strassen", "amx")]
# 4 x 4 input and 3 x 3 kernel of items L7 and L10.
INPUT = torch.tensor([[2, 3, 2, 4], [5, 6, 6, 8], [3, 2, 1, 0], [1, 2, 3, 4]], dtype=torch.float64).view(1, 1, 4, 4)
KERNEL = torch.arange(1, 10, dtype=torch.float64).view(1, 1, 3, 3)


def test_l1_output_size():
    """ceil((W - K + 1 + 2P) / S): the two examples, and every small size against torch."""
    assert _C.output_size(7, 3, stride=2) == 3
    output = F.conv2d(torch.zeros(1, 3, 32, 32), torch.zeros(10, 3, 5, 5), padding=2)
    assert output.shape == (1, 10, 32, 32)
    for width in range(1, 12):
        for kernel in range(1, 6):
            for stride in range(1, 5):
                for padding in range(4):
                    size = _C.output_size(width, kernel, stride, padding)
                    if width + 2 * padding < kernel:
                        assert size <= 0
                        continue
                    assert size == math.ceil((width - kernel + 1 + 2 * padding) / stride)
                    convolved = torch.nn.functional.conv1d(
                        torch.zeros(1, 1, width), torch.zeros(1, 1, kernel), None, stride, padding
                    )
                    assert size == convolved.shape[-1]


@pytest.mark.parametrize("kernel, padding, stride", [(3, 1, 1), (5, 2, 1), (1, 0, 1), (3, 1, 2)])
def test_l4_common_settings(kernel, padding, stride):
    """P = (K-1)/2 keeps the size at stride 1 and halves it at stride 2."""
    output = F.conv2d(torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, kernel, kernel), stride=stride, padding=padding)
    assert output.shape[-2:] == (28 // stride, 28 // stride)


def test_l2_parameters_and_multiply_adds():
    """3x32x32 by ten 5x5 filters: 76 parameters a filter, 760 in all, 768,000 multiply-adds."""
    geometry = _C.ConvGeometry(batch=1, in_channels=3, out_channels=10, input=[32, 32], kernel=[5, 5], padding=[2, 2])
    assert geometry.output == [1, 32, 32]
    assert geometry.parameters(bias=True) == 760 == 10 * 76
    assert geometry.multiply_adds() == 768_000


def test_l3_receptive_field():
    """1 + L*(K-1) for L layers of stride 1; checked by asking which inputs reach one output."""
    for layers in range(1, 6):
        input = torch.zeros(1, 1, 31, requires_grad=True)
        output = input
        field = _C.ReceptiveField()
        for _ in range(layers):
            output = F.conv1d(output, torch.ones(1, 1, 3), padding=1)
            field.step(3)
        (gradient,) = torch.autograd.grad(output[0, 0, 15], input)
        assert field.size == int(gradient.count_nonzero()) == 1 + 2 * layers
    field = _C.ReceptiveField()
    for kernel, stride in ((7, 2), (3, 2), (3, 1), (3, 2)):
        field.step(kernel, stride)
    assert (field.size, field.jump) == (7 + 2 * 2 + 2 * 4 + 2 * 4, 8)


@pytest.mark.parametrize("algorithm", EXACT)
def test_l7_weight_gradient(algorithm):
    """Each weight's gradient is the sum over the patches that the weight touched."""
    weight = KERNEL.clone().requires_grad_()
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    output = F.conv2d(INPUT, weight, bias, algorithm=algorithm)
    assert output.flatten().tolist() == torch.nn.functional.conv2d(INPUT, KERNEL).flatten().tolist()
    grad = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=torch.float64)  # which gradient went where is readable
    grad_weight, grad_bias = torch.autograd.grad(output, (weight, bias), grad.view(1, 1, 2, 2))
    g00, g01, g10, g11 = grad.flatten().tolist()
    assert grad_weight[0, 0, 0, 1].item() == 3 * g00 + 2 * g01 + 6 * g10 + 6 * g11
    for row in range(3):
        for column in range(3):
            patch = INPUT[0, 0, row : row + 2, column : column + 2]
            assert grad_weight[0, 0, row, column] == (patch * grad).sum()
    assert grad_bias.item() == 1111


@pytest.mark.parametrize("algorithm", EXACT)
def test_l8_input_gradient(algorithm):
    """Each input's gradient is the sum over the kernels that touched it: corners by one, the middle by all four."""
    input = INPUT.clone().requires_grad_()
    output = F.conv2d(input, KERNEL, algorithm=algorithm)
    grad = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=torch.float64)
    (grad_input,) = torch.autograd.grad(output, input, grad.view(1, 1, 2, 2))
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            expected[row : row + 3, column : column + 3] += grad[row, column] * KERNEL[0, 0]
    torch.testing.assert_close(grad_input[0, 0], expected, rtol=1e-14, atol=0)
    assert grad_input[0, 0, 1, 1].item() == pytest.approx(5 * 1 + 4 * 10 + 2 * 100 + 1 * 1000)
