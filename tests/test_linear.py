"""`functional.linear` and `nn.Linear` against torch in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import torch_convlab.functional as ours
from torch_convlab import convert, fuse, fusion_report
from torch_convlab import nn as layers
from torch_convlab._activation import GELU, GELU_TANH, HARDSWISH, RELU6, SILU, apply, as_activation

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 4), (130,)], ids=str)
@pytest.mark.parametrize("features,outputs", [(7, 3), (64, 33), (1, 1), (130, 65)])
def test_linear(leading, features, outputs, bias, dtype):
    tensors = [normal(*leading, features, dtype=dtype), normal(outputs, features, dtype=dtype, seed=1)]
    if bias:
        tensors.append(normal(outputs, dtype=dtype, seed=2))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    actual, expected = ours.linear(*leaves), F.linear(*exact)
    grad = normal(*leading, outputs, dtype=dtype, seed=3)
    actual.backward(grad)
    expected.backward(grad.double())
    assert actual.shape == expected.shape and actual.dtype == dtype and actual.is_contiguous()
    pairs = [(actual, expected), *((leaf.grad, other.grad) for leaf, other in zip(leaves, exact))]
    for value, reference in pairs:
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives(relu):
    leaves = [tensor.requires_grad_() for tensor in (normal(2, 3, 4), normal(5, 4, seed=1), normal(5, seed=2))]

    def function(*tensors):
        return ours.linear(*tensors, relu=relu)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True)
    torch.testing.assert_close(function(*leaves), F.linear(*leaves).relu() if relu else F.linear(*leaves))


def test_views_and_vmap():
    input, weight = normal(6, 8, 10), normal(12, 10, seed=1)
    for view in (input[::2, 1:], input.transpose(0, 1), input[:1].expand(4, -1, -1)):
        torch.testing.assert_close(ours.linear(view, weight), F.linear(view, weight))
    torch.testing.assert_close(ours.linear(input, normal(10, 12).t()), F.linear(input, normal(10, 12).t()))
    many = normal(6, 12, 10)
    torch.testing.assert_close(torch.func.vmap(ours.linear)(input, many), torch.func.vmap(F.linear)(input, many))


DEGENERATE = [((0, 5), (4, 5)), ((2, 0), (4, 0)), ((2, 5), (0, 5)), ((2, 5), (5,)), ((5,), (5,))]


@pytest.mark.parametrize("shapes", DEGENERATE, ids=str)
def test_degenerate_sizes(shapes):
    tensors = [normal(*shape) for shape in shapes]
    torch.testing.assert_close(ours.linear(*tensors), F.linear(*tensors))


def test_bias_broadcasts():
    input, weight = normal(2, 5), normal(4, 5)
    for bias in (normal(1), normal(1, 4), normal(2, 4)):
        torch.testing.assert_close(ours.linear(input, weight, bias), F.linear(input, weight, bias))


ERRORS = {
    "features": (lambda f: f.linear(torch.ones(2, 3), torch.ones(4, 5)), "\\(2x3 and 5x4\\)"),
    "features 1-D": (lambda f: f.linear(torch.ones(3), torch.ones(4, 5)), "\\(1x3 and 5x4\\)"),
    "features 3-D": (lambda f: f.linear(torch.ones(2, 2, 3), torch.ones(4, 5)), "\\(4x3 and 5x4\\)"),
    "bias": (lambda f: f.linear(torch.ones(2, 5), torch.ones(4, 5), torch.ones(3)), "expanded size"),
    "dtype": (lambda f: f.linear(torch.ones(2, 5), torch.ones(4, 5).double()), "same dtype, but got: float.* != "),
    "weight 3-D": (lambda f: f.linear(torch.ones(2, 5), torch.ones(1, 4, 5)), "3D"),
    "weight 1-D with bias": (lambda f: f.linear(torch.ones(2, 5), torch.ones(5), torch.ones(1)), "must be a matrix"),
    "scalar": (lambda f: f.linear(torch.ones(()), torch.ones(4, 5)), "at least 1D"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(Exception) as expected:
        call(F)
    with pytest.raises(expected.type, match=message) as actual:
        call(ours)
    assert type(actual.value) is expected.type


def test_layer():
    mine, theirs = layers.Linear(6, 4), torch.nn.Linear(6, 4)
    theirs.load_state_dict(mine.state_dict())
    assert repr(mine) == repr(theirs) and isinstance(mine, torch.nn.Linear)
    input = normal(3, 6, dtype=torch.float32)
    for model in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        torch.testing.assert_close(model(input), theirs(input))
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), theirs(input))
    with torch.autocast("cpu", torch.bfloat16):
        assert mine(input).dtype == theirs(input).dtype == torch.bfloat16


def fused_layer(features, outputs, relu, dtype=torch.float32, bias=True):
    layer = layers.Linear(features, outputs, bias, dtype=dtype).eval().requires_grad_(False)
    return layer, layers.LinearAddReLU(layer, relu)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("relu", [False, True, RELU6, SILU, HARDSWISH, GELU, GELU_TANH], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (130,)], ids=str)
def test_fused(leading, relu, dtype):
    layer, fused = fused_layer(70, 33, relu, dtype, bias=relu is not SILU)
    exact = copy.deepcopy(layer).double()
    input, residual = normal(*leading, 70, dtype=dtype), normal(*leading, 33, dtype=dtype, seed=1)
    for added in (None, residual, residual[..., :1], normal(2, *leading, 33, dtype=dtype)):
        sum = F.linear(input.double(), exact.weight, exact.bias)
        expected = apply(as_activation(relu), sum if added is None else sum + added.double())
        for _ in range(2):  # the second call finds the packed weight
            actual = fused(input, added)
            assert actual.dtype == dtype and actual.is_contiguous() and actual.shape == expected.shape
            # Where torch adds, the sum is rounded once more.
            torch.testing.assert_close(actual.double(), expected, rtol=2 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_fused_keeps_its_weight():
    layer, fused = fused_layer(96, 64, True)
    input = normal(50, 96, dtype=torch.float32)
    with torch.no_grad():
        expected = fused(input)
        kept = fused._kept.packed
        assert kept.numel() > 0
        assert torch.equal(fused(input), expected) and fused._kept.packed is kept
        layer.weight.mul_(2)
        torch.testing.assert_close(fused(input), layer(input).relu())
        assert fused._kept.packed is not kept
        with torch.inference_mode():
            fused(input)
            layer.weight.mul_(0.5)
            assert torch.equal(fused(input), expected)
        for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert copied._kept.packed is None and torch.equal(copied(input), fused(input))
    fused.weight.requires_grad_()
    fused(input).sum().backward()
    wanted = torch.autograd.grad(F.linear(input, fused.weight, fused.bias).relu().sum(), fused.weight)[0]
    torch.testing.assert_close(fused.weight.grad, wanted)
    fused.train()
    assert fused._kept.packed is None
    with pytest.raises(ValueError, match="expected linear to be a Linear"):
        layers.LinearAddReLU(torch.nn.Conv2d(3, 3, 1))


class Mixer(torch.nn.Module):
    """A block of an MLP-Mixer or a transformer, with what fusing must see in it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (torch.nn.Linear(*size) for size in ((24, 48), (48, 24), (24, 5)))
        self.silu, self.nothing, self.dropout = torch.nn.SiLU(), torch.nn.Dropout(0.0), torch.nn.Dropout(0.1)
        self.position = torch.nn.Parameter(torch.randn(7, 24))

    def forward(self, input):
        input = input + self.nothing(self.second(self.silu(self.first(self.dropout(input)))))
        return torch.relu(self.head(input) + self.head(input + self.position))


