"""fuse: additions and ReLUs that convolutions and batch norms compute themselves; equality, refusals, reports."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_fuse import warmed
from torch import nn
from torch.nn import functional as F

import torch_convlab.nn as layers
from torch_convlab import convert, functional, fuse, fusion_report, models
from torch_convlab._activation import SILU
from torch_convlab._epilogues import Epilogue


def epilogues(model: nn.Module) -> list[str]:
    return [str(entry) for entry in fusion_report(model) if isinstance(entry, Epilogue)]


class Block(nn.Module):
    """A convolution, a batch norm and another convolution, used as `wiring` says."""

    def __init__(self, wiring, channels=6):
        super().__init__()
        self.conv, self.bn = layers.Conv2d(channels, channels, 3, padding=1), layers.BatchNorm2d(channels)
        self.other, self.relu = layers.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)
        self.relu6, self.hardtanh = nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25)
        self.wiring = wiring

    def forward(self, input):
        return self.wiring(self, input)


def iadd(model, x):
    output = model.bn(model.conv(x))
    output += x
    return F.relu(output)


WIRINGS = {  # what follows the batch norm, or the convolution that it is folded into
    "relu": (lambda m, x: m.relu(m.bn(m.conv(x))), ("relu",)),
    "functional relu": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), ("relu",)),
    "relu method": (lambda m, x: m.bn(m.conv(x)).relu(), ("relu",)),
    "relu_ method": (lambda m, x: m.bn(m.conv(x)).relu_(), ("relu",)),
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), ("relu",)),
    "add and relu": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), ("add", "relu")),
    "add from the left": (lambda m, x: torch.relu(x + m.bn(m.conv(x))), ("add", "relu")),
    "torch.add": (lambda m, x: torch.add(m.bn(m.conv(x)), x).relu(), ("add", "relu")),
    "add method": (lambda m, x: m.bn(m.conv(x)).add_(x).relu_(), ("add", "relu")),
    "+=": (iadd, ("add", "relu")),
    "one relu for two": (lambda m, x: m.relu(m.bn(m.conv(m.relu(m.other(x)))) + x), ("add", "relu")),
    "shortcut with a layer": (lambda m, x: m.relu(m.other(x) + m.bn(m.conv(x))), ("add", "relu")),
    "add alone": (lambda m, x: x + m.bn(m.conv(x)), ("add",)),
    "relu6": (lambda m, x: m.relu6(m.bn(m.conv(x))), ("relu6",)),
    "functional relu6": (lambda m, x: F.relu6(m.bn(m.conv(x)), inplace=True), ("relu6",)),
    "hardtanh": (lambda m, x: m.hardtanh(m.bn(m.conv(x))), ("hardtanh(-0.5, 0.25)",)),
    "functional hardtanh": (lambda m, x: F.hardtanh(m.bn(m.conv(x)), max_val=0.5), ("hardtanh(-1.0, 0.5)",)),
    "hardtanh_": (lambda m, x: F.hardtanh_(m.bn(m.conv(x)), -1, 1), ("hardtanh(-1.0, 1.0)",)),
    "add and relu6": (lambda m, x: m.relu6(m.bn(m.conv(x)) + x), ("add", "relu6")),
    "add and hardtanh": (lambda m, x: m.hardtanh(x + m.bn(m.conv(x))), ("add", "hardtanh(-0.5, 0.25)")),
}
CLAMPS = {  # whose gradients pass at the bounds: convolutions alone take them
    "clamp": (lambda m, x: torch.clamp(m.conv(x), -0.5, 0.25), "clamp(-0.5, 0.25)"),
    "clamp method": (lambda m, x: m.conv(x).clamp(max=0.5), "clamp(None, 0.5)"),
    "clamp_": (lambda m, x: m.conv(x).clamp_(0, 6), "clamp(0.0, 6.0)"),
    "clamp_min": (lambda m, x: m.conv(x).clamp_min(0), "clamp(0.0, None)"),
    "clamp_max_": (lambda m, x: torch.clamp_max_(m.conv(x), 0.25), "clamp(None, 0.25)"),
    "clip": (lambda m, x: (m.conv(x)).clip(min=-0.25), "clamp(-0.25, None)"),
}


GATES = {
    "SiLU": (nn.SiLU(), "silu"),
    "SiLU in place": (nn.SiLU(inplace=True), "silu"),
    "functional silu": (F.silu, "silu"),
    "functional silu in place": (lambda x: F.silu(x, inplace=True), "silu"),
    "Hardswish": (nn.Hardswish(), "hardswish"),
    "GELU": (nn.GELU(), "gelu"),
    "functional gelu": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "functional hardswish": (F.hardswish, "hardswish"),
    "functional hardswish in place": (lambda x: F.hardswish(x, True), "hardswish"),
}


class Gated(nn.Module):
    """A convolution, a batch norm and a gate, and an addition before or after it."""

    def __init__(self, gate, adds=""):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.gate = layers.Conv2d(6, 6, 3, padding=1), layers.BatchNorm2d(6), gate
        self.adds = adds

    def forward(self, input):
        output = self.bn(self.conv(input))
        output = self.gate(output + input if self.adds == "before" else output)
        return output + input if self.adds == "after" else output


@pytest.mark.parametrize("adds", ["", "before", "after"])
@pytest.mark.parametrize("name", GATES)
def test_gates_in_eval(name, adds):
    gate, part = GATES[name]
    model, inputs = warmed(Gated(gate, adds)), 4 * torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        expected = model(inputs)
        fused = fuse(model, inputs)
        assert epilogues(fused) == ["conv: with add and " + part if adds == "before" else f"conv: with {part}"]
        for result in (fused, copy.deepcopy(fused)):
            torch.testing.assert_close(result(inputs), expected, rtol=0, atol=1e-5)
    leaf, twin = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    fused(leaf).sum().backward()
    model(twin).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=0, atol=1e-5)


def test_compile_with_a_gate():
    model, inputs = fuse(warmed(Gated(nn.SiLU()))), torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(inputs), model(inputs))


def test_batch_norms_take_no_gate():
    model = Gated(nn.SiLU()).train()
    assert epilogues(fuse(model)) == []
    with pytest.raises(ValueError, match="expected relu to be a bool or a Clamp, but got silu"):
        functional.batch_norm_fused(torch.ones(2, 6, 1, 1), None, None, None, training=True, relu=SILU)


def test_gates_that_are_more_than_their_function_are_left_alone():
    hooked = nn.SiLU()
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Hardswish()
    replaced.forward = lambda x: x
    for gate in (hooked, replaced):
        assert epilogues(fuse(Gated(gate).eval())) == []


@pytest.mark.parametrize("name", WIRINGS)
def test_eval(name):
    wiring, parts = WIRINGS[name]
    model, inputs = warmed(Block(wiring)), torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        expected = model(inputs)
        fused = fuse(model, inputs)
        scale = expected.abs().max().item()
        for result in (fused, model, copy.deepcopy(fused), pickle.loads(pickle.dumps(fuse(copy.deepcopy(model))))):
            assert torch.allclose(result(inputs), expected, rtol=0, atol=1e-5 * scale)
    assert f"conv: with {' and '.join(parts)}" in epilogues(fused)
    assert type(fused.conv) is layers.ConvAddReLU and not [n for n in fused.graph.nodes if n.op == "call_function"]
    gradient = torch.autograd.grad(fused(inputs).sum(), fused.conv.weight)[0]
    expected = torch.autograd.grad(model(inputs).sum(), model.conv.weight)[0]
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", WIRINGS)
def test_training(name, format):
    wiring, parts = WIRINGS[name]
    model = Block(wiring).train().to(memory_format=format)
    inputs = torch.randn(4, 6, 9, 9).to(memory_format=format)
    twin = copy.deepcopy(model)
    fused = fuse(model, inputs)
    assert f"bn: with {' and '.join(parts)}" in epilogues(fused)
    assert fused.bn.weight is model.bn.weight and fused.bn.running_mean is model.bn.running_mean
    results = []
    for module in (fused, twin):
        leaf = inputs.clone().requires_grad_()
        output = module(leaf)
        output.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append([output, leaf.grad, grads, dict(module.named_buffers())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.allclose(fused.eval()(inputs), twin.eval()(inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps_in_eval(name):
    wiring, part = CLAMPS[name]
    model, inputs = Block(wiring).eval(), torch.randn(2, 6, 9, 9)
    inputs[0, :, :5] = 0  # with the bias that follows, the sums there are zero: at a bound
    model.conv.bias.data.zero_()
    fused = fuse(model, inputs)
    assert epilogues(fused) == [f"conv: with {part}"]
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs), model(inputs), rtol=0, atol=1e-5)
    leaf, twin = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    fused(leaf).sum().backward()
    model(twin).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=0, atol=1e-5)


def test_batch_norms_leave_what_has_other_gradients_or_no_numbers_for_bounds():
    model = Block(lambda m, x: m.bn(x).clamp(0, 6)).train()
    assert epilogues(model) == ["bn: not with clamp(0.0, 6.0), gradients pass at the bounds of torch.clamp"]
    for wiring in (
        lambda m, x: torch.clamp(m.conv(x), m.conv.bias.min(), None), lambda m, x: m.conv(x).clamp(max=float("nan")),
        lambda m, x: torch.clamp(m.conv(x), x.mean()),
    ):  # fmt: skip
        model = Block(wiring).eval()
        assert epilogues(model) == [] and epilogues(fuse(model)) == []


def test_a_model_fused_for_training_is_folded_with_its_relu6():
    model = nn.Sequential(layers.Conv2d(3, 4, 3), layers.BatchNorm2d(4), nn.ReLU6()).train()
    inputs = torch.randn(2, 3, 7, 7) * 9
    trained = warmed(fuse(model, inputs))
    trained.get_submodule("1").weight.data.fill_(5.0)
    assert "relu=relu6" in repr(trained) and model.eval()(inputs).max() == 6
    expected = trained(inputs)
    folded = fuse(trained, inputs)
    assert [str(entry) for entry in fusion_report(folded)] == ["1: with relu6", "1: folded into 0", "0: with relu6"]
    assert [type(module) for module in folded.children()] == [layers.ConvAddReLU] and "relu6" in repr(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, parts) in WIRINGS.items() if "add" in parts])
def test_a_model_fused_for_training_is_folded_with_its_additions(name):
    wiring, parts = WIRINGS[name]
    inputs = torch.randn(2, 6, 7, 7)
    trained = warmed(fuse(Block(wiring).train(), inputs))
    expected = trained(inputs)
    assert any("Add" in type(module).__name__ for module in trained.modules())
    folded = fuse(trained, inputs)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert f"conv: with {' and '.join(parts)}" in epilogues(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), expected, rtol=0, atol=1e-5)
    assert torch.equal(trained(inputs), expected)  # it is not changed
    trained.train()(inputs).sum().backward()


def test_resnet_fused_for_training_is_fused_completely_in_eval_mode():
    inputs = torch.randn(2, 3, 64, 64)
    trained = warmed(fuse(models.resnet18().train(), inputs))
    folded = fuse(trained, inputs)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert all(entry.fused for entry in fusion_report(folded) if isinstance(entry, Epilogue))
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), trained(inputs), rtol=1e-4, atol=1e-4)


MOVES = {
    "relu": (nn.ReLU(), layers.MaxPool2d(2)),
    "in place": (nn.ReLU(inplace=True), layers.MaxPool2d(3, 2, 1)),
    "relu6": (nn.ReLU6(), nn.MaxPool2d(2)),
    "hardtanh": (nn.Hardtanh(-0.25, 0.25), layers.AdaptiveMaxPool2d(3)),
}
STAYS = {
    "sigmoid": (nn.Sigmoid(), layers.MaxPool2d(2)),
    "average": (nn.ReLU(), layers.AvgPool2d(2)),
    "indices": (nn.ReLU(), layers.MaxPool2d(2, return_indices=True)),
    "dilation": (nn.ReLU(), layers.MaxPool2d(2, dilation=2)),
}


@pytest.mark.parametrize("name", MOVES)
def test_an_activation_moves_behind_the_max_pooling_that_reads_it(name):
    activation, pooling = MOVES[name]
    model = nn.Sequential(layers.Conv2d(3, 4, 3, padding=1), activation, pooling, layers.Conv2d(4, 2, 1)).train()
    inputs = torch.randn(2, 3, 9, 9).round()  # with ties
    fused = fuse(model, inputs)
    assert str(fusion_report(fused)[0]) == "1: behind 2"
    assert [node.target for node in fused.graph.nodes][1:-1] == ["0", "2", "1", "3"]
    results = []
    for module in (fused, model):
        leaf = inputs.clone().requires_grad_()
        output = module(leaf)
        results.append([output, *torch.autograd.grad(output.cos().sum(), [leaf, *module.parameters()])])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert type(fuse(fused)) is type(model) or fuse(fused) is fused


@pytest.mark.parametrize("name", STAYS)
def test_other_activations_and_poolings_keep_their_order(name):
    activation, pooling = STAYS[name]
    model = nn.Sequential(layers.Conv2d(3, 4, 3), activation, pooling).train()
    assert fuse(model) is model
    model = Block(lambda m, x: (y := m.relu(m.other(x))).sum() + F.max_pool2d(y, 2)).train()
    assert fuse(model) is model


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50])
def test_resnets_fuse_completely(build):
    torch.manual_seed(0)
    model, inputs = warmed(build(num_classes=10)), torch.randn(2, 3, 40, 40)
    for module in model.modules():  # random statistics blow up through fifty layers
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.weight.data.uniform_(0.3, 0.6)
    twin = copy.deepcopy(model)
    fused = fuse(model, inputs)
    kinds = {type(module) for module in fused.modules()}
    assert not kinds & {layers.Conv2d, layers.BatchNorm2d, nn.ReLU, nn.Identity}
    assert not [node for node in fused.graph.nodes if node.op == "call_function" and node.target is not torch.flatten]
    with torch.no_grad():
        expected = twin(inputs)
        assert torch.allclose(fused(inputs), expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    if build is models.resnet50:
        return
    trained, twin = fuse(twin.train(), inputs), copy.deepcopy(twin)
    kinds = {type(module) for module in trained.modules()}
    assert layers.BatchNormReLU2d in kinds and layers.BatchNormAddReLU2d in kinds and nn.ReLU not in kinds
    left = [name for name, module in trained.named_modules() if type(module) is layers.BatchNorm2d]
    assert all("downsample" in name for name in left)
    grads = []
    for module in (trained, twin):
        module.double()(inputs.double()).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(dict(trained.state_dict()), dict(twin.state_dict()))


def read_twice(model, x):
    output = model.conv(x)
    return F.relu(output) + output.sum()


def returned_too(model, x):
    output = model.conv(x)
    return F.relu(output), output


def changed_input(model, x):
    x = model.other(x)
    output = model.conv(x)
    x *= 2
    return F.relu(output + x)


def changed_view(model, x):
    x = model.other(x)
    output = model.conv(x)
    x.view(-1).mul_(2)
    return F.relu(output + x)


def written_over(model, x):
    shortcut = model.other(x)
    shortcut += model.conv(x)
    return F.relu(shortcut) + shortcut


def changed_by_relu6(model, x):
    x = model.other(x)
    output = model.conv(x)
    return F.relu6(x, True) + F.relu(output)


def hooked(model, x):
    return F.relu(model.conv(x))


@pytest.mark.parametrize("wiring,reason", [
    (read_twice, "the output of conv is read elsewhere too"),
    (returned_too, "the output of conv is read elsewhere too"),
    (lambda m, x: F.relu(m.conv(F.relu(m.conv(x)))), "it is called several times"),
    (changed_input, "may change its input before the end"),
    (changed_view, "may change its input before the end"),
    (changed_by_relu6, "may change its input before the end"),
    (lambda m, x: m.relu(m.conv(x) + x[:, :1]), "what is added has another size or dtype"),
    (hooked, "it has hooks"),
])  # fmt: skip
def test_refusals(wiring, reason):
    model, inputs = Block(wiring).eval(), torch.randn(2, 6, 5, 5)
    if wiring is hooked:
        model.conv.register_forward_hook(lambda module, args, output: output - 0.1)
    with torch.no_grad():
        expected = model(inputs.clone())
        fused = fuse(model, inputs.clone())
        if reason in ("it has hooks", "it is called several times"):
            assert type(fused.conv) is layers.Conv2d
        else:  # on its own it still keeps its weight packed
            assert type(fused.conv) is layers.ConvAddReLU and str(fused.conv.relu) == "none"
        torch.testing.assert_close(fused(inputs.clone()), expected)
    report = epilogues(model)
    if "size" not in reason:  # sizes are known to `fuse` alone, by its example
        assert any(line.startswith("conv: not with") and line.endswith(reason) for line in report), report


def test_the_later_layer_takes_a_shared_addition_and_the_other_operand_may_not_be_written():
    model = Block(lambda m, x: F.relu(m.other(x) + m.conv(x))).eval()
    assert "conv: with add and relu" in epilogues(fuse(model))
    model = Block(written_over).eval()
    inputs = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        expected = model(inputs)
        fused = fuse(model, inputs)
        torch.testing.assert_close(fused(inputs), expected)
    assert any("the sum is written over its other operand" in line for line in epilogues(model))


def test_layers_of_torch_are_left_and_said_so():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    assert fuse(model) is model
    assert epilogues(model) == ["0: not with relu, it is computed by torch: convert() the model first"]
    assert epilogues(fuse(convert(model))) == ["0: with relu"]


def test_batch_norms_that_cannot_fold_take_the_relu_in_eval_mode_too():
    model = warmed(nn.Sequential(layers.BatchNorm2d(4), nn.ReLU(), layers.Conv2d(4, 4, 3)))
    inputs = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = model(inputs)
        fused = fuse(model, inputs)
        torch.testing.assert_close(fused(inputs), expected)
    assert [type(module) for module in fused.children()] == [layers.BatchNormReLU2d, layers.ConvAddReLU]


def test_a_broadcast_addition_raises_where_no_example_told_of_it():
    fused = fuse(Block(lambda m, x: m.relu(m.conv(x) + x[:, :1])).eval())
    with torch.no_grad(), pytest.raises(RuntimeError, match="residual"):
        fused(torch.randn(2, 6, 5, 5))


def test_frozen_batch_norms_stay_frozen_and_examples_leave_no_trace():
    model = nn.Sequential(layers.Conv2d(2, 4, 3), layers.BatchNorm2d(4), nn.ReLU(), nn.Dropout()).train()
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fused = fuse(model, torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state)
    assert not fused.get_submodule("1").training and fused.training and fused.get_submodule("3").training


@pytest.mark.parametrize("followers", [[nn.ReLU()], []], ids=["relu", "nothing"])
def test_a_convolution_without_bias(followers):
    model = nn.Sequential(layers.Conv2d(3, 6, 3, bias=False), *followers, layers.Conv2d(6, 2, 1, bias=False)).eval()
    inputs, fused = torch.randn(2, 3, 9, 9), fuse(model)
    assert [type(module) for module in fused.children()] == [layers.ConvAddReLU] * 2
    assert fused.state_dict().keys() == model.state_dict().keys()
    expected = model(inputs)
    torch.testing.assert_close(fused(inputs), expected)  # recording gradients
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs), expected)


def test_compile_of_a_fused_model():
    model, inputs = warmed(Block(WIRINGS["+="][0])), torch.randn(2, 6, 7, 7)
    fused = fuse(model)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs), fused(inputs))
