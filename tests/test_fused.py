"""conv_fused and nn.ConvAddReLU against the parts they stand for: every algorithm, case, format and dtype."""

from __future__ import annotations

import copy
import pickle

import helpers
import pytest
import torch
from cases import SMALL
from helpers import ALGORITHMS, DTYPES, FORMATS, assert_within, bound, in_format, operands, refusal, typical_magnitude
from torch import nn

import torch_convlab
from torch_convlab import backends
from torch_convlab._activation import HARDSWISH, SILU, Clamp
from torch_convlab.functional import conv_fused, pack_weight
from torch_convlab.nn import ConvAddReLU

CLAMP = Clamp(-0.5, 1.25)
CASES = [case for case in SMALL if not case.transposed and case.multiply_adds < 3_000_000]


def reference_of(case, input, weight, bias, residual):
    conv = getattr(nn.functional, f"conv{case.dims}d")
    bias = None if bias is None else bias.double()
    parts = case.stride, case.padding, case.dilation, case.groups
    return (conv(input.double(), weight.double(), bias, *parts) + residual.double()).relu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_algorithm(case, dtype):
    tensors = operands(case, dtype)
    input, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
    residual = torch.randn(case.output, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = reference_of(case, input, weight, bias, residual)
    parts = case.stride, case.padding, case.dilation, case.groups
    for format in FORMATS:
        given = in_format(input, format)
        for algorithm in ALGORITHMS:
            if algorithm != "auto" and refusal(case, algorithm, "forward", dtype, format=format):
                continue
            packed = pack_weight(given, weight, *parts, algorithm=algorithm)
            result = conv_fused(given, weight, bias, residual, True, *parts, algorithm=algorithm, packed=packed)
            allowed = bound(algorithm, dtype, case.reduction("forward"), reference, typical_magnitude(case, "forward"))
            assert_within(result, reference, allowed, f"{algorithm}, {format}")
            # Without a packed weight auto may take another one.
            choice = helpers.choice(case, dtype=dtype, packed=True, format=format)
            taken = choice.chosen if algorithm == "auto" else algorithm
            again = conv_fused(given, weight, bias, residual, True, *parts, algorithm=taken)
            assert torch.equal(result, again), (algorithm, taken, format)
            plain = conv_fused(given, weight, bias, residual, False, *parts, algorithm=algorithm)
            clamped = conv_fused(given, weight, bias, residual, CLAMP, *parts, algorithm=algorithm)
            assert torch.equal(clamped, plain.clamp(*CLAMP.bounds)), (algorithm, format)
            for gate, function in ((SILU, nn.functional.silu), (HARDSWISH, nn.functional.hardswish)):
                gated = conv_fused(given, weight, bias, residual, gate, *parts, algorithm=algorithm)
                # `plain` is rounded to the dtype, slopes are up to 1.5, and the gated value is rounded as well.
                allowed = 4 * torch.finfo(dtype).eps * max([1.0, *plain.abs().flatten().tolist()])
                assert_within(gated, function(plain.double()), allowed, f"{algorithm}, {format}, {gate}")


def test_weight_packed_for_another_problem_is_passed_over():
    if helpers.KERNELS == "cuda":
        pytest.skip("the kernels for CUDA pack nothing")
    input, weight = torch.randn(3, 32, 40, 40), torch.randn(32, 32, 3, 3)
    expected = conv_fused(input, weight, padding=1, algorithm="winograd")
    packed = pack_weight(input, weight, padding=1, algorithm="winograd")
    assert packed.numel() > weight.numel() * 16
    direct = conv_fused(input, weight, padding=1, algorithm="implicit_gemm")
    assert torch.equal(conv_fused(input, weight, padding=1, algorithm="implicit_gemm", packed=packed), direct)
    torch.manual_seed(3)
    halved = conv_fused(input, weight, stride=2, padding=1, algorithm="winograd")
    assert pack_weight(input, weight, stride=2, padding=1, algorithm="winograd").numel() == packed.numel()
    assert torch.equal(conv_fused(input, weight, stride=2, padding=1, algorithm="winograd", packed=packed), halved)
    # Another size or format of the input may have another kernel: where there is one output, or the map is covered.
    filters, covered = torch.randn(64, 32, 5, 5), torch.randn(2, 32, 5, 5)
    one, large = torch.randn(2, 32, 3, 3), torch.randn(2, 32, 9, 11)
    last = in_format(covered, "channels_last")
    for first, second, padding in ((one, large, 1), (covered, large, 0), (covered, last, 0)):
        for packed_for, other in ((first, second), (second, first)):
            elsewhere = pack_weight(packed_for, filters, padding=padding, algorithm="implicit_gemm")
            found = conv_fused(other, filters, padding=padding, algorithm="implicit_gemm", packed=elsewhere)
            assert torch.equal(found, conv_fused(other, filters, padding=padding, algorithm="implicit_gemm"))
    noise = torch.randint(0, 255, (packed.numel(),), dtype=torch.uint8)
    assert torch.equal(conv_fused(input, weight, padding=1, algorithm="winograd", packed=noise), expected)


@pytest.mark.parametrize("algorithm", ["naive", "implicit_gemm", "inner_product"])
def test_nan_and_infinity_pass_as_in_torch(algorithm):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 6.0, 9.0])
    input, weight = values.view(1, 1, 1, -1).expand(1, 1, 3, -1).contiguous(), torch.ones(1, 1, 1, 1)
    for clamp, function in ((False, lambda x: x), (True, torch.relu), (Clamp(0.0, 6.0), nn.functional.relu6)):
        actual = conv_fused(input, weight, relu=clamp, algorithm=algorithm)
        torch.testing.assert_close(actual, function(input), rtol=0, atol=0, equal_nan=True)


