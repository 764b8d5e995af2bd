"""Normalization against torch.nn in float64: values, first gradients, running statistics, NaN, views, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torch_convlab.functional as ours
from torch_convlab._activation import RELU6, Clamp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
OPS = torch.ops.convlab
EPS = 0.1  # for groups of two or three values, which may be nearly equal: no one computes those well

SHAPES = {
    "vectors": (37, 10),
    "one pixel": (7, 65, 1, 1),
    "1d": (3, 37, 7),
    "2d": (4, 6, 5, 7),
    "2d wide": (2, 64, 9, 9),
    "2d one sample": (1, 24, 8, 8),
    "2d blocks": (2, 3, 80, 90),  # several blocks of 4096 elements
    "2d rows": (300, 33, 1, 2),  # several blocks of rows
    "2d channels": (3, 1053, 2, 3),  # more than one row at a time
    "3d": (2, 10, 3, 4, 5),
}


def channels_last(tensor):
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if tensor.dim() < 3:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


FORMATS = {"channels_first": torch.Tensor.contiguous, "channels_last": channels_last}


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def sample(shape, dtype=torch.float64):
    return (normal(*shape) * 2 + 1).to(dtype)


def fused(function, relu, residual):
    """A torch batch norm followed by what ours fuses, in one signature: f(x, residual, *rest)."""

    def call(input, other, *arguments):
        output = function(input, *arguments)
        if residual:
            output = output + other
        return output.relu() if relu else output

    return call


BATCH_NORMS = {  # name: (ours, reference), both of (input, residual, running_mean, running_var, weight, bias, training)
    "batch_norm": (lambda x, r, *rest: ours.batch_norm(x, *rest), fused(F.batch_norm, False, False)),
    "batch_norm_relu": (lambda x, r, *rest: ours.batch_norm_relu(x, *rest), fused(F.batch_norm, True, False)),
    "batch_norm_add_relu": (ours.batch_norm_add_relu, fused(F.batch_norm, True, True)),
    "batch_norm_relu6": (
        lambda x, r, *rest: ours.batch_norm_fused(x, None, *rest, relu=RELU6),
        lambda x, r, *rest: F.relu6(F.batch_norm(x, *rest)),
    ),
    "batch_norm_add_hardtanh": (
        lambda x, r, *rest: ours.batch_norm_fused(x, r, *rest, relu=Clamp(-0.75, 0.5)),
        lambda x, r, *rest: F.hardtanh(F.batch_norm(x, *rest) + r, -0.75, 0.5),
    ),
}


def assert_close(actual, expected, tolerance, what):
    assert (actual is None) == (expected is None), what
    if actual is None:
        return
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}"
    )


def compare(function, reference, tensors, tolerance):
    """Outputs and gradients of `function` against `reference` in float64; tensors may be None."""

    def leaves(convert):
        return [None if t is None else convert(t.detach()).requires_grad_() for t in tensors]

    actual_leaves = leaves(lambda tensor: tensor.clone(memory_format=torch.preserve_format))
    expected_leaves = leaves(torch.Tensor.double)
    actual, expected = function(*actual_leaves), reference(*expected_leaves)
    assert_close(actual, expected, tolerance, "output")
    grad = normal(*actual.shape, seed=1).to(actual.dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    for index, (leaf, wanted) in enumerate(zip(actual_leaves, expected_leaves)):
        if leaf is not None and wanted.grad is not None:
            # Masks of values near zero may differ in 16 bits, and sums grow with their length.
            loose = 2.5 if leaf.dtype in (torch.bfloat16, torch.float16) else 2
            assert leaf.grad.dtype == leaf.dtype
            assert_close(leaf.grad, wanted.grad, tolerance * loose, f"gradient {index}")
    return actual


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm(name, shape, format, training):
    function, reference = BATCH_NORMS[name]
    channels = shape[1]
    statistics = (None, None) if training else (normal(channels), normal(channels).abs() + 0.5)
    for dtype in (torch.float64, torch.float32):
        input, residual = FORMATS[format](sample(shape, dtype)), normal(*shape, dtype=dtype, seed=2)
        weight, bias = normal(channels, dtype=dtype, seed=3), normal(channels, dtype=dtype, seed=4)
        running = [None if s is None else s.to(dtype) for s in statistics]
        running_double = [None if s is None else s.double() for s in running]
        output = compare(
            lambda x, r, w, b: function(x, r, *running, w, b, training),  # noqa: B023
            lambda x, r, w, b: reference(x, r, *running_double, w, b, training),  # noqa: B023
            [input, residual, weight, bias],
            TOLERANCE[dtype],
        )
        assert output.stride() == torch.empty_like(input).stride()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_batch_norm_of_16_bits(dtype, parameters, format):
    """Mixed (float32 weights) and pure; against float64 of the same rounded inputs, no mask near the kink."""
    shape = (3, 21, 6, 5)
    wide = dtype if parameters == "same" else torch.float32
    input = FORMATS[format](sample(shape, dtype))
    weight, bias = normal(21, dtype=wide, seed=3), normal(21, dtype=wide, seed=4)
    compare(
        lambda x, w, b: ours.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        [input, weight, bias],
        TOLERANCE[dtype],
    )
    running = normal(21, dtype=wide), normal(21, dtype=wide).abs() + 1
    compare(
        lambda x, w, b: ours.batch_norm(x, *running, w, b),
        lambda x, w, b: F.batch_norm(x, *(statistic.double() for statistic in running), w, b),
        [input, weight, bias],
        TOLERANCE[dtype],
    )
    output = ours.batch_norm_relu(input, None, None, weight, bias, True)
    expected = F.batch_norm(input.double(), None, None, weight.double(), bias.double(), True).relu()
    assert output.dtype == dtype
    assert_close(output, expected, TOLERANCE[dtype], "relu")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_norm(shape, format):
    channels = shape[1]
    pixels = torch.Size(shape[2:]).numel()
    for dtype in DTYPES:
        for wide in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
            input = FORMATS[format](sample(shape, dtype))
            weight, bias = normal(channels, dtype=wide, seed=3), normal(channels, dtype=wide, seed=4)
            for groups in {1, *(g for g in (2, 3, 5) if channels % g == 0), *([channels] if pixels > 1 else [])}:
                compare(
                    lambda x, w, b: ours.group_norm(x, groups, w, b, EPS),  # noqa: B023
                    lambda x, w, b: F.group_norm(x, groups, w, b, EPS),  # noqa: B023
                    [input, weight, bias],
                    TOLERANCE[dtype],
                )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_layer_norm(shape):
    for dtype in DTYPES:
        for count in range(1, len(shape)):
            normalized = shape[-count:]
            if torch.Size(normalized).numel() == 1:
                continue
            weight, bias = normal(*normalized, dtype=dtype, seed=3), normal(*normalized, dtype=dtype, seed=4)
            for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
                compare(
                    lambda x, w, b: ours.layer_norm(x, normalized, w, b, EPS),  # noqa: B023
                    lambda x, w, b: F.layer_norm(x, normalized, w, b, EPS),  # noqa: B023
                    [sample(shape, dtype), *parameters],
                    TOLERANCE[dtype],
                )


@pytest.mark.parametrize("eps", [EPS, None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rms_norm(shape, eps):
    for dtype in DTYPES:
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        exact_eps = torch.finfo(accumulation).eps if eps is None else eps
        for count in range(1, len(shape)):
            normalized = shape[-count:]
            for weight in (normal(*normalized, dtype=dtype, seed=3), None):
                compare(
                    lambda x, w: ours.rms_norm(x, normalized, w, eps),  # noqa: B023
                    lambda x, w: F.rms_norm(x, normalized, w, exact_eps),  # noqa: B023
                    [sample(shape, dtype), weight],
                    TOLERANCE[dtype],
                )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_batch_norm_statistics(shape, format):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        input = FORMATS[format](sample(shape, dtype) + 100)
        dims = [0, *range(2, len(shape))]
        variance, mean = torch.var_mean(input.double(), dims, correction=0)
        actual_mean, actual_variance = OPS.batch_norm_statistics(input)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert_close(actual_mean, mean, tolerance, "mean")
        assert_close(actual_variance, variance, tolerance * 10, "variance")


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    """torch's own bfloat16 layer norm is several percent off here."""
    input, grad = sample((4096, 48), torch.bfloat16), normal(4096, 48, dtype=torch.bfloat16, seed=1)
    weight = torch.ones(48, dtype=torch.bfloat16, requires_grad=True)
    ours.layer_norm(input, [48], weight).backward(grad)
    exact = weight.detach().double().requires_grad_()
    F.layer_norm(input.double(), [48], exact).backward(grad.double())
    assert_close(weight.grad, exact.grad, 0.004, "weight")  # half a unit in the last place of bfloat16


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 6, 5, 4), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(shape, affine):
    channels = shape[1]
    parameters = [normal(channels, seed=3), normal(channels, seed=4)] if affine else [None, None]
    running = [normal(channels), normal(channels).abs()], [normal(channels), normal(channels).abs()]
    for by_input in (True, False):
        compare(
            lambda x, w, b: ours.instance_norm(x, *running[0], w, b, by_input, 0.3),  # noqa: B023
            lambda x, w, b: F.instance_norm(x, *running[1], w, b, by_input, 0.3),  # noqa: B023
            [sample(shape), *parameters],
            1e-12,
        )
    torch.testing.assert_close(running[0], running[1])


