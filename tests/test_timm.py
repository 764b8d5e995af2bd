"""timm's BatchNormAct2d, by a stand-in of the same name, attributes and arithmetic; timm itself is not needed."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_convlab.nn as layers
from torch_convlab import conversion_report, convert, fuse, fusion_report, revert


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, features, act=nn.ReLU, drop=nn.Identity):
        super().__init__(features)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    stand_in = types.ModuleType("timm.layers")
    stand_in.BatchNormAct2d = BatchNormAct2d
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.layers", stand_in)


class Block(nn.Module):
    def __init__(self, act, drop=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), BatchNormAct2d(16, act, drop)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), BatchNormAct2d(16, nn.Identity)

    def forward(self, input):
        output = self.bn1(self.conv1(input))
        return self.bn2(self.conv2(output)) + output


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "in place": lambda: nn.ReLU(inplace=True)}


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("drop", [nn.Identity, nn.Dropout2d], ids=["", "drop"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_training(name, drop):
    model = Block(ACTIVATIONS[name], (lambda: nn.Dropout2d(0.5)) if drop is nn.Dropout2d else drop)
    results = []
    for module in (convert(copy.deepcopy(model)), model):
        torch.manual_seed(2)
        leaf = images().requires_grad_()
        output = module.train()(leaf)
        output.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append([output, leaf.grad, gradients, dict(module.state_dict())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_inference(name):
    model = Block(ACTIVATIONS[name])
    model.train()(images())
    with torch.no_grad():
        expected = model.eval()(images())
        for converted in (False, True):
            given = convert(copy.deepcopy(model)) if converted else copy.deepcopy(model)
            fused = fuse(given, images())
            assert sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules()) == 0
            for module in (fused, given):
                torch.testing.assert_close(module(images()), expected, rtol=1e-4, atol=1e-5)
            if converted:
                part = name if name != "in place" else "relu"
                assert f"conv1: with {part}" in [str(entry) for entry in fusion_report(fused)]
                called = [node.target for node in fused.graph.nodes if node.op == "call_module"]
                assert called == ["conv1", "conv2"]


def test_dropped_maps_stay_between_batch_norm_and_activation():
    model = Block(nn.ReLU, lambda: nn.Dropout2d(0.5)).eval()
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(fuse(convert(model))(images()), expected, rtol=1e-4, atol=1e-5)
    assert [type(part) for part in model.bn1] == [nn.Dropout2d, nn.ReLU]


def test_conversion_there_and_back():
    model = convert(Block(nn.ReLU))
    assert type(model.bn1).__module__ == layers.timm.__name__ and isinstance(model.bn1, BatchNormAct2d)
    assert type(pickle.loads(pickle.dumps(model.bn1))) is type(model.bn1)
    assert type(revert(model).bn1) is BatchNormAct2d

    class Own(BatchNormAct2d):
        pass

    own = Own(4)
    assert type(convert(own)) is Own


@pytest.mark.parametrize("part", ["act", "drop"])
def test_what_is_attached_to_the_parts_stays(part):
    """Hooks of every kind, and a forward of the instance's own, after convert and after fuse."""
    kinds = "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"
    for kind in kinds:
        model, seen = convert(Block(nn.ReLU)), []
        getattr(getattr(model.bn1, part), f"register_{kind}")(lambda *_, seen=seen: seen.append(1))
        model(images()).sum().backward()
        fuse(model.eval())(images()).sum().backward()
        assert len(seen) == 2, kind
    model = Block(nn.ReLU).eval()
    getattr(model.bn1, part).forward = lambda x: x * 0 + 2
    expected = model(images())
    for given in (convert(model), fuse(model)):
        torch.testing.assert_close(given(images()), expected, rtol=1e-4, atol=1e-5)


def test_parts_keep_their_mode():
    model = convert(Block(nn.ReLU, lambda: nn.Dropout2d(0.5))).eval()
    model.bn1.drop.train()  # as for Monte Carlo dropout
    drop = model.bn1.drop
    fused = fuse(model)
    assert drop.training and model.bn1[0] is drop and not model.bn1.training
    assert not torch.equal(fused(images()), fused(images()))


def test_parts_that_are_called_by_others_stay():
    class Twice(Block):
        def forward(self, input):
            return self.bn1.act(self.bn1(self.conv1(input)))

    for converted in (False, True):
        model = Twice(nn.SiLU).eval()
        expected = model(images())
        fused = fuse(convert(model) if converted else model)
        torch.testing.assert_close(fused(images()), expected, rtol=1e-4, atol=1e-5)
        assert isinstance(fused.bn1, BatchNormAct2d)


def test_conversion_is_checked_and_reported_as_of_one_layer():
    model = convert(Block(nn.ReLU), images())
    entries = {entry.name: entry for entry in conversion_report(model).layers}
    assert list(entries) == ["conv1", "bn1", "conv2", "bn2"]
    assert entries["bn1"].swapped and entries["bn1"].error < 1e-5 and not entries["bn1"].reason


def test_nothing_without_timm(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm.layers")
    assert type(convert(BatchNormAct2d(4))) is BatchNormAct2d
