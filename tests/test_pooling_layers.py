"""Pooling layers beside those of torch.nn, and errors beside torch's."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import torch_convlab.functional as ours
from torch_convlab import nn

theirs = torch.nn.functional

BAD = {
    "max_pool2d": [((0,), "stride"), ((2, -1), "stride"), ((2, 2, -1), "pad"), ((3, 1, 2), "half"), ((9,), "too small"),
                   (((2, 2, 2),), "two ints"), ((2, 2, 0, 0), "dilation")],
    "avg_pool2d": [((0,), "stride"), ((-1,), "kernel size"), ((2, 0), "stride"), ((3, 1, 2), "half"),
                   ((9,), "too small")],
    "avg_pool3d": [((2, 2, 0, False, True, 0), "divisor")],
    "adaptive_avg_pool2d": [((-1,), "greater than or equal to 0"), (((1, 2, 3),), "must be 2")],
    "adaptive_max_pool2d": [((-1,), "negative dimension"), (((1, 2, 3),), "must be 2")],
    "max_pool1d": [((0,), "kernel_size must be greater"), ((2, 0), "stride must be greater"),
                   (((1, 2),), "one int")],
}  # fmt: skip


@pytest.mark.parametrize("name, arguments, words", [(name, *case) for name, cases in BAD.items() for case in cases])
def test_errors(name, arguments, words):
    x = torch.randn(2, 3, *[6] * int(name[-2]))
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as raised:
            getattr(module, name)(x, *arguments)
        if module is ours:
            assert re.search(words, str(raised.value))


def test_other_errors():
    for name in ("max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"):
        call = getattr(ours, name)
        with pytest.raises(NotImplementedError, match="'Long'"):
            call(torch.ones(1, 1, 4, 4, dtype=torch.int64), 2)
        with pytest.raises(RuntimeError, match="non-empty"):
            call(torch.ones(1, 1, 1, 4, 4), 2)
        with pytest.raises(RuntimeError, match="dimension 3"):
            call(torch.ones(1, 1, 4, 0), 2)
    with pytest.raises(TypeError):
        ours.adaptive_avg_pool1d(torch.ones(1, 1, 4), None)


LAYERS = [
    ("MaxPool1d", (3,), {"stride": 2, "padding": 1}),
    ("MaxPool2d", (3, 2, 1), {"ceil_mode": True}),
    ("MaxPool3d", (2,), {"dilation": 2, "return_indices": True}),
    ("AvgPool1d", (3,), {"count_include_pad": False, "padding": 1}),
    ("AvgPool2d", (3, 2), {"divisor_override": 4}),
    ("AvgPool3d", (2,), {}),
    ("AdaptiveMaxPool1d", (3,), {}),
    ("AdaptiveMaxPool2d", ((None, 3),), {"return_indices": True}),
    ("AdaptiveMaxPool3d", (2,), {}),
    ("AdaptiveAvgPool1d", (3,), {}),
    ("AdaptiveAvgPool2d", ((None, 3),), {}),
    ("AdaptiveAvgPool3d", (2,), {}),
]


@pytest.mark.parametrize("name, arguments, keywords", LAYERS, ids=[layer[0] for layer in LAYERS])
def test_layers(name, arguments, keywords):
    mine, reference = (getattr(module, name)(*arguments, **keywords) for module in (nn, torch.nn))
    assert repr(mine) == repr(reference)
    assert isinstance(mine, getattr(torch.nn, name)) and type(mine).__name__ == name
    x = torch.randn(2, 3, *[8] * int(name[-2]), dtype=torch.float64)
    expected = reference(x)
    for layer in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        actual = layer(x)
        for ours_, theirs_ in zip(*((v if isinstance(v, tuple) else (v,)) for v in (actual, expected)), strict=True):
            torch.testing.assert_close(ours_, theirs_, rtol=0, atol=1e-12)


def test_global_average_layer():
    """Lecture item L12: any size of input, no parameters."""
    for size in (7, 12):
        x = torch.randn(2, 5, size, size + 1, dtype=torch.float64)
        torch.testing.assert_close(nn.GlobalAvgPool2d()(x), x.mean((2, 3), keepdim=True), rtol=0, atol=1e-12)
        torch.testing.assert_close(nn.GlobalAvgPool2d(flatten=True)(x), x.mean((2, 3)), rtol=0, atol=1e-12)
    assert not list(nn.GlobalAvgPool2d().parameters())