@pytest.mark.parametrize("format", FORMATS)
def test_large_mean(format):
    """A mean of 1e4 with deviation 1 costs no more digits than rounding the input and the mean does."""
    input = FORMATS[format]((normal(8, 12, 40, 40) + 1e4).float())
    output, mean, variance, _ = OPS.batch_norm_train(input, None, None, None, None, None, 1e-5)
    exact_variance, exact_mean = torch.var_mean(input.double(), [0, 2, 3], correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=6e-8, atol=0)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-6, atol=0)
    exact = F.batch_norm(input.double(), None, None, training=True)
    torch_output = F.batch_norm(input, None, None, training=True)
    error, torch_error = (output - exact).abs().max(), (torch_output - exact).abs().max()
    assert error <= 1e-3 and error <= 2 * torch_error


@pytest.mark.parametrize("format", FORMATS)
def test_outliers_in_the_sample_that_sets_the_shift(format):
    input = normal(2, 4, 64, 64).float()
    input[:, :, :1] += 1e3  # the first rows of every channel, on which sums are centred
    input = FORMATS[format](input)
    _, mean, variance, _ = OPS.batch_norm_train(input, None, None, None, None, None, 1e-5)
    exact_variance, exact_mean = torch.var_mean(input.double(), [0, 2, 3], correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(variance.double(), exact_variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_nan_and_infinity(format, value):
    input = sample((2, 5, 6, 6), torch.float32)
    input[1, 2, 3, 4] = value
    input = FORMATS[format](input)
    running, expected_running = [torch.zeros(5), torch.ones(5)], [torch.zeros(5), torch.ones(5)]
    for training in (True, False):
        actual = ours.batch_norm_relu(input, *running, training=training)
        expected = F.batch_norm(input, *expected_running, training=training).relu()
        torch.testing.assert_close(actual, expected, equal_nan=True)
        grads = []
        for function in (ours.batch_norm, F.batch_norm):
            leaf = input.clone().requires_grad_()
            function(leaf, *(r.clone() for r in expected_running), training=training).sum().backward()
            grads.append(leaf.grad.nan_to_num(7.0))
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(running, expected_running, equal_nan=True)
    torch.testing.assert_close(ours.group_norm(input, 5), F.group_norm(input, 5), equal_nan=True)
    torch.testing.assert_close(ours.layer_norm(input, [6]), F.layer_norm(input, [6]), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0, 3)])
