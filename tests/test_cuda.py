"""The CUDA kernels, run by the emulator through the same operators, cases and tolerances as the CPU's.

The tests of the operators themselves are run again with the emulator on. All of any test file can be:
``pytest --device emulated tests/test_pooling.py``, or, with a GPU, ``pytest --device cuda``.
"""

from __future__ import annotations

import emulator
import pytest
import test_normalization
import test_normalization_double_backward
import test_pooling
import torch
from cases import BY_NAME, PASSES, SMALL, ConvCase
from helpers import DTYPES, FORMATS, assert_within, bound, check_pass, in_format, operands, reference, refusal, run_pass

# Multiply-adds that are worth emulating.
LIMIT = {
    "naive": 100_000,
    "implicit_gemm": 300_000,
    "winograd": 4_000_000,
    "direct": 150_000,
    "depthwise": 150_000,
    "inner_product": 1_300_000,
}


@pytest.fixture(autouse=True)
def float32_digits():
    """Tolerances are those of float32: no tf32 unless a test asks for it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def only_once(request):
    if request.config.option.device != "cpu":
        pytest.skip("with --device, the tests of the operators run on the kernels themselves")


def laid_out(case, dtype, format):
    return {
        name: value if value is None or name == "bias" else in_format(value, format)
        for name, value in operands(case, dtype).items()
    }


@pytest.mark.parametrize(
    "case, algorithm",
    [
        pytest.param(case, algorithm, id=f"{case}-{algorithm}")
        for algorithm, limit in LIMIT.items()
        for case in SMALL
        if case.multiply_adds <= limit and not refusal(case, algorithm, on="cuda")
        if algorithm != "winograd" or case.groups <= 17  # each of which is 36 products
    ],
)
def test_convolution(case, algorithm):
    for dtype in DTYPES:
        for format in FORMATS:
            for pass_ in PASSES:
                if refusal(case, algorithm, pass_, dtype, on="cuda"):
                    continue
                with emulator.emulated() as launches:
                    actual = run_pass(case, pass_, algorithm, **laid_out(case, dtype, format))
                    assert launches() > 0 or case.input[0] == 0
                check_pass(case, pass_, algorithm, dtype, actual, on="cuda")


@pytest.mark.parametrize("pass_, format", [("forward", "channels_last"), ("backward_weight", "channels_first")])
def test_winograd_in_chunks(pass_, format):
    """More tiles than the workspace holds at once: 43 x 43 of 61 and 62 channels."""
    case = ConvCase("chunks", (1, 61, 171, 169), 62, 3, padding=1)
    with emulator.emulated():
        actual = run_pass(case, pass_, "winograd", **laid_out(case, torch.float32, format))
    check_pass(case, pass_, "winograd", torch.float32, actual, on="cuda")


FEW_PIXELS = [
    ConvCase("one_row", (1, 1040, 1, 1), 290, 1, bias=True),
    ConvCase("three_rows_odd", (3, 517, 1, 1), 131, 1),
    ConvCase("eleven_pixels_groups", (1, 528, 11), 272, 1, groups=2, bias=True),
    ConvCase("images_of_six", (3, 72, 2, 1, 3), 140, 1),
    ConvCase("transposed_rows", (5, 136, 1, 1), 260, 1, bias=True, transposed=True),
]


@pytest.mark.parametrize("case", FEW_PIXELS, ids=str)
def test_inner_product_of_long_sums(case):
    """Several warps for a sum over channels, several splits of one over filters, more pixels than at once."""
    for dtype in DTYPES:
        for format in FORMATS:
            for pass_ in PASSES:
                with emulator.emulated(seed=2) as launches:
                    actual = run_pass(case, pass_, "inner_product", **laid_out(case, dtype, format))
                    split = pass_ == ("forward" if case.transposed else "backward_input")
                    assert launches() == (2 if split else 1)
                check_pass(case, pass_, "inner_product", dtype, actual, on="cuda")


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_tf32_is_used_where_torch_allows_it(format, tf32):
    """Rounded operands lose 2^-11 each; split ones keep float32's digits."""
    case = BY_NAME["3x3_valid_batch3"]
    for pass_ in PASSES:
        with emulator.emulated(), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            actual = run_pass(case, pass_, "implicit_gemm", **laid_out(case, torch.float32, format))
        expected = reference(case, torch.float32)[pass_]
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        assert (1e-5 < error < 1e-3) if tf32 else error < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("algorithm", LIMIT)
def test_fused(algorithm, format, dtype):
    """clamp(convolution + bias + residual), rounded once."""
    case = BY_NAME[{"depthwise": "depthwise_dilated", "inner_product": "pointwise"}.get(algorithm, "3x3_valid_batch3")]
    if refusal(case, algorithm, "forward", dtype, on="cuda"):
        pytest.skip(f"there is no kernel of {algorithm} for {dtype}")
    tensors = laid_out(case, dtype, format)
    bias, residual = torch.randn(case.out_channels).to(dtype), in_format(tensors["grad_output"], format)
    parameters = list(case.stride), list(case.padding), list(case.dilation), case.groups
    with emulator.emulated():
        fused = torch.ops.convlab.convolution_fused(
            tensors["input"], tensors["weight"], bias, residual, None, 0.0, 2.0, *parameters, algorithm
        )
    plain = reference(case, dtype)["forward"] + bias.double().view(1, -1, 1, 1) + residual.double()
    allowed = bound(algorithm, dtype, case.reduction("forward"), plain, 1, on="cuda")
    assert_within(fused, plain.clamp(0, 2), allowed, "fused")
    for gate, function in (("sigmoid", torch.nn.functional.silu), ("hard_sigmoid", torch.nn.functional.hardswish)):
        with emulator.emulated():
            gated = torch.ops.convlab.convolution_fused(
                tensors["input"], tensors["weight"], bias, residual, None, None, None, *parameters, algorithm, gate
            )
        # The steepest slope of both is 1.5, and torch computes them from what has been rounded once.
        again = torch.finfo(dtype).eps * plain.abs().max().item()
        assert_within(gated, function(plain), 1.5 * allowed + again, gate)