def test_fuse():
    model, input = convert(Mixer()).eval(), torch.randn(3, 7, 24)
    with torch.no_grad():
        expected = model(input)
        fused = fuse(model, input)
        torch.testing.assert_close(fused(input), expected)
        torch.testing.assert_close(fused(input[:1]), model(input[:1]))  # another size
    assert [type(layer) for layer in (fused.first, fused.second)] == [layers.LinearAddReLU] * 2
    assert str(fused.first.relu) == "silu" and type(fused.head) is layers.Linear
    said = [str(entry) for entry in fusion_report(fused)]
    assert said[:2] == ["first: with silu", "second: with add"]
    assert said[2:] == ["head: not with add and relu, it is called several times"] * 2
    assert len([node for node in fused.graph.nodes if node.target is torch.nn.functional.silu]) == 0
    assert fuse(convert(Mixer())).first.training  # nothing to take in training


def test_fused_with_changing_numbers_of_rows():
    """Packed at once, and anew for another number of rows only when it comes twice in a row."""
    layer, fused = fused_layer(96, 64, False)
    seen = []
    with torch.no_grad():
        for rows in (50, 50, 70, 50, 70, 70, 50):
            input = normal(rows, 96, dtype=torch.float32)
            torch.testing.assert_close(fused(input), layer(input))
            seen.append(fused._kept.packed)
    packs = [0] + [index for index in range(1, 7) if seen[index] is not seen[index - 1]]
    assert packs == [0, 5], packs
    assert all(kept is not None for kept in seen)


