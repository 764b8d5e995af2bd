"""Normalization layers against torch.nn's over training steps, and the errors of their functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_normalization import normal, sample

import torch_convlab.functional as ours
from torch_convlab import nn as layers

BATCH_NORM_LAYERS = {
    1: ("BatchNorm1d", (4, 6, 5)),
    2: ("BatchNorm2d", (4, 6, 3, 5)),
    3: ("BatchNorm3d", (4, 6, 2, 3, 2)),
}


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("spatial", BATCH_NORM_LAYERS)
def test_batch_norm_layer_over_steps(spatial, affine, tracks, momentum):
    name, shape = BATCH_NORM_LAYERS[spatial]
    arguments = {"momentum": momentum, "affine": affine, "track_running_stats": tracks, "dtype": torch.float64}
    mine, theirs = getattr(layers, name)(6, **arguments), getattr(torch.nn, name)(6, **arguments)
    assert repr(mine) == repr(theirs)
    for step in range(4):
        input = sample(shape) * (step + 1)
        torch.testing.assert_close(mine(input), theirs(input))
        torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))
        mine.train(step != 2), theirs.train(step != 2)
    torch.testing.assert_close(mine.eval()(input), theirs.eval()(input))
    for model in (mine, theirs):  # buffers present, but not to be used in training
        model.train().track_running_stats = False
    torch.testing.assert_close(mine(input), theirs(input))
    torch.testing.assert_close(dict(mine.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("name,arguments,shape", [
    ("InstanceNorm1d", (6,), (3, 6, 5)), ("InstanceNorm2d", (6,), (6, 4, 5)), ("InstanceNorm3d", (6,), (2, 6, 2, 3, 4)),
    ("GroupNorm", (3, 6), (2, 6, 4)), ("LayerNorm", ((4, 5),), (3, 4, 5)), ("RMSNorm", (5,), (3, 4, 5)),
    ("BatchNorm1d", (6,), (5, 6)),
])  # fmt: skip
def test_layer(name, arguments, shape):
    options = {"affine": True, "track_running_stats": True} if name.startswith("Instance") else {}
    mine = getattr(layers, name)(*arguments, **options)
    theirs = getattr(torch.nn, name)(*arguments, **options)
    theirs.load_state_dict(mine.state_dict())
    assert isinstance(mine, getattr(torch.nn, name)) and repr(mine) == repr(theirs)
    for model in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        reference = copy.deepcopy(theirs)
        input = sample(shape, torch.float32)
        torch.testing.assert_close(model(input), reference(input))
        torch.testing.assert_close(dict(model.state_dict()), dict(reference.state_dict()))
        torch.testing.assert_close(model.eval()(input), reference.eval()(input))


def test_fused_layers_share_state_with_the_plain_ones():
    plain, relu, add = layers.BatchNorm2d(5), layers.BatchNormReLU2d(5), layers.BatchNormAddReLU2d(5)
    for fused_layer in (relu, add):
        fused_layer.load_state_dict(plain.state_dict())
    input, residual = sample((2, 5, 4, 4), torch.float32), normal(2, 5, 4, 4, dtype=torch.float32)
    for training in (True, False):
        outputs = [layer.train(training)(input) for layer in (plain, relu)]
        assert torch.equal(outputs[0].relu(), outputs[1])
        assert torch.equal(add.train(training)(input, residual), (outputs[0] + residual).relu())
        for other in (relu, add):
            torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    block = layers.ConvBNReLU2d(5, 7, 3, stride=2)
    expected = F.batch_norm(F.conv2d(input, block.conv.weight, None, 2, 1), None, None, training=True).relu()
    torch.testing.assert_close(block(input), expected, rtol=1e-4, atol=1e-5)


# ---- Errors: torch's type, and the argument, value and expectation in the message

x2, x4 = torch.ones(2, 4), torch.ones(2, 4, 3, 3)
INPUT_SHAPE = "normalized_shape=\\[5\\], expected input with shape \\[\\*, 5\\]"
ERRORS = {
    "one value": (lambda f: f.batch_norm(torch.ones(1, 3), None, None, training=True), "torch.Size\\(\\[1, 3\\]\\)"),
    "no statistics": (lambda f: f.batch_norm(x2, None, None), "running_mean must be defined"),
    "one statistic": (lambda f: f.batch_norm(x2, torch.ones(4), None, training=True), "both be None"),
    "weight size": (lambda f: f.batch_norm(x2, None, None, torch.ones(3), training=True), "weight should contain 4"),
    "bias size": (lambda f: f.batch_norm(x2, None, None, None, torch.ones(3), True), "bias should contain 4"),
    "running size": (lambda f: f.batch_norm(x2, torch.ones(3), torch.ones(4)), "running_mean should contain 4"),
    "integers": (lambda f: f.batch_norm(x2.int(), None, None, training=True), "not implemented for 'Int'"),
    "1-D": (lambda f: f.batch_norm(torch.ones(3), None, None, training=True), "imension"),
    "weight type": (lambda f: f.batch_norm(x2, None, None, torch.ones(4).double(), training=True), "mixed dtype"),
    "eps": (lambda f: f.batch_norm(x2, None, None, training=True, eps=0), "eps must be positive"),
    "instance": (lambda f: f.instance_norm(torch.ones(2, 3, 1)), "more than 1 spatial element"),
    "instance statistics": (lambda f: f.instance_norm(x4, use_input_stats=False), "use_input_stats is false"),
    "instance weight": (lambda f: f.instance_norm(x4, weight=torch.ones(3)), "weight should contain"),
    "instance running": (lambda f: f.instance_norm(x4, torch.ones(3), torch.ones(3)), "running_mean should contain"),
    "groups": (lambda f: f.group_norm(x4, 3), "divisible by num_groups"),
    "negative groups": (lambda f: f.group_norm(x4, -1), "greater than 0, got -1"),
    "group weight": (lambda f: f.group_norm(x4, 2, torch.ones(3)), "weight of shape \\[3\\]"),
    "group 1-D": (lambda f: f.group_norm(torch.ones(4), 2), "at least 2 dimensions"),
    "group one value": (lambda f: f.group_norm(torch.ones(1, 2), 2), "more than 1 value per channel"),
    "layer shape": (lambda f: f.layer_norm(x2, [5]), INPUT_SHAPE),
    "layer too many": (lambda f: f.layer_norm(x2, [3, 2, 4]), "\\[\\*, 3, 2, 4\\]"),
    "layer none": (lambda f: f.layer_norm(x2, []), "at least 1-dimensional"),
    "layer weight": (lambda f: f.layer_norm(x2, [4], torch.ones(3)), "weight of shape \\[3\\]"),
    "layer int": (lambda f: f.layer_norm(x2, 4), "must be tuple of ints"),
    "rms shape": (lambda f: f.rms_norm(x2, [5]), INPUT_SHAPE),
    "rms weight": (lambda f: f.rms_norm(x2, [4], torch.ones(3)), "weight of shape \\[3\\]"),
    "rms int": (lambda f: f.rms_norm(x2, 4), "must be tuple of ints"),
    "rms integers": (lambda f: f.rms_norm(x2.long(), [4]), "not implemented for 'Long'"),
    "layer integers": (lambda f: f.layer_norm(x2.long(), [4]), "not implemented for 'Long'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(Exception) as expected:
        call(F)
    with pytest.raises(expected.type, match=message) as actual:
        call(ours)
    assert type(actual.value) is expected.type


def test_residual_of_another_size():
    with pytest.raises(RuntimeError, match="expected residual of the input's size"):
        ours.batch_norm_add_relu(x4, x4[:1], None, None, training=True)