def test_empty(shape):
    running = [torch.full((shape[1],), 2.0), torch.full((shape[1],), 3.0)]
    input = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    output = ours.batch_norm_relu(input, *running, weight, torch.zeros(shape[1]), True)
    output.sum().backward()
    assert output.shape == shape and input.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[1]))
    assert torch.equal(running[0], torch.full((shape[1],), 2.0))
    assert ours.batch_norm(input, *running).shape == shape
    if len(shape) > 2:
        assert ours.group_norm(input, 1).shape == shape
        assert ours.instance_norm(input).shape == shape
    assert ours.layer_norm(input, shape[-1:]).shape == shape
    assert ours.rms_norm(input, shape[-1:]).shape == shape


def test_views():
    """Non-contiguous, expanded and permuted inputs give what their copies give."""
    base = sample((4, 6, 8, 10), torch.float32)
    views = [base[:, :, ::2, 1:9], base[:, 1::2], base.transpose(2, 3), base[:1].expand(3, -1, -1, -1), base[::2]]
    for view in views:
        for function in (
            lambda x: ours.batch_norm_relu(x, None, None, training=True),
            lambda x: ours.group_norm(x, 3),
            lambda x: ours.layer_norm(x, x.shape[-2:]),
        ):
            torch.testing.assert_close(function(view), function(view.contiguous()))
    input = base.clone().requires_grad_()
    ours.batch_norm(input, None, None, training=True).sum().backward()  # an expanded, zero-stride gradient
    assert input.grad.abs().max() < 1e-5


