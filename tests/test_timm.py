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
from torch_convlab import convert, fuse, fusion_report, revert


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


def test_hooks_of_the_activation_are_called():
    model, seen = convert(Block(nn.ReLU)), []
    model.bn1.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(images())
    assert len(seen) == 1


def test_nothing_without_timm(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm.layers")
    assert type(convert(BatchNormAct2d(4))) is BatchNormAct2d