def test_sums_of_nothing_are_clamped():
    residual = torch.linspace(-2, 9, 24).view(1, 2, 3, 4)
    output = conv_fused(torch.ones(1, 0, 3, 4), torch.ones(2, 0, 1, 1), residual=residual, relu=Clamp(0.0, 6.0))
    assert torch.equal(output, nn.functional.relu6(residual))


@pytest.fixture
def block():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, padding=1)
    return conv, ConvAddReLU(conv, relu=True).eval()


def test_module_computes_what_its_parts_do(block):
    conv, fused = block
    input, residual = torch.randn(2, 16, 33, 35), torch.randn(2, 24, 33, 35)
    expected = (conv(input) + residual).relu().detach()
    with torch.no_grad():
        for _ in range(2):  # the second call finds the packed weight
            torch.testing.assert_close(fused(input, residual), expected, rtol=0, atol=2e-5)
        assert fused._kept.packed.numel() > 0 or helpers.KERNELS == "cuda"  # which packs nothing


def test_module_is_differentiable(block):
    conv, fused = block
    input = torch.randn(2, 16, 9, 9, requires_grad=True)
    output = fused(input)
    (ours,) = torch.autograd.grad(output.sum(), input)
    (theirs,) = torch.autograd.grad(conv(input).relu().sum(), input)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "new data", "dtype"])
def test_changed_weights_are_seen(block, change):
    conv, fused = block
    input = torch.randn(2, 16, 33, 35)
    with torch.no_grad():
        before = fused(input)
        if change == "in place":
            fused.weight.mul_(2)
        elif change == "load_state_dict":
            fused.load_state_dict({name: value * 2 for name, value in fused.state_dict().items()})
        elif change == "new data":
            fused.weight.data = fused.weight.data * 2
        else:
            fused.double()
            input = input.double()
        after = fused(input)
        expected = conv(input).relu()
    assert change == "dtype" or not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)