def test_same_bits_for_every_number_of_threads():
    calls = []
    for format in FORMATS.values():
        input, residual = format(sample((5, 48, 19, 23), torch.float32)), normal(5, 48, 19, 23, dtype=torch.float32)
        weight, grad = normal(48, dtype=torch.float32), normal(5, 48, 19, 23, dtype=torch.float32, seed=9)
        calls += [
            lambda x=input, r=residual, w=weight: OPS.batch_norm_train(x, w, None, r, 0.0, None, 1e-5, True),
            lambda x=input, r=residual, w=weight, g=grad: OPS.batch_norm_backward(
                g, x, w, None, w, w.abs() + 1, r, 0.0, None, True, 1e-5
            ),
            lambda x=input, w=weight: OPS.group_norm(x, w, None, 4, 1e-5),
            lambda x=input, w=weight, g=grad: OPS.group_norm_backward(
                g, x, w, None, x[:, :4, 0, 0], x[:, :4, 0, 0].abs() + 1, 4, 1e-5
            ),
        ]
    rows, grad = sample((1000, 200), torch.float32), normal(1000, 200, dtype=torch.float32)
    weight = normal(200, dtype=torch.float32)
    calls.append(lambda: OPS.layer_norm(rows, weight, None, [200], 1e-5))
    mean, variance = rows[:, 0], rows[:, 0].abs() + 1
    calls.append(lambda: OPS.layer_norm_backward(grad, rows, weight, weight, mean, variance, [200], 1e-5))
    calls.append(lambda: OPS.rms_norm_backward(grad, rows, weight, variance, [200], 1e-5))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([call() for call in calls])
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results):
        for parts in zip(one, two, three):
            assert torch.equal(parts[0], parts[1]) and torch.equal(parts[0], parts[2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bounds", [(0.0, None), (0.0, 1.0), (None, 0.25), (-0.5, 0.25)], ids=str)
@pytest.mark.parametrize("mark", [False, True], ids=["recomputed", "marked"])
def test_mask_is_that_of_the_output(format, bounds, mark):
    shape = 4, 35, 9, 9
    input, residual = FORMATS[format](sample(shape, torch.float32)), normal(*shape, dtype=torch.float32)
    output, mean, variance, stopped = OPS.batch_norm_train(input, None, None, residual, *bounds, 1e-5, mark)
    assert (stopped.numel() > 0) == mark
    rest = mean, variance, residual, *bounds, True, 1e-5, stopped
    mask = OPS.batch_norm_backward(torch.ones_like(input), input, None, None, *rest)[3]
    lower, upper = (torch.inf if bound is None else bound for bound in bounds)
    lower = -torch.inf if bounds[0] is None else lower
    assert torch.equal(mask, ((output > lower) & (output < upper)).float())
    assert 0.1 < mask.mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (4, 35, 9, 9), (2, 16, 8, 8), (1, 3, 2, 5, 7)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_marked_backward_is_the_recomputing_one(format, shape, dtype):
    """The bits of the forward pass stand for the residual: the same gradients to the bit, without reading it."""
    input, residual, grad = (FORMATS[format](normal(*shape, seed=seed).to(dtype)) for seed in (1, 2, 3))
    weight, bias = normal(shape[1], seed=4).to(dtype), normal(shape[1], seed=5).to(dtype)
    _, mean, variance, stopped = OPS.batch_norm_train(input, weight, bias, residual, 0.0, None, 1e-5, True)
    rest = 0.0, None, True, 1e-5
    wanted = OPS.batch_norm_backward(grad, input, weight, bias, mean, variance, residual, *rest)
    unread = torch.full_like(residual, torch.nan)
    found = OPS.batch_norm_backward(grad, input, weight, bias, mean, variance, unread, *rest, stopped)
    for one, other in zip(found, wanted):
        assert torch.equal(one, other)


def test_stopped_of_another_input_is_refused():
    input = normal(2, 16, 8, 8).float()
    _, mean, variance, stopped = OPS.batch_norm_train(input, None, None, input, 0.0, None, 1e-5, True)
    given = (
        (stopped[1:], input, 0.0), (stopped.float(), input, 0.0), (stopped, None, 0.0), (stopped, input, None),
    )  # fmt: skip
    for wrong, residual, lower in given:
        with pytest.raises(RuntimeError, match="expected stopped to be what batch_norm_train gave"):
            rest = residual, lower, None, True, 1e-5, wrong
            OPS.batch_norm_backward(input, input, None, None, mean, variance, *rest)


@pytest.mark.parametrize("format", FORMATS)
def test_gradient_at_the_bounds_and_of_nan_is_that_of_torch(format):
    """Every value that matters to the mask, in evaluation, where the output is the input."""
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-40, 3.0, 6.0, 7.0, torch.inf, torch.nan]).repeat(7)
    input, statistics = FORMATS[format](values.view(1, 2, 5, 7)), (torch.zeros(2), torch.ones(2))
    for residual in (None, torch.zeros_like(input)):
        for clamp, function in (
            (True, F.relu),
            (RELU6, F.relu6),
            (Clamp(-1.0, 3.0), lambda x: F.hardtanh(x, -1.0, 3.0)),
        ):
            leaf, expected_leaf = input.clone().requires_grad_(), input.clone().requires_grad_()
            output = ours.batch_norm_fused(leaf, residual, *statistics, eps=0.0, relu=clamp)
            expected = function(expected_leaf)
            torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
            output.sum().backward()
            expected.sum().backward()
            # torch's hardtanh passes the gradient of NaN in the elements after its last whole vector alone.
            expected_leaf.grad[input.isnan()] = 1.0
            torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=0, atol=0)
    with pytest.raises(ValueError, match="gradients pass at the bounds"):
        ours.batch_norm_fused(input, None, *statistics, relu=Clamp(0.0, 6.0, "clamp"))
