"""fuse: which batch norms fold, which do not and why, and that the outputs stay (lecture item L15)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import torch_convlab
from torch_convlab import convert, fuse, fusion_report, models
from torch_convlab._fold import Fusion


def warmed(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and weights that are not the initial zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def reasons(model: nn.Module) -> list[str]:
    return [fusion.reason for fusion in folds(model)]


def folds(model: nn.Module) -> list[Fusion]:
    return [entry for entry in fusion_report(model) if isinstance(entry, Fusion)]


def check_folds(model: nn.Module, *size: int, dtype=torch.float32, tolerance=1e-5) -> nn.Module:
    model, inputs = warmed(model).to(dtype), torch.randn(*size, dtype=dtype)
    expected = model(inputs)
    for result in (fuse(model, inputs), model):
        assert not [module for module in result.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        with torch.no_grad():
            assert torch.allclose(result(inputs), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    return model


PAIRS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 3, bias=False), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
}


@pytest.mark.parametrize("converted", [False, True], ids=["torch", "ours"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_pair_folds(name, converted):
    producer, norm, size = copy.deepcopy(PAIRS[name])
    model = nn.Sequential(producer, norm, nn.ReLU())
    check_folds(convert(model) if converted else model, *size)
    assert type(model[1]) is nn.Identity


def test_batch_norm_with_relu_folds_into_relu():
    block = torch_convlab.nn.ConvBNReLU2d(3, 4, 3)
    pair = nn.Sequential(nn.Linear(4, 5), torch_convlab.nn.BatchNormReLU1d(5))
    model = check_folds(nn.Sequential(block, torch_convlab.nn.GlobalAvgPool2d(flatten=True), pair), 2, 3, 8, 8)
    assert type(model[0].bn) is nn.ReLU and type(model[2][1]) is nn.ReLU


def test_dtypes():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 3e-2)):
        model = check_folds(
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), 2, 3, 8, 8, dtype=dtype, tolerance=tolerance
        )
        assert model[0].weight.dtype == model[0].bias.dtype == dtype


@pytest.mark.parametrize("layers", [nn, torch_convlab.nn], ids=["torch", "ours"])
def test_resnet_folds_completely(layers):
    model = warmed(models.resnet18(layers=layers))
    inputs = torch.randn(1, 3, 64, 64)
    expected = model(inputs)
    fused = fuse(model)
    report = folds(fused)
    assert len(report) == 20 and all(fusion.folds for fusion in report)
    assert str(report[0]) == "bn1: folded into conv1"
    for result in (fused, model):
        with torch.no_grad():
            assert torch.allclose(result(inputs), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert len(folds(pickle.loads(pickle.dumps(model)))) == 20


def test_the_report_before_and_after_and_a_second_call():
    model = warmed(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2)))
    before = folds(model)
    assert [fusion.folds for fusion in before] == [True, False]
    assert str(before[1]) == "3: left alone, what it reads is a ReLU"
    assert folds(fuse(model)) == before == folds(fuse(model))


def test_requires_grad_and_memory_format_stay():
    model = warmed(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    fuse(model)
    assert not model[0].weight.requires_grad and model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Branch(nn.Module):
    """conv and bn, used as `wiring` says."""

    def __init__(self, wiring):
        super().__init__()
        self.conv, self.bn, self.wiring = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), wiring

    def forward(self, input, plain=None):
        if plain is not None:
            return self.conv(input)
        return self.wiring(self, input)


def read_twice(model, input):
    output = model.conv(input)
    return model.bn(output) + output


def norm_twice(model, input):
    return model.bn(model.bn(model.conv(input)))


def conv_twice(model, input):
    return model.bn(model.conv(model.conv(input)))


def reads_weight(model, input):
    return model.bn(model.conv(input)) + model.conv.weight.sum()


def value_dependent(model, input):
    output = model.bn(model.conv(input))
    return output if output.sum() > 0 else -output


@pytest.mark.parametrize(
    "wiring,reason",
    [
        (read_twice, "the output of conv is read elsewhere too"),
        (norm_twice, "it is called several times"),
        (conv_twice, "conv is called several times"),
        (reads_weight, "forward reads the parameters"),
    ],
)
def test_pairs_that_do_not_stand_alone_are_left(wiring, reason):
    model, inputs = warmed(Branch(wiring)), torch.randn(2, 2, 4, 4)
    assert reasons(model)[0].startswith(reason)
    expected = model(inputs)
    assert torch.equal(fuse(model, inputs)(inputs), expected) and type(model.bn) is nn.BatchNorm2d


def test_optional_arguments_are_traced_at_their_default():
    check_folds(Branch(lambda model, input: model.bn(model.conv(input))), 2, 2, 4, 4)


class BranchThenHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Branch(value_dependent), pair()

    def forward(self, input):
        return self.head(self.body(input))


def test_untraceable_models_fall_back_to_sequential():
    model, inputs = warmed(BranchThenHead()), torch.randn(2, 2, 4, 4)
    expected = model(inputs)
    with pytest.warns(UserWarning, match=r"cannot trace BranchThenHead \(TraceError.*Sequential are folded"):
        fuse(model, inputs)
    assert type(model.head[1]) is nn.Identity and type(model.body.bn) is nn.BatchNorm2d
    assert torch.allclose(model(inputs), expected, atol=1e-5)


def test_a_forward_set_on_the_instance_is_not_traced():
    model = warmed(Branch(read_twice))
    model.forward = lambda input: model.bn(model.conv(input))
    with pytest.warns(UserWarning, match="its forward is set on the instance"):
        assert not fusion_report(model)[0].folds


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


def hooked():
    model = pair()
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def hooked_container():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.BatchNorm2d(2))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def tied():
    first, second = pair(), pair()
    second[0].weight = first[0].weight
    return nn.Sequential(first, second)


def subclassed():
    model = pair()
    model[0].__class__ = type("MyConv2d", (nn.Conv2d,), {})
    return model


@pytest.mark.parametrize(
    "build,reason",
    [
        (hooked, "one of the two has hooks"),
        (hooked_container, "what it reads is a Sequential"),
        (tied, "its parameters are shared with another layer"),
        (subclassed, "it does not read the output of a layer"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), "it has no running"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.SyncBatchNorm(2)), "its type is SyncBatchNorm"),
        (lambda: nn.Sequential(nn.BatchNorm2d(2)), "it does not read the output of a layer"),
    ],
)
def test_what_must_not_fold_does_not(build, reason):
    model = warmed(build())
    assert all(found.startswith(reason) for found in reasons(model)) and reasons(model)
    state = copy.deepcopy(model.state_dict())
    fuse(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_norm_left_in_training_mode_does_not_fold():
    model = warmed(pair())
    model[1].train()
    assert reasons(model) == ["it is in training mode"]


def test_changed_outputs_raise_and_are_undone():
    model = warmed(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))  # reads 2 x 3 x 4: the norm is over dimension 1
    inputs = torch.randn(2, 3, 4)
    expected, keys = model(inputs), list(model.state_dict())
    with pytest.raises(RuntimeError, match="changed the results beyond rounding and was undone: output 0 differs by"):
        fuse(model, inputs)
    assert torch.equal(model(inputs), expected) and list(model.state_dict()) == keys
