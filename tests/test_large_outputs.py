"""Outputs from 16 MiB on, which some kernels store past the caches (csrc/cpu/streaming.h)."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from cases import ConvCase

LARGE = 1 << 22  # elements

CASES = [
    # Whole panels of filters, a narrower last one, and a last vector that is not full, where nothing is stored past.
    ConvCase("pointwise", (1, 8, 257, 256), 64, 1, bias=True),
    ConvCase("narrow_last_panel", (2, 24, 171, 173), 72, 1),
    ConvCase("partial_vector", (1, 8, 257, 256), 66, 1),
    ConvCase("3x3", (1, 4, 259, 256), 64, 3, padding=1, bias=True),
    ConvCase("two_chains_of_additions", (1, 72, 259, 256), 64, 3, padding=1),
    ConvCase("groups", (1, 16, 259, 256), 64, 3, padding=1, groups=2),
    # Backward input writes the larger tensor, by phases.
    ConvCase("strided", (1, 64, 259, 257), 8, 3, stride=2, padding=1),
    ConvCase("outer_products", (1, 64, 256, 257), 1, 1),
    ConvCase("transposed", (1, 4, 128, 129), 64, 4, stride=2, padding=1, transposed=True, bias=True),
]


def pass_of(case: ConvCase) -> str:
    """The one that writes the large tensor."""
    return "backward_input" if math.prod(case.input) >= LARGE else "forward"


PROBLEMS = [
    pytest.param(case, algorithm, id=f"{case}-{algorithm}")
    for case in CASES
    for algorithm in ("implicit_gemm", "direct")
    if not helpers.refusal(case, algorithm, pass_of(case), torch.float32)
]


@pytest.mark.parametrize("case, algorithm", PROBLEMS)
def test_large_outputs(case, algorithm):
    pass_ = pass_of(case)
    assert math.prod(case.input if pass_ == "backward_input" else case.output) >= LARGE
    operands = {
        name: value if value is None or name == "bias" else helpers.in_format(value, "channels_last")
        for name, value in helpers.operands(case, torch.float32).items()
    }
    actual = helpers.run_pass(case, pass_, algorithm, **operands)
    helpers.check_pass(case, pass_, algorithm, torch.float32, actual)
