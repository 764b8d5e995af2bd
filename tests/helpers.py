"""What the tests share: operands of a case, float64 references by torch, tolerances, memory formats, comparison."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from cases import ConvCase

import torch_convlab
from torch_convlab import autograd

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = ("channels_first", "channels_last")
ALGORITHMS = (*torch_convlab.algorithms(), "auto")
# Those that compute every geometry; algorithms for single shapes of kernel refuse.
ANY_GEOMETRY = ("naive", "implicit_gemm", "auto")
KERNELS = "cpu"  # whose kernels run where a test does not say so: conftest.py sets it from --device

# The naive algorithm does not get problems of more multiply-adds than this: it would take seconds.
NAIVE_LIMIT = 10_000_000

# --- Tolerances -----------------------------------------------------------------------------------------------------
#
# A result is compared with torch in float64 on the same operands (rounded to the dtype under test first), so the only
# errors are those of summing in the accumulation type and of rounding once to the dtype. With u the unit roundoff of
# the accumulation type (half its eps) and L the number of products summed, a sum in any order has a worst-case error
# of L*u relative to the sum of magnitudes; rounding errors of random sign give sqrt(L)*u relative to the results
# themselves. The bound on every element is therefore
#
#     FACTOR[algorithm] * (2 + sqrt(L)) * u * scale    +    u_dtype * |reference|    (second part: 16-bit dtypes)
#
# scale is max|reference|, but at least what a sum of L random products amounts to: with few results, all of them may
# cancel. In float64 the reference has errors of its own: twice the bound. FACTOR 1 is for plain sums (the worst
# measured over all cases is 0.8 of the bound). Algorithms that transform their operands first lose what the
# transforms' condition number says and have a row of their own here (measured for winograd: 3.3, with stride 2: 2.3;
# for strassen: 2.0). For amx each product of float32 is six, all rounded into the same sum (measured: 1.4).
# On CUDA, float32 is split into two tf32 numbers of 11 bits each and the product of the small halves is dropped, which
# leaves 22 bits of 24 (measured in the emulator: 0.9, for winograd 5.3; tensor cores round their sums less well).
FACTOR = {"winograd": 5.0, "strassen": 3.0, "amx": 2.0}
FACTOR_OF_SPLIT_FLOAT32 = {"implicit_gemm": 4.0, "winograd": 8.0}
ACCUMULATION = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def bound(
    algorithm: str, dtype: torch.dtype, reduction: int, reference: torch.Tensor, typical: float, on: str | None = None
) -> torch.Tensor:
    """The largest error allowed for each element of a result whose float64 value is `reference`; see above."""
    unit = torch.finfo(ACCUMULATION[dtype]).eps / (1 if dtype == torch.float64 else 2)
    factors = FACTOR_OF_SPLIT_FLOAT32 if (on or KERNELS) == "cuda" and dtype == torch.float32 else FACTOR
    factor = max(factors.values()) if algorithm == "auto" else factors.get(algorithm, 1.0)
    scale = max(reference.abs().max().item(), typical) if reference.numel() else typical
    allowed = torch.full_like(reference, factor * (2 + math.sqrt(reduction)) * unit * scale)
    if dtype != ACCUMULATION[dtype]:
        info = torch.finfo(dtype)
        allowed += info.eps / 2 * reference.abs() + info.smallest_normal * info.eps / 2
    return allowed


def assert_within(actual: torch.Tensor, reference: torch.Tensor, allowed: torch.Tensor, what: str) -> None:
    """Fails unless |actual - reference| <= allowed everywhere; the message says how far off, and where."""
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if not actual.numel():
        return
    error = (actual.double() - reference).abs()
    worst = (error / allowed).nan_to_num(math.inf).argmax()
    position = tuple(index.item() for index in torch.unravel_index(worst, error.shape))
    assert bool((error <= allowed).all()), (
        f"{what}: {int((~(error <= allowed)).sum())} of {error.numel()} elements are off; the worst, at {position}, is "
        f"{actual[position].item()}, expected {reference[position].item()} within {allowed[position].item():.3g}"
    )


def assert_exact(algorithm: str, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """For operands of small integers, whose sums no order of additions rounds: equal, or nearly so where an
    algorithm transforms its operands."""
    if algorithm in FACTOR or algorithm == "auto":
        allowed = torch.full_like(expected, 1e-5 * (1 + expected.abs().max().item()), dtype=torch.float64)
        assert_within(actual, expected.double(), allowed, what)
    else:
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert torch.equal(actual.double(), expected.double()), f"{what}: not exact"


# --- Tensors --------------------------------------------------------------------------------------------------------


def in_format(tensor: torch.Tensor, format: str) -> torch.Tensor:
    """A copy of `tensor` laid out in `format`; N x C x L is laid out as its N x C x 1 x L twin."""
    if format == "channels_first":
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.dim() == 3:
        return in_format(tensor.unsqueeze(2), format).squeeze(2)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[tensor.dim()]
    return tensor.clone(memory_format=last)


def meaningful_strides(tensor: torch.Tensor) -> list[int | None]:
    """Strides, None along axes of one element, where any number means the same."""
    if not tensor.numel():
        return [None] * tensor.dim()
    return [stride if size > 1 else None for size, stride in zip(tensor.shape, tensor.stride())]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in some order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def assert_same_layout(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, torch gives {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, torch gives {tuple(theirs.shape)}"
    assert meaningful_strides(ours) == meaningful_strides(theirs), (
        f"{what}: strides {ours.stride()}, torch gives {theirs.stride()} (shape {tuple(ours.shape)})"
    )


# --- Convolutions ---------------------------------------------------------------------------------------------------


def operands(case: ConvCase, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Normal random input, weight, bias (None without) and grad_output of a case, the same values every time."""
    # Tensors of their own: who wants gradients of them must not leave that to the next test.
    return {name: None if value is None else value.detach() for name, value in _drawn(case, dtype).items()}