class Changing(torch.nn.Module):
    """Changes what it has added, before the activation."""

    def __init__(self, layer, how):
        super().__init__()
        self.layer, self.other, self.how = layer, copy.deepcopy(layer), how
        self.activation = torch.nn.ReLU(inplace=True)

    def forward(self, input):
        added = self.other(input)
        sum = self.layer(input) + added
        changed = self.activation(added) if self.how == "module" else added.add_(5)
        return torch.relu(sum) + changed


@pytest.mark.parametrize("how", ["module", "method"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "batch norm"])
def test_what_is_added_must_not_change(kind, how):
    layer = {"linear": layers.Linear(6, 6), "convolution": layers.Conv2d(6, 6, 1), "batch norm": layers.BatchNorm2d(6)}
    model = Changing(layer[kind], how)
    model.train(kind == "batch norm")
    input = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 6, 3, 3)
    with torch.no_grad():
        expected = model(input)
        fused = fuse(model)
        torch.testing.assert_close(fused(input), expected)
    assert any("may change what is added before the end" in str(entry) for entry in fusion_report(model))


class AddsNumbers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.nothing = layers.Linear(6, 6), torch.nn.Dropout(0.0)

    def forward(self, input, number=None):
        output = self.layer(input)
        output = output + (input.shape[0] if number is None else number)
        return torch.relu(output)


class AddsInPlace(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = layers.Linear(6, 6)

    def forward(self, input, added):
        output = self.layer(input)
        output += added
        return torch.relu(output)


def test_other_additions():
    model, input = AddsNumbers().eval(), torch.randn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(input), model(input))
        fused = fuse(model, input)
        torch.testing.assert_close(fused(input), model(input))
        model, added = AddsInPlace().eval(), torch.randn(3, 6, dtype=torch.float64)
        fused = fuse(model)
        assert fused(input, added).dtype == torch.float32
        torch.testing.assert_close(fused(input, added), model(input, added))
    with pytest.raises(ValueError, match="whose weight is a Parameter"):
        layers.LinearAddReLU(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3)))


def test_a_dropout_of_nothing_stays_in_training():
    model = torch.nn.Sequential(layers.Conv2d(3, 4, 1), layers.BatchNorm2d(4), torch.nn.Dropout(0.0), torch.nn.ReLU())
    fused = fuse(model.train())
    model[2].p = 1.0
    assert fused(torch.randn(2, 3, 5, 5)).abs().max() == 0
