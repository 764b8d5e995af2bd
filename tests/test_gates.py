"""SiLU and Hardswish in a convolution's last store: how exact they are, and what they make of special values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torch_convlab._activation import HARDSWISH, SILU
from torch_convlab.functional import conv_fused

FUNCTIONS = {"silu": (SILU, F.silu), "hardswish": (HARDSWISH, F.hardswish)}


def gated(values: torch.Tensor, gate) -> torch.Tensor:
    """Of each value, as what comes behind a convolution that leaves it as it is."""
    weight = torch.ones(1, 1, 1, 1, dtype=values.dtype)
    return conv_fused(values.view(1, 1, 1, -1), weight, relu=gate).view(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_in_the_last_place(name, dtype):
    """Against wider numbers: 4 epsilons for the exponential, the sum, the division and the product together."""
    gate, function = FUNCTIONS[name]
    values = torch.cat([torch.linspace(-87, 90, 100_003), torch.linspace(-1e-3, 1e-3, 10_001)]).to(dtype)
    if name == "silu":
        expected = values.double() * (1 / (1 + torch.exp(-values.double())))
    else:
        expected = values.double() * ((values.double() + 3).clamp(0, 6) / 6)
    error = (gated(values, gate).double() - expected).abs()
    # Where Hardswish's sum with 3 cancels, its rounding is what is left: half a unit of 3.
    lost = torch.finfo(dtype).eps * (values.double().abs() if name == "hardswish" else 0)
    assert (error <= 4 * torch.finfo(dtype).eps * expected.abs() + lost).all()
    assert torch.allclose(gated(values, gate), function(values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_specials(name, dtype):
    """As torch: beyond the exponential's range, infinities, which its own sigmoid closes to NaN, and NaN."""
    gate, function = FUNCTIONS[name]
    ends = [87.3, 88.0, 88.72, 88.73, 89.0, 700.0, 708.4, 709.7, 709.8, 745.0, 1e4, 3e38, float("inf"), float("nan")]
    values = torch.tensor([0.0, -0.0, 1e-40, *ends, *(-end for end in ends)], dtype=dtype)
    torch.testing.assert_close(gated(values, gate), function(values), rtol=1e-5, atol=1e-35, equal_nan=True)


def test_unknown_gates_are_refused():
    input, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)
    for tensor in (input, input.to("meta")):
        with pytest.raises(ValueError, match="unknown gate 'swish', expected one of: none, sigmoid, hard_sigmoid"):
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
