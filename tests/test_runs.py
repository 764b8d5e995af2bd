"""Runs of fused convolutions that are called together (torch_convlab/_runs.py): the same results, whatever is done."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from test_fuse import warmed
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

import torch_convlab.nn as layers
from torch_convlab import _C, fuse, models
from torch_convlab._runs import RunningGraphModule


class Wired(nn.Module):
    """Convolutions a to d, of which b takes a residual addition where `wiring` has one."""

    def __init__(self, wiring):
        super().__init__()
        self.a, self.b = layers.Conv2d(3, 8, 3, padding=1), layers.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = layers.Conv2d(8, 8, 1), layers.Conv2d(8, 4, 1)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.wiring = wiring

    def forward(self, input):
        return self.wiring(self, input)


def chain(m, x):
    return m.d(m.relu(m.c(m.relu(m.b(m.relu(m.a(x)))))))


WIRINGS = {  # and how many layers each of the runs has, identities of folded batch norms included
    "chain": (chain, [4]),
    "batch norm": (lambda m, x: (lambda y: m.relu(m.b(y) + y))(m.bn(m.c(m.relu(m.a(x))))), [4]),
    "residual": (lambda m, x: (lambda y: m.d(m.relu(m.c(m.relu(m.b(y))) + y)))(m.relu(m.a(x))), [4]),
    "residual from outside": (lambda m, x: m.d(m.relu(m.c(m.relu(m.a(x[:, :3]))) + x)), [3]),
    "value read outside": (
        lambda m, x: (lambda y: m.d(m.relu(m.c(y))) + y[:, :4])(m.relu(m.b(m.relu(m.a(x))))),
        [2],
    ),
    "first value returned": (lambda m, x: (lambda y: (y, m.d(m.relu(m.c(y)))))(m.relu(m.a(x))), [2]),
    "others between": (lambda m, x: m.d(m.relu(m.c(m.relu(m.b(torch.sin(m.relu(m.a(x))))))).cos()), [2]),
    "alone": (lambda m, x: torch.sin(m.relu(m.a(x))), []),
    "layer called twice": (lambda m, x: m.d(m.relu(m.b(m.relu(m.b(m.relu(m.a(x))))))), []),
}


def fused(wiring=chain, seed=0):
    torch.manual_seed(seed)
    return fuse(warmed(Wired(wiring)))


def images(channels=3):
    return torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(1))


def by_layers(model, *inputs):
    """What the graph says, node by node."""
    return fx.Interpreter(model).run(*inputs)


@pytest.mark.parametrize("name", WIRINGS)
def test_a_run_computes_what_its_layers_do(name):
    wiring, sizes = WIRINGS[name]
    model, input = fused(wiring), images(8 if name == "residual from outside" else 3)
    assert isinstance(model, RunningGraphModule) and [len(run._paths) for run in model._runs] == sizes
    with torch.no_grad():
        torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)


@pytest.mark.parametrize("build", [models.resnet18, models.resnet50])
def test_all_but_the_stem_of_a_resnet_is_one_run(build):
    torch.manual_seed(0)
    model = fuse(warmed(build(num_classes=10)))
    assert len(model._runs) == 1
    convolutions = sum(type(module) is layers.ConvAddReLU for module in model.modules())
    assert sum(type(model.get_submodule(".".join(path))) is layers.ConvAddReLU for path in model._runs[0]._paths) == (
        convolutions - 1
    )
    input = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)


def test_every_step_takes_the_short_way_and_dead_values_are_let_go():
    model, input = fused(), images()
    (run,) = model._runs
    values = [input]
    with torch.no_grad():
        assert _C.run(run._program, values) == 4
    assert values[:4] == [None] * 4 and torch.is_tensor(values[4])
    values = [input]  # with gradients, none does
    assert _C.run(run._program, values) == 0 and values == [input]


@torch.no_grad()
def test_a_layer_that_needs_the_usual_way_ends_the_run_and_the_rest_follows():
    model, input = fused(), images()
    expected, values = model(input), [input]
    model.c.padding = "valid"
    assert _C.run(model._runs[0]._program, values) == 2
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_dtypes_and_errors(dtype):
    model = fused()
    model.c.to(dtype)
    with pytest.raises(RuntimeError, match="should be the same"):
        model(images())
    model.to(dtype)
    torch.testing.assert_close(model(images().to(dtype)), by_layers(model, images().to(dtype)), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="channels"):
        model(images(4).to(dtype))


def test_gradients_are_those_of_the_layers():
    model, input = fused(), images()
    results = []
    for forward in (model, lambda x: by_layers(model, x)):
        leaf = input.clone().requires_grad_()
        results.append(torch.autograd.grad(forward(leaf).square().sum(), [leaf, *model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    tangent = torch.ones_like(input)
    _, actual = torch.func.jvp(model, (input,), (tangent,))
    _, expected = torch.func.jvp(lambda x: by_layers(model, x), (input,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    batched = torch.func.vmap(lambda x: model(x[None])[0])(input)
    torch.testing.assert_close(batched, by_layers(model, input))


@torch.no_grad()
def test_hooks_run():
    model, input = fused(), images()
    expected = model(input)
    seen = []
    handle = model.b.register_forward_hook(lambda module, args, output: seen.append(module))
    model(input)
    assert seen == [model.b]
    handle.remove()
    handle = model.c.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
    assert not torch.equal(model(input), expected)
    handle.remove()
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(input)
    finally:
        handle.remove()
    assert set(seen) == {model, model.a, model.b, model.c, model.d}
    assert torch.equal(model(input), expected) and len(seen) == 6


@torch.no_grad()
def test_hooks_of_identities_run():
    model, seen = fused(WIRINGS["batch norm"][0]), []
    model.bn.register_forward_hook(lambda module, args, output: seen.append(module))
    model(images())
    assert seen == [model.bn]


@torch.no_grad()
def test_changes_after_fusing_count():
    model, input = fused(), images()
    before = model(input)
    model.b.weight = nn.Parameter(2 * model.b.weight)  # another tensor
    assert not torch.equal(model(input), before)
    torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)
    model.b.weight.mul_(0.5)  # in place
    torch.testing.assert_close(model(input), before)
    model.b.bias = None
    torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)
    model.load_state_dict(fused(seed=1).state_dict(), strict=False)
    torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)
    model.c = nn.Identity()  # another layer
    torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)
    for algorithm in ("naive", "implicit_gemm"):
        model.b.algorithm = algorithm
        torch.testing.assert_close(model(input), by_layers(model, input), rtol=0, atol=0)
    model.b.algorithm = "depthwise"
    with pytest.raises(RuntimeError, match="depthwise"):
        model(input)


@torch.no_grad()
def test_another_container_counts():
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Sequential(layers.Conv2d(3, 8, 1), nn.ReLU()), nn.Sequential(layers.Conv2d(8, 4, 1)))

    model, other, input = fuse(build(0).eval()), fuse(build(1).eval()), images()
    model(input)
    model._modules["0"] = other._modules["0"]
    expected = by_layers(model, input)
    torch.testing.assert_close(model(input), expected, rtol=0, atol=0)
    assert not torch.equal(model._modules["0"]._modules["0"].weight, build(0)[0][0].weight)


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies(make):
    model, input = fused(), images()
    before = model(input)
    made = make(model)
    assert isinstance(made, RunningGraphModule) and not made.training
    assert len(made._runs) == 1 and made._runs[0] is not model._runs[0]
    assert torch.equal(made(input), before) and made.state_dict().keys() == model.state_dict().keys()
    if make is not copy.copy:  # which shares its layers
        made.a.weight.zero_()
        assert torch.equal(model(input), before) and not torch.equal(made(input), before)
    torch.testing.assert_close(made(input), by_layers(made, input), rtol=0, atol=0)
    again = make(made)
    assert isinstance(again, RunningGraphModule) and torch.equal(again(input), made(input))


class Doubling(layers.ConvAddReLU):
    def forward(self, *inputs):
        return 2 * super().forward(*inputs)


def doubled(forward):
    return lambda *arguments, **keywords: 2 * forward(*arguments, **keywords)


CODE = {  # what others may put in the place of a layer's code
    "forward of the instance": lambda layer, patch: patch.setattr(layer, "forward", doubled(layer.forward)),
    "forward of the class": lambda layer, patch: patch.setattr(type(layer), "forward", doubled(type(layer).forward)),
    "call of every module": lambda layer, patch: patch.setattr(nn.Module, "__call__", doubled(nn.Module.__call__)),
    "class": lambda layer, patch: setattr(layer, "__class__", Doubling),
    "compiled": lambda layer, patch: layer.__setattr__("_compiled_call_impl", doubled(layer.forward)),
}


@pytest.mark.parametrize("what", CODE)
@torch.no_grad()
def test_code_that_others_replace_runs(what, monkeypatch):
    model, input = fused(), images()
    before = model(input)
    CODE[what](model.c, monkeypatch)
    assert not torch.equal(model(input), before)
    torch.testing.assert_close(model(input), nn.Module.__call__(model, input), rtol=0, atol=0)
    assert _C.run(model._runs[0]._program, [input]) == 0


@torch.no_grad()
def test_other_dicts_of_hooks_and_modules_count():
    model, other, input, seen = fused(), fused(seed=1), images(), []
    model(input)
    model.b._forward_hooks = type(model.b._forward_hooks)()
    model.b.register_forward_hook(lambda module, args, output: seen.append(module))
    model(input)
    assert seen == [model.b]
    model._modules = dict(other._modules)
    torch.testing.assert_close(model(input), other(input), rtol=0, atol=0)


@torch.no_grad()
def test_views_of_a_weight_are_other_weights():
    model, input = fused(), images().contiguous(memory_format=torch.channels_last)
    model(input)
    for layer, axes in ((model.c, (0, 1)), (model.b, (2, 3))):
        layer.weight = nn.Parameter(layer.weight.detach().transpose(*axes))
        bias = layer.bias
        expected = torch.nn.functional.conv2d(torch.ones(1, 8, 9, 9), layer.weight, bias, padding=layer.padding).relu()
        twin = torch.ones(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
        model(input)
        torch.testing.assert_close(layer(twin), expected)
        torch.testing.assert_close(model(input), fuse(copy.deepcopy(model))(input))


@torch.no_grad()
def test_names_that_the_runs_might_take():
    torch.manual_seed(0)
    model = nn.Module()
    model.run_0, model.run, model._run_0 = (layers.Conv2d(8, 8, 1) for _ in range(3))
    model.forward = None
    wired = type(
        "Named", (nn.Module,), {"forward": lambda self, x: torch.sin(self.run_0(x)) + self.run(self._run_0(x))}
    )()
    wired.run_0, wired.run, wired._run_0 = model.run_0, model.run, model._run_0
    input = images(8)
    expected = wired.eval()(input)
    torch.testing.assert_close(fuse(wired)(input), expected)


def test_a_graph_whose_layers_are_yet_to_come():
    graph = fx.Graph()
    graph.output(graph.call_module("later", (graph.placeholder("input"),)))
    model = RunningGraphModule(nn.Module(), fx.Graph())
    model.graph = graph
    assert model._runs == []
    model.later = nn.ReLU()
    assert torch.equal(model(-torch.ones(2)), torch.zeros(2))


@torch.no_grad()
def test_a_run_keeps_nothing_alive():
    model = fused()
    model(images())
    weight, layer = weakref.ref(model.b.weight), weakref.ref(model.b)
    del model
    gc.collect()  # a graph and its module know each other
    assert weight() is None and layer() is None


def test_tracers_and_compilers_see_the_layers():
    model, input = fused(), images()
    assert "run_" not in model.code and {node.target for node in model.graph.nodes} >= {"a", "b", "c", "d"}
    with torch.no_grad():
        expected = model(input)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input), expected)
        torch.testing.assert_close(torch.export.export(model, (input,)).module()(input), expected)
        torch.testing.assert_close(torch.jit.trace(model, (input,))(2 * input), model(2 * input))
    assert fuse(model) is model  # finds nothing to do


@torch.no_grad()
def test_many_threads():
    torch.manual_seed(0)
    expand, depthwise, project = layers.Conv2d(3, 96, 1), layers.Conv2d(96, 96, 3, groups=96), layers.Conv2d(96, 8, 1)
    block = fuse(nn.Sequential(expand, nn.ReLU(), depthwise, nn.ReLU(), project).eval())
    for model, height in ((fused(), 9), (block, 60)):
        inputs = [images()[:1].repeat(1, 1, height // 9, 3 + i).to(memory_format=torch.channels_last) for i in range(4)]
        expected, right = [by_layers(model, input) for input in inputs], []

        def work(index, model=model, inputs=inputs, expected=expected, right=right):
            with torch.no_grad():
                right.append(all(torch.equal(model(inputs[index]), expected[index]) for _ in range(50)))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert right == [True] * 4
