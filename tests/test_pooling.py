"""Max, average and adaptive pooling against torch in float64, and everything the operators promise besides."""

from __future__ import annotations

import itertools
import re

import numpy
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db

import torch_convlab.functional as ours
from torch_convlab.autograd import pooling

theirs = torch.nn.functional

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = {
    "halve": (2, 2, 0, 1, False),
    "alexnet": (3, 2, 0, 1, False),
    "resnet": (3, 2, 1, 1, False),
    "same": (3, 1, 1, 1, True),
    "gaps": (2, 3, 1, 1, True),
    "dilated": (3, 2, 1, 2, True),
    "dilated_s1": (3, 1, 0, 2, False),
    "identity": (1, 1, 0, 1, False),
    "sparse": (2, 4, 0, 1, False),
    "large": (5, 1, 2, 1, True),
    "long_stride": (3, 11, 1, 1, True),
    "half_padding": (4, 2, 2, 1, True),
}
SHAPES = {
    1: [(2, 3, 19), (1, 17, 40), (3, 2, 700)],
    2: [(2, 3, 9, 11), (1, 20, 13, 40), (2, 33, 7, 7), (1, 1, 5, 600)],
    3: [(2, 3, 5, 7, 9), (1, 17, 4, 6, 20)],
}


def fits(shape, window):
    kernel, _, padding, dilation, _ = window
    return min(shape[2:]) + 2 * padding >= dilation * (kernel - 1) + 1


CASES = [
    pytest.param(shape, window, id=f"{name}-{'x'.join(map(str, shape))}")
    for name, window in WINDOWS.items()
    for shapes in SHAPES.values()
    for shape in shapes
    if fits(shape, window)
]


def in_format(x, channels_last):
    if not channels_last:
        return x.contiguous()
    if x.dim() == 3:
        return x.unsqueeze(2).to(memory_format=torch.channels_last).squeeze(2)
    return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def make(shape, dtype, channels_last=False, seed=0):
    """Random values on a coarse grid, so that ties are frequent and exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return in_format(
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).round().div(4).to(dtype), channels_last
    )


def function(module, kind, x):
    return getattr(module, f"{kind}{x.dim() - 2}d")


def assert_close(actual, expected, tolerance, what=""):
    assert actual.shape == expected.shape, what
    actual, expected = actual.double(), expected.double()
    scale = max(1.0, expected.abs().nan_to_num(posinf=0).max().item() if expected.numel() else 1.0)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{what} {m}"
        )


def compare(kind, x, *arguments, exact=False, **keywords):
    """Output and gradient of our function, in the dtype of x, against torch's in float64."""
    mine, reference = x.clone().requires_grad_(), x.double().clone().requires_grad_()
    y = function(ours, kind, x)(mine, *arguments, **keywords)
    expected = function(theirs, kind, x)(reference, *arguments, **keywords)
    assert y.dtype == x.dtype
    tolerance = ROUNDING[x.dtype]
    assert_close(y, expected, 0 if exact else tolerance, "output")
    grad = make(expected.shape, x.dtype, seed=1)
    y.backward(grad)
    expected.backward(grad.double())
    assert_close(mine.grad, reference.grad, 2 * tolerance, "gradient")
    return y


@pytest.mark.parametrize("shape, window", CASES)
def test_max_pool(shape, window):
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        x = make(shape, dtype, channels_last)
        y = compare("max_pool", x, *window, exact=True)
        expected, expected_indices = function(theirs, "max_pool", x)(x.double(), *window, return_indices=True)
        output, indices = function(ours, "max_pool", x)(x, *window, return_indices=True)
        assert torch.equal(output.double(), expected)
        assert torch.equal(indices, expected_indices)
        with torch.no_grad():
            assert torch.equal(function(ours, "max_pool", x)(x, *window), y)


