"""SiLU, Hardswish and GELU in a convolution's last store: how exact they are, and what they make of special values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from torch_convlab._activation import GELU, GELU_TANH, HARDSWISH, SILU
from torch_convlab.functional import conv_fused

FUNCTIONS = {
    "silu": (SILU, F.silu),
    "hardswish": (HARDSWISH, F.hardswish),
    "gelu": (GELU, F.gelu),
    "gelu_tanh": (GELU_TANH, lambda values: F.gelu(values, approximate="tanh")),
}


def exactly(name: str, values: torch.Tensor) -> torch.Tensor:
    """In double, without cancellation."""
    x = values.double()
    if name == "silu":
        return x * (1 / (1 + torch.exp(-x)))
    if name == "gelu":
        return x * 0.5 * torch.special.erfcx(-x / 2**0.5).where(x < 0, 0) * torch.exp(-x * x / 2) + x.where(
            x >= 0, 0
        ) * torch.special.ndtr(x)
    if name == "gelu_tanh":
        return x / (1 + torch.exp(-2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x * ((x + 3).clamp(0, 6) / 6)


def gated(values: torch.Tensor, gate) -> torch.Tensor:
    """Of each value, as what comes behind a convolution that leaves it as it is."""
    weight = torch.ones(1, 1, 1, 1, dtype=values.dtype)
    return conv_fused(values.view(1, 1, 1, -1), weight, relu=gate).view(-1)


# Epsilons of the value. SiLU: the exponential, the sum, the division and the product together. An exponent's rounding
# counts times its size, up to 88: in GELU's approximation, and in double, here as well, in GELU.
EPSILONS = {"silu": 4, "hardswish": 4, "gelu": 8, "gelu_tanh": 300}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(name, dtype):
    """Against wider numbers."""
    gate, function = FUNCTIONS[name]
    least = {"gelu": -13, "gelu_tanh": -10}.get(name, -87)  # up to where the gate is a normal number in float32
    values = torch.cat([torch.linspace(least, 90, 100_003), torch.linspace(-1e-3, 1e-3, 10_001)]).to(dtype)
    expected = exactly(name, values)
    error = (gated(values, gate).double() - expected).abs()
    # Where Hardswish's sum with 3 cancels, its rounding is what is left: half a unit of 3.
    lost = torch.finfo(dtype).eps * (values.double().abs() if name == "hardswish" else 0)
    smallest = torch.finfo(dtype).smallest_normal
    epsilons = 300 if name == "gelu" and dtype == torch.float64 else EPSILONS[name]
    assert (error <= epsilons * torch.finfo(dtype).eps * expected.abs() + lost + smallest).all()
    assert torch.allclose(gated(values, gate), function(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_specials(name, dtype):
    """As torch: beyond the exponential's range, infinities, which its own sigmoid closes to NaN, and NaN."""
    gate, function = FUNCTIONS[name]
    ends = [87.3, 88.0, 88.72, 88.73, 89.0, 700.0, 708.4, 709.7, 709.8, 745.0, 1e4, 3e38, float("inf"), float("nan")]
    values = torch.tensor([0.0, -0.0, 1e-40, *ends, *(-end for end in ends)], dtype=dtype)
    expected = function(values)
    if name == "gelu":  # torch makes NaN or infinity of the largest
        expected = torch.where(values > 1e4, values, expected)
    torch.testing.assert_close(gated(values, gate), expected, rtol=1e-5, atol=1e-35, equal_nan=True)


def test_unknown_gates_are_refused():
    input, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    for tensor in (input, input.to("meta")):
        with pytest.raises(
            ValueError, match="unknown gate 'swish', expected one of: none, sigmoid, hard_sigmoid, normal"
        ):
            torch.ops.convlab.convolution_fused(
                tensor,
                weight.to(tensor.device),
                None,
                None,
                None,
                None,
                None,
                [1, 1],
                [0, 0],
                [1, 1],
                1,
                "auto",
                "swish",
            )