def test_blocks_of_a_large_depthwise_problem_go_round():
    """With more blocks than a GPU has at once, each computes several parts with the weights that it has staged."""
    input = in_format(torch.randn(1, 4, 1100, 1100), "channels_last")
    weight = torch.randn(4, 1, 1, 1)
    with emulator.emulated(seed=1):
        output = torch.ops.convlab.convolution(input, weight, None, [1, 1], [0, 0], [1, 1], 4, "depthwise")
    assert torch.equal(output, input * weight.view(1, 4, 1, 1))


def test_specials_pass_through_split_float32():
    case = BY_NAME["grouped_stride2"]
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors = laid_out(case, torch.float32, "channels_last")
        tensors["input"][1, 7, 4, 4] = value
        expected = run_pass(case, "forward", "naive", **{k: v if v is None else v.double() for k, v in tensors.items()})
        with emulator.emulated():
            actual = run_pass(case, "forward", "implicit_gemm", **tensors)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual), kind(expected))


# Tests of other files that run again here, with the arguments that are worth emulating.
AGAIN = [
    *((test_pooling.test_max_pool, case.values) for case in test_pooling.CASES[::2]),
    *((test_pooling.test_avg_pool, case.values) for case in test_pooling.CASES[1::2] if case.values[1][3] == 1),
    *((test_pooling.test_adaptive, ((2, 3, 9, 11), size)) for size in (1, 2, 5, "more")),
    (test_pooling.test_adaptive, ((1, 17, 4, 6, 20), 3)),
    *((test_pooling.test_nan_infinity_and_ties, (dtype, last)) for dtype in DTYPES[::2] for last in (False, True)),
    (test_pooling.test_window_beside_the_input, ()),
    (test_pooling.test_mixed_arguments, ()),
    *(
        (test_normalization.test_batch_norm, (name, shape, format, training))
        for name in test_normalization.BATCH_NORMS
        for shape in list(test_normalization.SHAPES.values())[:: 1 if name == "batch_norm_add_relu" else 3]
        for format in test_normalization.FORMATS
        for training in (True, False)
    ),
    *(
        (test_normalization.test_batch_norm_of_16_bits, (dtype, "same", format))
        for dtype in (torch.bfloat16, torch.float16)
        for format in test_normalization.FORMATS
    ),
    *((test_normalization.test_large_mean, (format,)) for format in test_normalization.FORMATS),
    *(
        (test_normalization.test_mask_is_that_of_the_output, (format, bounds, mark))
        for format in test_normalization.FORMATS
        for bounds, mark in (((0.0, None), False), ((0.0, None), True), ((-0.5, 0.25), False))
    ),
    *(
        (test_normalization.test_marked_backward_is_the_recomputing_one, (format, shape, dtype))
        for format in test_normalization.FORMATS
        for shape in ((3, 5), (2, 7, 5), (4, 35, 9, 9), (2, 16, 8, 8))
        for dtype in DTYPES
    ),
    *(
        (test_normalization.test_gradient_at_the_bounds_and_of_nan_is_that_of_torch, (f,))
        for f in test_normalization.FORMATS
    ),
    *((test_normalization.test_group_norm, ((3, 6, 7, 5), format)) for format in test_normalization.FORMATS),
    (test_normalization.test_layer_norm, ((3, 6, 7, 5),)),
    *((test_normalization.test_nan_and_infinity, (format, float("inf"))) for format in test_normalization.FORMATS),
    *(
        (test_normalization_double_backward.test_against_torch_in_float64, (name, shape, format, affine))
        for name in test_normalization.BATCH_NORMS
        for shape in test_normalization_double_backward.SHAPES.values()
        for format, affine in (("channels_first", True), ("channels_last", False))
    ),
    *(
        (test_normalization_double_backward.test_dtypes, (dtype, tolerance, format))
        for dtype, tolerance in test_normalization_double_backward.TOLERANCE.items()
        for format in test_normalization.FORMATS
    ),
    *((test_normalization_double_backward.test_a_kernel_computes_it, (f,)) for f in test_normalization.FORMATS),
]


def test_id(test, arguments):
    return "-".join([test.__name__, *(str(argument).replace(" ", "") for argument in arguments)])


@pytest.mark.parametrize(
    "seed, test, arguments",
    [pytest.param(index % 3, *again, id=test_id(*again)) for index, again in enumerate(AGAIN)],
)
def test_again(seed, test, arguments):
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    with emulator.emulated(seed) as launches:
        test(**dict(zip(names, arguments)))
        assert launches() > 0


test_id.__test__ = False


def test_emulated_operators_have_the_same_schemas():
    emulator.load()
    tensors = operands(BY_NAME["3x3"], torch.float32)
    arguments = tensors["input"], tensors["weight"], None, [1, 1], [1, 1], [1, 1], 1, "naive"
    emulated = torch.ops.convlab_emulated.convolution(*arguments)
    torch.testing.assert_close(emulated, torch.ops.convlab.convolution(*arguments), atol=1e-4, rtol=1e-5)
    with pytest.raises(RuntimeError, match="weight should have 3 to 5 dimensions"):
        torch.ops.convlab_emulated.convolution(arguments[0], arguments[1][0, 0], *arguments[2:])
