"""The models: golden parameter counts (lecture item L18), names of the reference implementations, twins of torch.nn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import torch_convlab
from torch_convlab import models

PARAMETERS = {
    models.LeNet5: 1_256_080,
    models.alexnet: 61_100_840,
    models.resnet18: 11_689_512,
    models.resnet34: 21_797_672,
    models.resnet50: 25_557_032,
}


def build(model, **options):
    torch.manual_seed(0)
    return model(**options)


@pytest.mark.parametrize("model", PARAMETERS, ids=lambda model: model.__name__)
def test_number_of_parameters(model):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model().parameters()) == PARAMETERS[model]


@pytest.mark.parametrize("model", [models.LeNet5, models.resnet18], ids=lambda model: model.__name__)
def test_twin_of_torch_layers_has_the_same_parameters(model):
    ours, theirs = build(model), build(model, layers=torch.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert not any(type(module).__module__.startswith(torch_convlab.nn.__name__) for module in theirs.modules())
    assert isinstance(ours.conv1, torch_convlab.nn.Conv2d)


def test_every_layer_this_library_has_is_used():
    table = torch_convlab.convert.__globals__["conversions"]()
    for model in (models.LeNet5(), models.resnet18()):
        assert not [module for module in model.modules() if type(module) in table]


def test_reference_names():
    with torch.device("meta"):
        resnet, alexnet = models.resnet50().state_dict(), models.alexnet().state_dict()
    assert list(resnet)[:7] == [
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]  # fmt: skip
    assert len(resnet) == 320
    assert resnet["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert resnet["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert resnet["layer4.2.bn3.running_var"].shape == (2048,)
    assert list(resnet)[-2:] == ["fc.weight", "fc.bias"]
    assert [key for key in alexnet if key.endswith("weight")] == [
        f"{part}.{index}.weight"
        for part, indices in (("features", (0, 3, 6, 8, 10)), ("classifier", (1, 4, 6)))
        for index in indices
    ]


def test_bottleneck_has_its_stride_on_the_3x3():
    with torch.device("meta"):
        block = models.resnet50().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


def test_lenet_sizes_are_the_lectures():
    model, sizes = build(models.LeNet5), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: sizes.update({name: tuple(output.shape[1:])}))
    model(torch.zeros(2, 1, 28, 28))
    assert sizes["conv1"] == (20, 28, 28) and sizes["pool1"] == (20, 14, 14)
    assert sizes["conv2"] == (50, 14, 14) and sizes["pool2"] == (50, 7, 7)
    assert sizes["flatten"] == (2450,) and sizes["fc1"] == (500,) and sizes["fc2"] == (10,)


@pytest.mark.parametrize("model,size", [(models.LeNet5, (1, 28, 28)), (models.resnet18, (3, 64, 64))])
def test_outputs_and_gradients_equal_the_torch_twin(model, size):
    # In float64: in float32 rounding flips a few ReLUs, whose gradients then differ as a whole.
    ours, theirs = build(model).double(), build(model, layers=torch.nn).double()
    images = torch.randn(2, *size, dtype=torch.float64)
    for network in (ours, theirs):
        network(images).square().mean().backward()
    assert torch.allclose(ours(images), theirs(images), rtol=0, atol=1e-10 * theirs(images).abs().max().item())
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad - reference.grad).abs().max() <= 1e-8 * reference.grad.abs().max(), name


def test_alexnet_runs():
    model = build(models.alexnet, num_classes=7).eval()
    assert model(torch.randn(1, 3, 63, 63)).shape == (1, 7)


def test_pickle_and_deepcopy():
    model = build(models.LeNet5)
    images = torch.randn(2, 1, 28, 28)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(images), model(images))
