"""The short way past the dispatcher (csrc/python_call.cpp): same results, same errors, taken only where it may be."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_convlab.functional as F
from torch_convlab import _C

X, W, B = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), torch.randn(6)
PARAMETERS = [2, 1], [1, 0], [1, 2], 2, "auto"


def short_way(input=X, weight=W, bias=B, dimensions=2, parameters=PARAMETERS):
    return _C.convolution(dimensions, input, weight, bias, None, None, None, None, *parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_as_the_operators(dtype):
    x, w, b = X.to(dtype), W.to(dtype), B.to(dtype)
    expected = torch.ops.convlab.convolution(x, w, b, *PARAMETERS)
    torch.testing.assert_close(short_way(x, w, b), expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        _C.convolution_backward_input(2, grad, w, None, list(x.shape), *PARAMETERS),
        torch.ops.convlab.convolution_backward_input(grad, w, None, list(x.shape), *PARAMETERS), rtol=0, atol=0,
    )  # fmt: skip
    torch.testing.assert_close(
        _C.convolution_backward_weight(2, grad, x, list(w.shape), *PARAMETERS),
        torch.ops.convlab.convolution_backward_weight(grad, x, list(w.shape), *PARAMETERS), rtol=0, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_one_integer_for_all_axes(spatial):
    x, w = torch.randn(1, 2, *[7] * spatial), torch.randn(3, 2, *[3] * spatial)
    expected = torch.ops.convlab.convolution(x, w, None, [2] * spatial, [1] * spatial, [1] * spatial, 1, "auto")
    actual = short_way(x, w, None, spatial, (2, 1, (1,) * spatial, 1, "auto"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_residual_and_relu():
    plain = short_way()
    residual = torch.randn_like(plain)
    actual = _C.convolution(2, X, W, B, residual, None, 0.0, None, *PARAMETERS)
    torch.testing.assert_close(actual, (plain + residual).relu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_taken_for_parameters_that_nobody_differentiates(context):
    with context():
        output = short_way(weight=torch.nn.Parameter(W))
    assert output is not NotImplemented and not output.requires_grad
    assert output.is_inference() == (context is torch.inference_mode)


class _Subclass(torch.Tensor):
    pass


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16), _FunctionMode, _DispatchMode,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["autocast", "function mode", "dispatch mode", "profiler"],
)  # fmt: skip
def test_not_taken_under(context):
    with context():
        assert short_way() is NotImplemented
    assert short_way() is not NotImplemented


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight": W.clone().requires_grad_()}, {"input": X.as_subclass(_Subclass)}, {"input": X.to("meta")},
        {"input": X.to_sparse()}, {"input": torch._neg_view(X)}, {"input": X.numpy()}, {"bias": 3}, {"dimensions": 3},
        {"input": X[0]}, {"parameters": ["same", [1, 0], [1, 2], 2, "auto"]},
        {"parameters": [[2.0, 1], [1, 0], [1, 2], 2, "auto"]}, {"parameters": [[2, 1, 1], [1, 0], [1, 2], 2, "auto"]},
        {"parameters": [1 << 70, 0, 1, 2, "auto"]}, {"parameters": [1, 0, 1, 2, None]}, {"parameters": [1, 0, 1, 2]},
    ],
    ids=[
        "requires_grad", "subclass", "meta", "sparse", "negative view", "array", "bias", "dimensions", "unbatched",
        "text", "float", "length", "overflow", "algorithm", "too few",
    ],
)  # fmt: skip
def test_not_taken_for(arguments):
    assert short_way(**arguments) is NotImplemented


def test_not_taken_for_tangents():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert short_way(dual) is NotImplemented


def test_not_taken_by_transforms():
    taken = []

    def call(x):
        taken.append(short_way(x.unsqueeze(0)) is not NotImplemented)
        return F.conv2d(x.unsqueeze(0), W, B, *PARAMETERS[:-1]).squeeze(0)

    expected = F.conv2d(X, W, B, *PARAMETERS[:-1])
    torch.testing.assert_close(torch.func.vmap(call)(X), expected)
    assert taken == [False]


@pytest.mark.parametrize(
    "arguments",
    [{"weight": W[:, :1]}, {"bias": B[:5]}, {"weight": W.double()}, {"parameters": [0, 0, 1, 2, "auto"]},
     {"parameters": [1, 0, 1, 2, "winograd"]}, {"parameters": [1, 0, 1, 2, "fft"]},
     {"input": X.int(), "weight": W.int()}],
    ids=["channels", "bias", "dtype", "stride", "refused", "unknown", "integers"],
)  # fmt: skip
def test_same_errors_as_the_operator(arguments):
    if "parameters" in arguments and "winograd" in arguments["parameters"]:
        arguments = {"weight": torch.randn(6, 2, 1, 1), **arguments}
    call = {"input": X, "weight": W, "bias": None, "parameters": PARAMETERS, **arguments}
    listed = [[value] * 2 if isinstance(value, int) else value for value in call["parameters"][:3]]
    with pytest.raises(Exception) as expected:
        torch.ops.convlab.convolution(call["input"], call["weight"], call["bias"], *listed, *call["parameters"][3:])
    with pytest.raises(type(expected.value)) as actual:
        short_way(**call)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_functions_take_it(monkeypatch):
    """What the tests above show of the functions of _C holds for what users call."""
    results = []

    class Spy:
        def __getattr__(self, name):
            def call(*arguments):
                results.append((name, getattr(_C, name)(*arguments) is not NotImplemented))
                return getattr(_C, name)(*arguments)

            return call

    for module in ("torch_convlab.functional.convolution", "torch_convlab.autograd.convolution"):
        monkeypatch.setattr(sys.modules[module], "_C", Spy())
    F.conv2d(X, W, B, groups=2)
    assert results == [("convolution", True)]
    results.clear()
    weight = W.clone().requires_grad_()
    F.conv2d(X, weight, B, groups=2).sum().backward()
    assert ("convolution", True) in results and results[-1] == ("convolution_backward_weight", True)


POOLED = torch.randn(2, 3, 9, 8)
POOLINGS = {  # the arguments of the operator and its gradient; stride may be None in the first
    "max_pool": [[3, 2], None, [1, 0], [1, 2], True, True],
    "avg_pool": [[3, 2], None, [1, 0], True, False, 5],
    "adaptive_avg_pool": [[3, 5]],
}


def _listed(arguments):
    return [arguments[0] if value is None and index == 1 else value for index, value in enumerate(arguments)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_has_the_same_bits_as_the_operators(name, dtype):
    ops, input = torch.ops.convlab, POOLED.to(dtype)
    for x in (input, input.contiguous(memory_format=torch.channels_last)):
        actual = getattr(_C, name)(x, *POOLINGS[name])
        expected = getattr(ops, name)(x, *_listed(POOLINGS[name]))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        output, *taps = expected if name == "max_pool" else [expected]
        rest = [] if name == "adaptive_avg_pool" else _listed(POOLINGS[name])
        rest = rest[:-1] if name == "max_pool" else rest
        arguments = torch.randn_like(output), *taps, list(x.shape), *rest
        actual, expected = (getattr(where, f"{name}_backward")(*arguments) for where in (_C, ops))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_is_not_taken_for(name):
    def call(input=POOLED, arguments=POOLINGS[name]):
        return getattr(_C, name)(input, *arguments)

    assert call() is not NotImplemented
    first = POOLINGS[name][0]
    odd = [POOLED.clone().requires_grad_(), POOLED[0, 0], POOLED.to("meta"), POOLED.as_subclass(_Subclass), 3, None]
    assert all(call(input) is NotImplemented for input in odd)
    for other in ([*first, 1], [1.5, 2], "11", None):
        assert call(arguments=[other, *POOLINGS[name][1:]]) is NotImplemented
    assert call(arguments=POOLINGS[name][:-1]) is NotImplemented
    with _FunctionMode():
        assert call() is NotImplemented


@pytest.mark.parametrize("call", [
    lambda x: F.max_pool2d(x, 2, padding=2), lambda x: F.avg_pool2d(x, 0), lambda x: F.max_pool2d(x, 20),
    lambda x: F.max_pool2d(x.int(), 2), lambda x: F.adaptive_avg_pool2d(x, -1), lambda x: F.max_pool2d(x[0, 0], 2),
    lambda x: F.avg_pool2d(x, 2, divisor_override=0),
])  # fmt: skip
def test_pooling_has_the_same_errors_as_the_usual_way(call):
    with pytest.raises(Exception) as expected, _FunctionMode():
        call(POOLED)
    with pytest.raises(type(expected.value)) as actual:
        call(POOLED)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


SCALE, SHIFT, MEAN, VARIANCE = torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3) + 0.5
LINE = torch.randn(8)
NORMALIZATIONS = {  # the arguments of the operator behind the input, and how its gradient takes its results
    "batch_norm_train": [SCALE, SHIFT, torch.randn_like(POOLED), 0.0, None, 1e-5, True],
    "batch_norm_eval": [None, SHIFT, MEAN, VARIANCE, None, None, 6.0, 0.0],
    "group_norm": [SCALE, None, 3, 1e-5],
    "layer_norm": [LINE, LINE, [8], 1e-5],
    "rms_norm": [LINE, [8], 1e-6],
}
NORMALIZATION_GRADIENTS = {
    "batch_norm_backward": [SCALE, SHIFT, MEAN, VARIANCE, torch.randn_like(POOLED), 0.0, None, True, 1e-5, None],
    "group_norm_backward": [SCALE, None, torch.randn(2, 3), torch.rand(2, 3), 3, 1e-5],
    "layer_norm_backward": [LINE, LINE, torch.randn(2, 3, 9, 1), torch.rand(2, 3, 9, 1), [8], 1e-5],
    "rms_norm_backward": [LINE, torch.rand(2, 3, 9, 1), [8], 1e-6],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*NORMALIZATIONS, *NORMALIZATION_GRADIENTS])
def test_normalization_has_the_same_bits_as_the_operators(name, dtype):
    def cast(values):
        return [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in values]

    inputs = [POOLED] if name in NORMALIZATIONS else [torch.randn_like(POOLED), POOLED]
    arguments = cast([*inputs, *(NORMALIZATIONS | NORMALIZATION_GRADIENTS)[name]])
    actual, expected = (getattr(where, name)(*arguments) for where in (_C, torch.ops.convlab))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    odd = [arguments[0].clone().requires_grad_(), POOLED.to("meta"), POOLED.as_subclass(_Subclass), 3, None]
    assert all(getattr(_C, name)(input, *arguments[1:]) is NotImplemented for input in odd)
    assert getattr(_C, name)(*arguments[:-1]) is NotImplemented
    assert getattr(_C, name)(*arguments, 1) is NotImplemented
    with _DispatchMode():
        assert getattr(_C, name)(*arguments) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_statistics(dtype):
    running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    statistics = MEAN.to(dtype), VARIANCE.to(dtype)
    versions = [tensor._version for tensor in running]
    assert _C.update_running(*running, *statistics, 5, 0.25) is None
    torch.testing.assert_close(running[0], 0.25 * statistics[0])
    torch.testing.assert_close(running[1], 0.75 + 0.25 * 1.25 * statistics[1])
    assert [tensor._version for tensor in running] == [version + 1 for version in versions]


def test_running_statistics_are_left_to_torch():
    def call(first=MEAN, momentum=0.1, count=5):
        return _C.update_running(first, VARIANCE, torch.ones(3), torch.ones(3), count, momentum)

    before = MEAN.clone(), VARIANCE.clone()
    odd = [MEAN.half(), MEAN.double(), torch.ones(6)[::2], torch.ones(4), torch.nn.Parameter(MEAN), MEAN.to("meta")]
    assert all(call(first) is NotImplemented for first in odd)
    assert call(momentum=1) is NotImplemented and call(count=1) is NotImplemented
    with _DispatchMode():
        assert call() is NotImplemented
    with torch.inference_mode():
        assert call(MEAN.clone()) is NotImplemented
    torch.testing.assert_close((MEAN, VARIANCE), before, rtol=0, atol=0)


def test_a_linear_layer_is_one_step_of_autograd():
    x, w, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 4), (5, 4), (5,)))
    output = F.linear(x, w, b)
    assert output.grad_fn.name() == "LinearBackward"
    assert {node.name() for node, _ in output.grad_fn.next_functions} == {"torch::autograd::AccumulateGrad"}
    assert torch.autograd.gradcheck(F.linear, (x, w, b)) and torch.autograd.gradgradcheck(F.linear, (x, w, b))
    assert torch.autograd.gradcheck(F.linear, (x, w, b), check_batched_grad=True)
    for context in (contextlib.nullcontext, _DispatchMode):  # past the dispatcher, and not
        with context():
            changed = F.linear(x, w, b).relu_()
        torch.testing.assert_close(changed, output.relu())
        (grad,) = torch.autograd.grad(changed.sum(), w)
        torch.testing.assert_close(grad, torch.autograd.grad(output.relu().sum(), w, retain_graph=True)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(F.linear(dual, w, b)).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ w.T)


@contextlib.contextmanager
def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_releases_the_interpreter():
    """Other Python threads run while a convolution computes."""
    import threading
    import time

    x, w = torch.randn(4, 64, 96, 96), torch.randn(64, 64, 5, 5)
    with _threads(1):
        F.conv2d(x, w)
        ticks, stop = [], threading.Event()

        def tick():
            while not stop.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        thread = threading.Thread(target=tick)
        thread.start()
        begin = time.perf_counter()
        F.conv2d(x, w)
        end = time.perf_counter()
        stop.set()
        thread.join()
    assert sum(begin < moment < end for moment in ticks) > 3, "the lock was held for the whole call"
