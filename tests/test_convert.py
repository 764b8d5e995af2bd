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


# --- Checks and the report ------------------------------------------------------------------------------------------


def test_report_without_checks():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Own(4, 4, 1), nn.BatchNorm2d(4))
    model[3].forward = lambda input: input
    before = torch_convlab.conversion_report(model).layers
    assert [layer.swapped for layer in before] == [False] * 4 and before[0].reason == "convert was not called"
    assert convert(model) is model
    report = torch_convlab.conversion_report(model)
    assert [(layer.name, layer.layer, layer.swapped) for layer in report.layers] == [
        ("0", "Conv2d", True), ("1", "ReLU", False), ("2", "Own", False), ("3", "BatchNorm2d", False),
    ]  # fmt: skip
    assert [layer.reason for layer in report.layers] == [
        "",
        "this library has no such layer",
        "it is a subclass of torch.nn.Conv2d, which may compute something else",
        "its instance has a forward of its own",
    ]
    assert str(report).endswith("1 of 4 layers are computed by torch_convlab")


@pytest.mark.parametrize("train", [False, True])
def test_verified_conversion_measures_every_layer_and_changes_nothing_else(train):
    model = network().train(train)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = torch.randn(2, 3, 6, 6)
    assert convert(model, inputs) is model
    first, norm, relu, last = torch_convlab.conversion_report(model).layers
    for layer in (first, norm, last):
        assert layer.swapped and 0 < layer.error < 1e-5 and 0 <= layer.torch_error < 1e-5 and layer.speed is None
    assert not relu.swapped and relu.error is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training is train and not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    copy.deepcopy(model)
    pickle.dumps(model)
    revert(model)
    assert not any(layer.swapped for layer in torch_convlab.conversion_report(model).layers)


def test_a_wrong_layer_is_left_alone(monkeypatch):
    right = torch_convlab.nn.BatchNorm2d.forward
    monkeypatch.setattr(torch_convlab.nn.BatchNorm2d, "forward", lambda self, input: right(self, input) * 1.01)
    model = convert(network(), torch.randn(2, 3, 6, 6))
    assert [type(layer) for layer in model] == [
        torch_convlab.nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        torch_convlab.nn.Conv2d,
    ]
    entry = torch_convlab.conversion_report(model).layers[1]
    assert entry.reason == "output is off by 1.0e-02" and entry.error == pytest.approx(0.01, rel=1e-3)


@pytest.fixture
def one_thread():
    """CPU time is measured then, which other processes do not disturb."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("train", [False, True])
def test_only_faster_layers_are_swapped(monkeypatch, train, one_thread):
    """Which of two is faster is measured; here one of ours is made slow beyond doubt."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2)).train(train)
    right = torch_convlab.nn.Conv2d.forward

    def slow(self, input):
        for _ in range(200):
            output = right(self, input)
        return output

    monkeypatch.setattr(torch_convlab.nn.Conv2d, "forward", slow)
    convert(model, torch.randn(2, 3, 12, 12), only_if_faster=True, verify=False)
    convolution, norm, pool = torch_convlab.conversion_report(model).layers
    assert not convolution.swapped and convolution.reason == "torch is faster" and convolution.speed < 0.5
    for layer in (norm, pool):
        assert layer.swapped == (layer.speed >= 1) and layer.error is None


def test_layers_that_the_inputs_do_not_reach_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, input):
            return self.used(input)

    model = convert(Model(), torch.randn(2, 3))
    used, unused = torch_convlab.conversion_report(model).layers
    assert used.swapped and not unused.swapped and "do not reach it" in unused.reason


def test_shared_layers_and_several_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.same = nn.Linear(3, 3)

        def forward(self, left, right):
            return {"sum": self.one(left) + self.same(right)}

    model = convert(Model(), (torch.randn(2, 3), torch.randn(2, 3)))
    (entry,) = torch_convlab.conversion_report(model).layers
    assert entry.swapped and entry.error < 1e-5 and type(model.same) is torch_convlab.nn.Linear


def test_checks_need_inputs():
    for keywords in ({"verify": True}, {"only_if_faster": True}):
        with pytest.raises(ValueError, match="need example_inputs"):
            convert(network(), **keywords)


def test_report_as_text_and_page(tmp_path):
    pytest.importorskip("jinja2")
    model = convert(network(), torch.randn(2, 3, 6, 6))
    report = torch_convlab.conversion_report(model)
    head, *lines, last = report.table().splitlines()
    assert head.split() == ["layer", "class", "swapped", "error", "torch's", "speed", "reason"]
    assert len(lines) == 4 and lines[0].split()[:3] == ["0", "Conv2d", "yes"] and last.startswith("3 of 4")
    page = report.html(tmp_path / "report.html").read_text(encoding="utf-8")
    for layer in report.layers:
        assert f"<td>{layer.layer}" in page and layer.reason in page
    assert "http" not in page and f'<td class="number">{report.layers[0].error:.1e}' in page
