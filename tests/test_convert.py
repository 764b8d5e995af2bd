"""convert and revert: what they swap, what they keep, what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torch_convlab
from torch_convlab import convert, models, revert

conversions = convert.__globals__["conversions"]
TABLE = conversions()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def test_the_table_holds_pairs_of_the_same_name():
    assert TABLE[nn.Conv2d] is torch_convlab.nn.Conv2d
    for theirs, ours in TABLE.items():
        assert issubclass(ours, theirs) and ours.__name__ == theirs.__name__
        assert ours.__init__ is theirs.__init__, f"{ours.__name__} would not be initialised by a class swap"


def test_outputs_parameters_and_layout_stay():
    model, images = network(), torch.randn(2, 3, 9, 9)
    expected, parameters, text = model(images), list(model.parameters()), repr(model)
    state = copy.deepcopy(model.state_dict())
    assert convert(model) is model
    assert type(model[0]) is torch_convlab.nn.Conv2d and type(model[2]) is nn.ReLU
    assert all(new is old for new, old in zip(model.parameters(), parameters))
    assert repr(model) == text and list(model.state_dict()) == list(state)
    assert not model.training and not any(module.training for module in model.modules())
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert revert(model) is model
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(images), expected)


def test_root_module_and_idempotence():
    layer = nn.Conv1d(2, 2, 3)
    assert type(convert(convert(layer))) is torch_convlab.nn.Conv1d
    assert type(revert(revert(layer))) is nn.Conv1d


def test_a_shared_layer_stays_shared():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = convert(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] is shared and type(shared) is torch_convlab.nn.Conv2d


def test_hooks_and_attributes_stay():
    model, calls = network(), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[0].note = "kept"
    convert(model)(torch.randn(1, 3, 8, 8)).sum().backward()
    assert calls == ["forward", "backward"] and model[0].note == "kept"


def test_an_optimizer_keeps_training_the_model():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)(torch.randn(2, 3, 8, 8)).square().mean().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


class LoudConv2d(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_and_own_forwards_are_left_alone():
    own = nn.Conv2d(2, 2, 1)
    own.forward = lambda input: input
    model = convert(nn.Sequential(LoudConv2d(2, 2, 1), own))
    assert type(model[0]) is LoudConv2d and type(model[1]) is nn.Conv2d


def test_parametrized_layers_are_left_alone_and_converted_ones_can_be_parametrized():
    layer = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    kind = type(layer)
    assert type(convert(layer)) is kind
    ours = parametrizations.weight_norm(convert(nn.Conv2d(2, 3, 3)))
    assert isinstance(ours, torch_convlab.nn.Conv2d)
    assert ours(torch.randn(1, 2, 5, 5)).shape == (1, 3, 3, 3)
    assert type(revert(ours)) is type(ours)


def test_lazy_layers_are_left_alone_until_they_have_a_shape():
    model = convert(nn.Sequential(nn.LazyConv2d(4, 3)))
    assert type(model[0]) is nn.LazyConv2d
    model(torch.randn(1, 2, 5, 5))
    assert type(convert(model)[0]) is torch_convlab.nn.Conv2d


def test_scripted_modules_are_left_alone():
    scripted = torch.jit.trace(nn.Conv2d(2, 2, 1), torch.randn(1, 2, 3, 3))
    kind = type(scripted)
    assert type(convert(scripted)) is kind


def test_pickle_deepcopy_and_state_dict():
    model, images = convert(network()), torch.randn(2, 3, 6, 6)
    expected = model(images)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin[0]) is torch_convlab.nn.Conv2d and torch.equal(twin(images), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = network()
    twin.load_state_dict(torch.load(file))
    assert torch.equal(convert(twin)(images), expected)


def test_a_whole_model_there_and_back():
    model = models.resnet18(layers=nn)
    types = [type(module) for module in model.modules()]
    convert(model)
    assert not [module for module in model.modules() if type(module) in TABLE]
    assert [type(module) for module in revert(model).modules()] == types


def test_anything_but_a_module_is_refused():
    with pytest.raises(TypeError, match=r"torch.nn.Module, but got list"):
        convert([nn.Conv2d(1, 1, 1)])


def test_torch_compile_of_a_converted_model():
    model, images = network(), torch.randn(1, 3, 8, 8)
    expected = model(images)
    compiled = torch.compile(convert(model), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), expected, atol=1e-5)


def test_converted_models_run_on_the_meta_device():
    """Where sizes are asked for without computing."""
    model = torch_convlab.convert(models.resnet18(layers=nn)).to("meta")
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
