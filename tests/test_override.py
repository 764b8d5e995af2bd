"""override(): what is routed, and that nothing of it stays behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_convlab
from torch_convlab import models


def names(function, *arguments) -> set[str]:
    with torch_convlab.override() as routed:
        function(*arguments)
    return set(routed.calls)


@pytest.mark.parametrize("train", [False, True])
def test_a_model_of_torch_layers_computes_the_same(train):
    """Outputs, gradients and running statistics are those of `convert`, whose layers call the same functions."""
    torch.manual_seed(0)
    model = models.resnet18(layers=nn).train(train)
    twin = models.resnet18(layers=nn).train(train)
    twin.load_state_dict(model.state_dict())
    torch_convlab.convert(twin)
    inputs = torch.randn(2, 3, 64, 64)
    with torch_convlab.override() as routed:
        output = model(inputs)
        output.square().sum().backward()
    expected = twin(inputs)
    expected.square().sum().backward()
    assert routed.calls == {
        "conv2d": 20, "batch_norm": 20, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "linear": 1,
    }  # fmt: skip
    assert torch.equal(output, expected)
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters()):
        assert torch.equal(one.grad, other.grad), name
    for (name, one), (_, other) in zip(model.named_buffers(), twin.named_buffers()):
        assert torch.equal(one, other), name


def test_it_is_our_kernel_that_runs():
    """The graph holds this library's Function inside, and torch's again outside."""
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3, requires_grad=True)
    outside = type(F.conv2d(input, weight).grad_fn).__name__
    with torch_convlab.override():
        inside = type(F.conv2d(input, weight).grad_fn).__name__
        with torch_convlab.override():
            assert type(F.conv2d(input, weight).grad_fn).__name__ == inside
        assert type(torch.conv2d(input, weight, stride=2).grad_fn).__name__ == inside
    assert type(F.conv2d(input, weight).grad_fn).__name__ == outside != inside


CALLS = {
    "conv1d": lambda f: f.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3), padding=1),
    "conv3d": lambda f: f.conv3d(torch.ones(1, 2, 5, 4, 3), torch.ones(3, 2, 3, 2, 1)),
    "conv_transpose2d": lambda f: f.conv_transpose2d(torch.ones(1, 2, 5, 5), torch.ones(2, 3, 3, 3), stride=2),
    "linear": lambda f: F.linear(torch.ones(4, 3), torch.ones(2, 3), bias=torch.ones(2)),
    "max_pool2d": lambda f: f.max_pool2d(torch.arange(32.0).view(1, 2, 4, 4), 2),
    "max_pool1d": lambda f: f.max_pool1d(torch.arange(8.0).view(1, 2, 4), 2, stride=1),
    "avg_pool1d": lambda f: f.avg_pool1d(torch.arange(8.0).view(1, 2, 4), 2),
    "adaptive_avg_pool1d": lambda f: f.adaptive_avg_pool1d(torch.arange(8.0).view(1, 2, 4), 3),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("namespace", [torch, F], ids=["torch", "functional"])
def test_functions_are_routed_under_both_names(name, namespace):
    expected = CALLS[name](namespace)
    with torch_convlab.override() as routed:
        actual = CALLS[name](namespace)
    assert set(routed.calls) == {name}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_replaced_function_is_known():
    """Each of `torch.nn.functional` that this library has, by layers, so that a renamed one is noticed."""
    image, volume, line = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6, 6), torch.randn(2, 4, 6)
    for suffix, input in (("1d", line), ("2d", image), ("3d", volume)):
        for layer in (
            getattr(nn, f"Conv{suffix}")(4, 4, 3), getattr(nn, f"ConvTranspose{suffix}")(4, 4, 3),
            getattr(nn, f"MaxPool{suffix}")(2), getattr(nn, f"AvgPool{suffix}")(2),
            getattr(nn, f"AdaptiveMaxPool{suffix}")(2), getattr(nn, f"AdaptiveAvgPool{suffix}")(2),
            getattr(nn, f"BatchNorm{suffix}")(4), getattr(nn, f"InstanceNorm{suffix}")(4),
            nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 2),
        ):  # fmt: skip
            expected = layer(input)
            with torch_convlab.override() as routed:
                actual = layer(input)
            assert sum(routed.calls.values()) == 1, layer
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch_convlab.override() as routed:
        _, indices = nn.MaxPool2d(2, return_indices=True)(image)
        assert indices.dtype == torch.int64 and routed.calls.total() == 1


def test_native_normalization():
    input, weight = torch.randn(3, 4, 5), torch.rand(4)
    calls = [
        lambda: torch.batch_norm(input, weight, weight, torch.zeros(4), torch.ones(4), True, 0.1, 1e-5, False),
        lambda: torch.instance_norm(input, weight, weight, None, None, True, 0.1, 1e-5, False),
        lambda: torch.group_norm(input, 2, weight, weight),
        lambda: torch.layer_norm(input, [5]),
    ]
    for call in calls:
        expected = call()
        with torch_convlab.override() as routed:
            torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5)
        assert routed.calls.total() == 1


def test_what_this_library_does_not_compute_stays_with_torch():
    class Tagged(torch.Tensor):
        pass

    weight = torch.ones(1, 1, 2)
    assert not names(F.conv1d, torch.ones(1, 1, 4, dtype=torch.complex64), weight.to(torch.complex64))
    assert not names(F.max_pool2d, torch.arange(16).view(1, 1, 4, 4), 2)
    assert not names(F.conv1d, torch.ones(1, 1, 4).as_subclass(Tagged), weight)
    assert not names(torch.add, weight, weight)
    assert names(F.conv1d, torch.ones(1, 1, 4), nn.Parameter(weight)) == {"conv1d"}
    assert names(F.conv1d, torch.ones(1, 1, 4, device="meta"), weight.to("meta")) == {"conv1d"}


def test_errors_are_torchs_and_end_the_block():
    with pytest.raises(RuntimeError, match="Given groups=1"), torch_convlab.override():
        F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(1, 3, 3, 3))
    assert not torch.overrides._get_current_function_mode_stack()


def test_other_threads_are_not_concerned():
    input, weight = torch.randn(1, 2, 5), torch.randn(3, 2, 3, requires_grad=True)
    seen = {}

    def other():
        seen["other"] = type(F.conv1d(input, weight).grad_fn).__name__

    with torch_convlab.override() as routed:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        seen["own"] = type(F.conv1d(input, weight).grad_fn).__name__
    assert seen["other"] != seen["own"] and routed.calls.total() == 1