@functools.cache
def _drawn(case: ConvCase, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    random = torch.Generator().manual_seed(sum(case.name.encode()))

    def draw(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    return {
        "input": draw(*case.input),
        "weight": draw(*case.weight),
        "bias": draw(case.out_channels) if case.bias else None,
        "grad_output": draw(*case.output),
    }


def laid_out(case: ConvCase, dtype: torch.dtype, format: str) -> dict[str, torch.Tensor | None]:
    """operands(case, dtype) with everything but the bias in `format`."""
    return {
        name: value if value is None or name == "bias" else in_format(value, format)
        for name, value in operands(case, dtype).items()
    }


def torch_convolution(case: ConvCase, input, weight, bias):
    """The case computed by torch.nn.functional."""
    return call_convolution(torch.nn.functional, case, input, weight, bias)


def call_convolution(functional, case: ConvCase, input, weight, bias, **keywords):
    """The case computed by `functional`: torch.nn.functional or torch_convlab.functional."""
    if case.transposed:
        function = getattr(functional, f"conv_transpose{case.dims}d")
        rest = case.stride, case.padding, case.output_padding, case.groups, case.dilation
    else:
        function = getattr(functional, f"conv{case.dims}d")
        rest = case.stride, case.padding, case.dilation, case.groups
    return function(input, weight, bias, *rest, **keywords)


@functools.cache
def reference(case: ConvCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Results of all passes on operands(case, dtype), by torch in float64."""
    double = {name: None if value is None else value.double() for name, value in operands(case, dtype).items()}
    input, weight = double["input"].requires_grad_(), double["weight"].requires_grad_()
    output = torch_convolution(case, input, weight, double["bias"])
    grad_input, grad_weight = torch.autograd.grad(output, (input, weight), double["grad_output"])
    return {"forward": output.detach(), "backward_input": grad_input, "backward_weight": grad_weight}


def refusal(
    case: ConvCase,
    algorithm: str,
    pass_: str = "forward",
    dtype: torch.dtype = torch.float32,
    on: str | None = None,
    format: str | None = None,
) -> str | None:
    """Why the algorithm does not compute a pass of this case on the device, or None. Without `format`: in neither."""
    if algorithm == "auto":
        return None
    formats = FORMATS if format is None else (format,)
    reasons = [choice(case, pass_, dtype, on, format=each).verdicts[algorithm].refusal for each in formats]
    return None if None in reasons else reasons[0]


def choice(
    case: ConvCase,
    pass_: str = "forward",
    dtype: torch.dtype = torch.float32,
    on: str | None = None,
    packed: bool = False,
    format: str = "channels_first",
) -> torch_convlab.choice.Choice:
    """What explain_convolution says of a pass of this case on the device."""
    if case.transposed:  # the adjoint: see run_pass
        pass_ = {"forward": "backward_input", "backward_input": "forward"}.get(pass_, pass_)
    input_size, weight_size = (case.output if case.transposed else case.input), case.weight
    return torch_convlab.explain_convolution(
        input_size,
        weight_size,
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
        pass_=pass_,
        dtype=dtype,
        device=on or KERNELS,
        packed=packed,
        memory_format=torch.channels_last if format == "channels_last" else torch.contiguous_format,
    )


def run_pass(case: ConvCase, pass_: str, algorithm: str, input, weight, bias, grad_output) -> torch.Tensor:
    """One pass of a case by one algorithm."""
    parameters = list(case.stride), list(case.padding), list(case.dilation), case.groups, algorithm
    # A transposed convolution is the adjoint of a convolution that reads its output and writes its input.
    if pass_ == "backward_weight":
        large, small = (grad_output, input) if case.transposed else (input, grad_output)
        return autograd.convolution_backward_weight(small, large, list(weight.shape), *parameters)
    if (pass_ == "forward") != case.transposed:
        small_from = input if pass_ == "forward" else grad_output
        return autograd.convolution(small_from, weight, bias if pass_ == "forward" else None, *parameters)
    large_from, size = (input, case.output) if pass_ == "forward" else (grad_output, case.input)
    bias = bias if pass_ == "forward" else None
    return autograd.convolution_backward_input(large_from, weight, bias, list(size), *parameters)


def typical_magnitude(case: ConvCase, pass_: str) -> float:
    """Root mean square of a sum of as many products of normal numbers as the pass sums."""
    return math.sqrt(case.reduction(pass_))


def check_pass(
    case: ConvCase, pass_: str, algorithm: str, dtype: torch.dtype, actual: torch.Tensor, on: str | None = None
) -> None:
    """Fails unless `actual` is the pass's result on operands(case, dtype) within the tolerance."""
    assert actual.dtype == dtype
    expected = reference(case, dtype)[pass_]
    allowed = bound(algorithm, dtype, case.reduction(pass_), expected, typical_magnitude(case, pass_), on)
    assert_within(actual, expected, allowed, f"{case} {pass_} by {algorithm}")


# --- Processes ------------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter that finds this checkout first; fails if it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