@pytest.mark.parametrize("shape, window", [case for case in CASES if case.values[1][3] == 1])
def test_avg_pool(shape, window):
    kernel, stride, padding, _, ceil_mode = window
    if len(shape) == 5 and min(shape[2:]) < kernel:
        pytest.skip("torch itself refuses kernels larger than the unpadded input in 3-D")
    for dtype, channels_last, include_pad in itertools.product(DTYPES, (False, True), (False, True)):
        compare("avg_pool", make(shape, dtype, channels_last), kernel, stride, padding, ceil_mode, include_pad)
    if len(shape) > 3:
        compare("avg_pool", make(shape, torch.float64), kernel, stride, padding, ceil_mode, divisor_override=-3)


@pytest.mark.parametrize("shape", [shape for shapes in SHAPES.values() for shape in shapes], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5, "same", "more"])
def test_adaptive(shape, size):
    size = {"same": min(shape[2:]), "more": min(shape[2:]) + 3}.get(size, size)
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        x = make(shape, dtype, channels_last)
        compare("adaptive_avg_pool", x, size)
        compare("adaptive_max_pool", x, size, exact=True)
        _, indices = function(ours, "adaptive_max_pool", x)(x, size, return_indices=True)
        assert torch.equal(indices, function(theirs, "adaptive_max_pool", x)(x.double(), size, return_indices=True)[1])


def test_mixed_arguments():
    x = make((2, 3, 11, 17), torch.float32)
    for channels_last in (False, True):
        x = in_format(x, channels_last)
        compare("max_pool", x, (3, 2), (1, 3), (1, 0), (2, 1), True)
        compare("max_pool", x, (2, 5), padding=(0, 2))
        compare("avg_pool", x, (3, 2), (1, 3), (1, 0))
        compare("adaptive_avg_pool", x, (None, 5))
        compare("adaptive_max_pool", x, (4, None))
        compare("adaptive_avg_pool", x, (11, 1))
        compare("max_pool", x, (11, 17))
        compare("avg_pool", x, (11, 17))


def test_windows_of_many_taps():
    """Taps that do not fit a byte, on every path: rows, single windows, channels_last."""
    x = make((1, 5, 40, 50), torch.float32)
    for channels_last, stride in itertools.product((False, True), (1, 20)):
        compare("max_pool", in_format(x, channels_last), 20, stride, 3, exact=True)
    compare("max_pool", make((2, 3, 9000), torch.float32), 5000, 1000, exact=True)
    compare("avg_pool", make((2, 3, 9000), torch.float32), 5000, 1000)
    compare("adaptive_max_pool", make((1, 2, 3000), torch.float32), 7, exact=True)