def test_packed_weight_is_a_constant_of_a_trace(block):
    conv, fused = block
    input = torch.randn(2, 16, 33, 35)
    with torch.no_grad():
        traced = torch.jit.trace(fused, input)
        operators = {node.kind() for node in traced.graph.nodes()}
        assert "convlab::convolution_fused" in operators and "convlab::convolution_pack" not in operators
        torch.testing.assert_close(traced(input), conv(input).relu(), rtol=0, atol=2e-5)


@pytest.mark.skipif(helpers.KERNELS == "cuda", reason="the kernels for CUDA pack nothing")
def test_packed_weight_is_kept_where_nothing_is_trained(block):
    _, fused = block
    input = torch.randn(1, 16, 33, 35)
    fused(input)  # gradients are wanted
    assert fused._kept.packed is None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert fused(input).dtype == torch.bfloat16
        assert fused._kept.packed is None
    with torch.no_grad():
        fused(input)
        kept = fused._kept.packed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # past the short way
            fused(input)
        assert fused._kept.packed is kept
        for _ in range(2):
            fused(input)
            assert fused._kept.packed.data_ptr() == kept.data_ptr()


def test_memory_of_the_packed_weight_is_held(block):
    """It would else be given to another weight, which nothing would tell from the one that was packed."""
    _, fused = block
    input, other = torch.randn(1, 16, 33, 35), fused.weight.data.clone()
    with torch.no_grad():
        fused(input)
        memory = fused.weight.untyped_storage()._weak_ref()
        fused.weight.data = other
        assert not torch.UntypedStorage._expired(memory)
        fused(input)
        assert torch.UntypedStorage._expired(memory)
    torch.UntypedStorage._free_weak_ref(memory)


def test_packed_weight_leaves_with_training_copies_and_pickles(block):
    _, fused = block
    input = torch.randn(1, 16, 33, 35)
    with torch.no_grad():
        expected = fused(input)
        assert fused._kept.packed is not None
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert other._kept.packed is None
            assert torch.equal(other(input), expected)
    assert list(fused.state_dict()) == ["weight", "bias"]
    fused.train()
    assert fused._kept.packed is None


@pytest.mark.skipif(helpers.KERNELS == "cuda", reason="the kernels for CUDA pack nothing")
def test_packed_weight_follows_the_settings():
    fused = ConvAddReLU(nn.Conv2d(64, 64, 3, padding=1)).eval()
    input, options = torch.randn(2, 64, 33, 35), {"padding": 1}
    with torch.no_grad():
        exact = "amx" if torch_convlab.build_info()["multiplies_tiles"] else "implicit_gemm"
        for precision, algorithm in (("high", "winograd"), ("highest", exact)):
            expected = pack_weight(input, fused.weight, algorithm=algorithm, **options)
            with backends.flags(precision=precision):
                fused(input)
            packed = fused._kept.packed  # its header, of 64 bytes, says what it was packed for
            assert packed.numel() == expected.numel() > 64 and torch.equal(packed[:64], expected[:64])


def test_other_input_sizes(block):
    conv, fused = block
    with torch.no_grad():
        for size in ((1, 16, 5, 5), (3, 16, 40, 40), (1, 16, 5, 5)):
            input = torch.randn(size)
            torch.testing.assert_close(fused(input), conv(input).relu(), rtol=0, atol=2e-5)


def test_module_under_compile(block):
    conv, fused = block
    input = torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(input), conv(input).relu(), rtol=0, atol=2e-5)


def test_wrong_arguments(block):
    conv, _fused = block
    with pytest.raises(RuntimeError, match=r"expected residual of size .1, 24, 5, 5., but got"):
        conv_fused(torch.randn(1, 16, 5, 5), conv.weight.detach(), None, torch.randn(1, 24, 4, 5), padding=1)
    with pytest.raises(ValueError, match="pads with zeros"):
        ConvAddReLU(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="expected conv to be"):
        ConvAddReLU(nn.ReLU())
