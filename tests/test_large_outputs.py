"""Calls that read and write 24 MiB and more, some of which store past the caches (csrc/cpu/streaming.h)."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from cases import ConvCase

from torch_convlab import functional as F
from torch_convlab._activation import Clamp

CLAMP = Clamp(-0.5, 1.25)
LARGE, WRITTEN = 6 << 20, 2 << 20  # elements that are read and written together, and of those written

CASES = [
    # Whole panels of filters, a narrower last one, and a last vector that is not full, where nothing is stored past.
    ConvCase("pointwise", (1, 40, 257, 256), 64, 1, bias=True),
    ConvCase("narrow_last_panel", (2, 24, 191, 173), 72, 1),
    ConvCase("partial_vector", (1, 40, 257, 256), 66, 1),
    ConvCase("3x3", (1, 4, 363, 257), 64, 3, padding=1, bias=True),
    ConvCase("two_chains_of_additions", (1, 72, 259, 256), 64, 3, padding=1),
    ConvCase("groups", (1, 16, 320, 257), 64, 3, padding=1, groups=2),
    # Backward input writes the larger tensor, by phases.
    ConvCase("strided", (1, 64, 389, 257), 8, 3, stride=2, padding=1),
    ConvCase("outer_products", (1, 64, 385, 257), 1, 1),
    ConvCase("transposed", (1, 4, 160, 157), 64, 4, stride=2, padding=1, transposed=True, bias=True),
]


def pass_of(case: ConvCase) -> str:
    """The one that writes the larger tensor."""
    return "backward_input" if math.prod(case.input) > math.prod(case.output) else "forward"


PROBLEMS = [
    pytest.param(case, algorithm, id=f"{case}-{algorithm}")
    for case in CASES
    for algorithm in ("implicit_gemm", "direct", "winograd")
    if not helpers.refusal(case, algorithm, pass_of(case), torch.float32)
]


@pytest.mark.parametrize("case, algorithm", PROBLEMS)
def test_large_outputs(case, algorithm):
    pass_ = pass_of(case)
    sizes = math.prod(case.input), math.prod(case.output)
    assert sum(sizes) >= LARGE and max(sizes) >= WRITTEN
    operands = {
        name: value if value is None or name == "bias" else helpers.in_format(value, "channels_last")
        for name, value in helpers.operands(case, torch.float32).items()
    }
    actual = helpers.run_pass(case, pass_, algorithm, **operands)
    helpers.check_pass(case, pass_, algorithm, torch.float32, actual)


@pytest.mark.parametrize(
    "case, algorithm",
    [each for each in PROBLEMS if pass_of(each.values[0]) == "forward" and not each.values[0].transposed],
)
def test_large_fused_outputs(case, algorithm):
    """A residual and a clamp, of the output that the test above compares with float64."""
    operands = helpers.operands(case, torch.float32)
    input, bias = helpers.in_format(operands["input"], "channels_last"), operands["bias"]
    residual = torch.randn(case.output, generator=torch.Generator().manual_seed(1))
    residual = helpers.in_format(residual, "channels_last")
    parts = case.stride, case.padding, case.dilation, case.groups
    plain, added, cut = (
        F.conv_fused(input, operands["weight"], bias, extra, clamp, *parts, algorithm=algorithm)
        for extra, clamp in ((None, False), (residual, False), (residual, CLAMP))
    )
    assert torch.equal(added, plain + residual)
    assert torch.equal(cut, added.clamp(*CLAMP.bounds))


@pytest.mark.parametrize("format", helpers.FORMATS)
@pytest.mark.parametrize("layer", ["batch_norm", "group_norm"])
def test_large_normalizations(layer, format):
    """Forward, backward and double backward against float64."""
    size = (2, 64, 161, 160) if layer == "batch_norm" else (2, 64, 160, 160)
    assert 2 * math.prod(size) >= LARGE
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in (size, (64,), (64,), size, size)]

    def results(functional, dtype):
        converted = [value.to(dtype) for value in drawn]
        input, weight, bias, grad_output, seed = (
            helpers.in_format(value, format) if value.dim() == 4 else value for value in converted
        )
        leaves = [leaf.requires_grad_() for leaf in (input, weight, bias)]
        if layer == "batch_norm":
            output = functional.batch_norm(input, None, None, weight, bias, training=True)
        else:
            output = functional.group_norm(input, 8, weight, bias)
        gradients = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
        return [output, *gradients, *torch.autograd.grad(gradients[0], (input, weight), seed)]

    # A float32's rounding of each, and of parameters' gradients, sums over some 50,000 elements of either sign. Group
    # norm's second derivatives are torch's operators, whose sums over channels_last are up to 4e-6 off.
    bounds = [2e-6] * 4 + [5e-6 if layer == "group_norm" else 2e-6] * 2
    for actual, expected, bound in zip(results(F, torch.float32), results(torch.nn.functional, torch.float64), bounds):
        assert (actual - expected).abs().max() < bound * expected.abs().max()