def test_lecture_golden_values():
    """Lecture items L10 and L11."""
    x = torch.tensor([[2.0, 3, 2, 4], [5, 6, 6, 8], [3, 2, 1, 0], [1, 2, 3, 4]])[None, None]
    assert ours.max_pool2d(x, 2, 2).tolist() == [[[[6, 8], [3, 4]]]]
    assert ours.avg_pool2d(x, 2, 2).tolist() == [[[[4, 5], [2, 2]]]]
    assert ours.max_pool2d(torch.zeros(1, 96, 55, 55), 3, 2).shape == (1, 96, 27, 27)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinity_and_ties(dtype, channels_last):
    nan, inf = float("nan"), float("inf")
    x = make((2, 19, 12, 37), dtype)
    x[0, 0, 3, 4] = x[0, 0, 3, 5] = x[1, 3, 0, 0] = x[1, 18, 11, 36] = nan
    x[0, 1] = -inf
    x[0, 2] = 1
    x[0, 4, 5, 5] = inf
    x = in_format(x, channels_last)
    for window in WINDOWS.values():
        expected, expected_indices = theirs.max_pool2d(x, *window, return_indices=True)
        output, indices = ours.max_pool2d(x, *window, return_indices=True)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        with torch.no_grad():
            torch.testing.assert_close(ours.max_pool2d(x, *window), expected, rtol=0, atol=0, equal_nan=True)
    output, indices = ours.adaptive_max_pool2d(x, 5, return_indices=True)
    expected, expected_indices = theirs.adaptive_max_pool2d(x, 5, return_indices=True)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    expected = theirs.avg_pool2d(x.double(), 3, 2, 1)
    torch.testing.assert_close(ours.avg_pool2d(x, 3, 2, 1).double(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_window_beside_the_input():
    """Padded taps that step over the whole input: the maximum of nothing, chosen from nowhere."""
    for channels_last in (False, True):
        x = in_format(torch.ones(1, 3, 1, 1), channels_last).requires_grad_()
        y = ours.max_pool2d(x, 2, 1, 1, 2)
        assert torch.equal(y, theirs.max_pool2d(x, 2, 1, 1, 2))
        y.sum().backward()
        assert x.grad.count_nonzero() == 0


FUNCTIONS = {
    "max": lambda module, x: function(module, "max_pool", x)(x, 3, 2, 1),
    "avg": lambda module, x: function(module, "avg_pool", x)(x, 3, 2, 1),
    "adaptive_max": lambda module, x: function(module, "adaptive_max_pool", x)(x, 3),
    "adaptive_avg": lambda module, x: function(module, "adaptive_avg_pool", x)(x, 3),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_shapes_and_strides(kind, spatial):
    call = FUNCTIONS[kind]
    base = make((4, 6, *[9] * spatial), torch.float64)
    views = {
        "empty batch": base[:0],
        "every second channel": base[:, ::2],
        "transposed": base.transpose(0, 1),
        "swapped axes": base.transpose(1, -1),
        "expanded": base[:1].expand_as(base),
        "broadcast channel": base[:, :1].expand_as(base),
        "offset": base[1:, 1:, 1:],
    }
    for name, view in views.items():
        x, reference = view.detach().requires_grad_(), view.detach().clone().requires_grad_()
        y, expected = call(ours, x), call(theirs, reference)
        assert_close(y, expected, 1e-12, name)
        y.sum().backward()
        expected.sum().backward()
        assert_close(x.grad, reference.grad, 1e-12, name)
    functional = {"max": "max_pool", "avg": "avg_pool"}.get(kind, f"{kind}_pool") + f"{spatial}d"
    assert_close(getattr(ours, functional)(base[0], 3), getattr(theirs, functional)(base[0], 3), 1e-12, "unbatched")


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("spatial", [2, 3])
def test_memory_format_is_kept(kind, spatial):
    """Also where torch forgets it: in 3-D it keeps channels_last in max pooling alone."""
    x = in_format(make((2, 5, *[9] * spatial), torch.float32), True).requires_grad_()
    y = FUNCTIONS[kind](ours, x)
    assert y.stride() == in_format(y, True).stride() != y.contiguous().stride()
    y.sum().backward()
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("channels", [1, 2])
def test_more_than_2_to_31_elements(channels):
    """Untouched pages of zeros, but for the last element."""
    length = (2**31 + 2**20) // channels // 4096 * 4096
    zeros = numpy.zeros((1, channels, length), dtype=numpy.uint16)
    zeros[0, -1, -1] = 0x4040  # 3.0 in bfloat16
    x = torch.from_numpy(zeros).view(torch.bfloat16)
    y, indices = ours.max_pool1d(x, 4096, return_indices=True)
    assert y[0, -1, -1] == 3 and y.count_nonzero() == 1
    assert indices[0, -1, -1] == length - 1 and indices[0, -1, 0] == 0
    assert ours.avg_pool1d(x, 4096)[0, -1, -1] == 3 / 4096


SMALL = {
    "max": lambda x: ours.max_pool2d(x, 3, 2, 1),
    "max dilated": lambda x: ours.max_pool2d(x, 2, 1, 1, 2),
    "max many taps": lambda x: ours.max_pool2d(x, 6, 1, 3),
    "adaptive max": lambda x: ours.adaptive_max_pool2d(x, (2, 4)),
    "avg": lambda x: ours.avg_pool2d(x, 3, 2, 1, True, False),
    "avg divisor": lambda x: ours.avg_pool2d(x, (2, 3), 1, (0, 1), divisor_override=5),
    "adaptive avg": lambda x: ours.adaptive_avg_pool2d(x, (2, 4)),
    "global avg": lambda x: ours.adaptive_avg_pool2d(x, 1),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_derivatives(name, channels_last):
    generator = torch.Generator().manual_seed(0)
    values = torch.randperm(2 * 3 * 5 * 6, generator=generator).double().view(2, 3, 5, 6) / 7  # no ties, no close calls
    x = in_format(values, channels_last).requires_grad_()
    assert gradcheck(SMALL[name], x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(SMALL[name], x, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("name", SMALL)
def test_functional_transforms(name):
    reference = {
        "max": lambda x: theirs.max_pool2d(x, 3, 2, 1),
        "max dilated": lambda x: theirs.max_pool2d(x, 2, 1, 1, 2),
        "max many taps": lambda x: theirs.max_pool2d(x, 6, 1, 3),
        "adaptive max": lambda x: theirs.adaptive_max_pool2d(x, (2, 4)),
        "avg": lambda x: theirs.avg_pool2d(x, 3, 2, 1, True, False),
        "avg divisor": lambda x: theirs.avg_pool2d(x, (2, 3), 1, (0, 1), divisor_override=5),
        "adaptive avg": lambda x: theirs.adaptive_avg_pool2d(x, (2, 4)),
        "global avg": lambda x: theirs.adaptive_avg_pool2d(x, 1),
    }[name]
    x = torch.randn(4, 2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = SMALL[name]
    assert_close(torch.func.vmap(call)(x), torch.func.vmap(reference)(x), 1e-12)
    assert_close(torch.func.vmap(call, in_dims=2)(x), torch.func.vmap(reference, in_dims=2)(x), 1e-12)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(call)(x[0]), torch.func.jacrev(reference)(x[0]), 1e-12)

    def energy(pool):
        return lambda x: pool(x).pow(3).sum()

    hessian = torch.func.hessian(energy(call))(x[0, :1, :1])
    assert_close(hessian, torch.func.hessian(energy(reference))(x[0, :1, :1]), 1e-10)
    per_example = torch.func.vmap(torch.func.grad(energy(call)))(x)
    assert_close(per_example, torch.func.vmap(torch.func.grad(energy(reference)))(x), 1e-10)


def test_vmap_of_indices():
    x = make((3, 2, 4, 6, 7), torch.float64)
    for pool in (lambda m: lambda x: m.max_pool2d(x, 2, return_indices=True)[1],
                 lambda m: lambda x: m.adaptive_max_pool2d(x, 4, return_indices=True)[1]):  # fmt: skip
        assert torch.equal(torch.func.vmap(pool(ours))(x), torch.func.vmap(pool(theirs))(x))


def operator_samples():
    ops = torch.ops.convlab
    windows = [3, 2], [2, 1], [1, 1], [1, 2], True
    for dtype, channels_last in ((torch.float64, False), (torch.float32, True)):
        x = in_format(torch.randn(2, 3, 7, 8, dtype=dtype), channels_last)
        y, taps = ops.max_pool(x, *windows, True)
        adaptive, adaptive_taps = ops.adaptive_max_pool(x, [3, 4], True)
        none = [], [], [], [], False
        x = x.requires_grad_()
        yield "max_pool", (x, *windows, True)
        yield "max_pool", (x.detach(), *windows, False)
        yield "adaptive_max_pool", (x, [3, 4], True)
        yield "max_pool_indices", (taps, [2, 3, 7, 8], *windows)
        yield "max_pool_indices", (adaptive_taps, [2, 3, 7, 8], *none)
        yield "max_pool_backward", (torch.randn_like(y).requires_grad_(), taps, [2, 3, 7, 8], *windows)
        yield "max_pool_backward", (torch.randn_like(adaptive).requires_grad_(), adaptive_taps, [2, 3, 7, 8], *none)
        yield "max_pool_gather", (x, taps, *windows)
        average = [3, 2], [2, 1], [1, 1], True, False, None
        yield "avg_pool", (x, *average)
        grad = torch.randn_like(ops.avg_pool(x.detach(), *average)).requires_grad_()
        yield "avg_pool_backward", (grad, [2, 3, 7, 8], *average)
        yield "adaptive_avg_pool", (x, [3, 4])
        yield "adaptive_avg_pool_backward", (torch.randn_like(adaptive).requires_grad_(), [2, 3, 7, 8])


@pytest.mark.parametrize("index", range(24))
def test_opcheck(index):
    name, arguments = list(operator_samples())[index]
    torch.library.opcheck(getattr(torch.ops.convlab, name).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def model(x):
        y, indices = ours.max_pool2d(x, 3, 2, 1, return_indices=True)
        y = ours.avg_pool2d(y, 2, 1, 1) + ours.adaptive_avg_pool2d(x, 1) + ours.adaptive_max_pool2d(x, 1)
        return y, indices

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 12, 14), (3, 3, 16, 10)):
        x = make(shape, torch.float64).requires_grad_()
        mine, expected = compiled(x), model(x)
        assert_close(mine[0], expected[0], 1e-12)
        assert torch.equal(mine[1], expected[1])
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mine[0], expected[0])]
        assert_close(*grads, 1e-12)
        with torch.no_grad():
            assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x)[0], expected[0], 1e-12)


def test_same_bits_for_every_number_of_threads():
    threads = torch.get_num_threads()
    calls = [
        (kind, x)
        for x in (make((5, 23, 45, 61), torch.float32), make((3, 7, 9, 30, 31), torch.float32))
        for kind in FUNCTIONS
    ]
    try:
        for kind, x in calls:
            for channels_last in (False, True):
                results = []
                for count in (1, 2, 3, 5):
                    torch.set_num_threads(count)
                    leaf = in_format(x, channels_last).requires_grad_()
                    y = FUNCTIONS[kind](ours, leaf)
                    (grad,) = torch.autograd.grad(y, leaf, torch.sin(y.detach()))
                    results.append((y, grad))
                for y, grad in results[1:]:
                    assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])
    finally:
        torch.set_num_threads(threads)


def test_taps_are_small_and_skipped_without_gradients():
    x = torch.randn(2, 3, 8, 8)
    assert torch.ops.convlab.max_pool(x, [2, 2], [2, 2], [0, 0], [1, 1], False, True)[1].dtype == torch.uint8
    assert torch.ops.convlab.max_pool(x, [2, 2], [2, 2], [0, 0], [1, 1], False, False)[1].numel() == 0
    assert not pooling.wants_taps(x) and pooling.wants_taps(x.clone().requires_grad_())
    leaf = x.clone().requires_grad_()
    output, _ = pooling.max_pool(leaf, [2, 2], [2, 2], [0, 0], [1, 1], False, False)
    with pytest.raises(RuntimeError, match="with_taps=False"):
        output.sum().backward()


def pool_infos():
    return [info for info in op_db if re.fullmatch(r"nn\.functional\.(adaptive_)?(max|avg)_pool\dd", info.name)]


@pytest.mark.parametrize("info", pool_infos(), ids=lambda info: info.name.split(".")[-1])
def test_samples_and_errors_of_torch(info):
    """The samples torch tests itself with, and its error inputs: same exception, a message that matches."""
    call = getattr(ours, info.name.split(".")[-1])
    samples = list(info.sample_inputs("cpu", torch.float64))
    for sample in samples[:: max(1, len(samples) // 150)]:  # the lists of max pooling are long products
        actual, expected = (f(sample.input, *sample.args, **sample.kwargs) for f in (call, info))
        for mine, reference in zip(*((v if isinstance(v, tuple) else (v,)) for v in (actual, expected)), strict=True):
            assert_close(mine, reference, 1e-12, f"{sample.args} {sample.kwargs}")
    if info.error_inputs_func is None:
        return
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            call(sample.input, *sample.args, **sample.kwargs)
