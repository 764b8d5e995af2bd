"""The settings of `auto`: algorithm, precision, autotune and its cache file."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from helpers import run_python

import torch_convlab
from torch_convlab import backends
from torch_convlab.functional import conv2d, conv_fused, pack_weight


@pytest.fixture(autouse=True)
def restore(tmp_path):
    with backends.flags():
        backends.cache_path = tmp_path / "cache" / "algorithms.json"
        yield
    backends.cache_path = None
    backends.clear()


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 32, 20, 20, generator=generator), torch.randn(32, 32, 3, 3, generator=generator)


def run_as(algorithm, layer):
    return conv2d(*layer, padding=1, algorithm=algorithm)


def test_defaults():
    assert (backends.algorithm, backends.precision, backends.autotune) == ("auto", "high", False)


def test_precision_highest_leaves_winograd_out(layer):
    winograd = run_as("winograd", layer)
    assert torch.equal(run_as("auto", layer), winograd)
    with backends.flags(precision="highest"):
        assert backends.precision == "highest"
        chosen = torch_convlab.explain_convolution((1, 32, 20, 20), (32, 32, 3, 3), padding=1).chosen
        assert chosen in ("implicit_gemm", "direct", "amx")  # the instruction set decides
        assert torch.equal(run_as("auto", layer), run_as(chosen, layer))
        assert not torch.equal(run_as("auto", layer), winograd)
        assert torch.equal(run_as("winograd", layer), winograd)  # who names it gets it
    assert torch.equal(run_as("auto", layer), winograd)


def test_algorithm_is_taken_where_it_does_not_refuse(layer):
    with backends.flags(algorithm="naive"):
        assert torch.equal(run_as("auto", layer), run_as("naive", layer))
    with backends.flags(algorithm="depthwise"):
        assert torch.equal(run_as("auto", layer), run_as("winograd", layer))


def test_flags_nest_and_are_restored_after_an_error():
    with pytest.raises(KeyError), backends.flags(algorithm="naive"):
        with backends.flags(autotune=True, precision="highest", reuse_memory=False):
            assert (backends.algorithm, backends.precision, backends.autotune) == ("naive", "highest", True)
            assert not backends.reuse_memory
        assert (backends.algorithm, backends.precision, backends.autotune) == ("naive", "high", False)
        assert backends.reuse_memory
        raise KeyError
    assert backends.algorithm == "auto"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("algorithm", "fft", "one of auto, naive"),
        ("precision", "low", "high, highest"),
        ("autotune", 1, "True or False"),
        ("reuse_memory", "no", "True or False"),
    ],
)
def test_wrong_values(name, value, expected):
    with pytest.raises(ValueError, match=f"expected {name} to be .*{expected}"):
        setattr(backends, name, value)


def test_autotune_measures_each_problem_once(layer):
    with backends.flags(autotune=True):
        first = run_as("auto", layer)
        (key,), ((chosen, seconds),) = backends.tuned().keys(), backends.tuned().values()
        assert "forward float32 channels_first" in key and "channels=32->32" in key and "input=1x20x20" in key
        assert set(seconds) >= {"implicit_gemm", "winograd"} and min(seconds.values()) > 0
        assert chosen == min(seconds, key=seconds.get)
        assert torch.equal(first, run_as(chosen, layer))
        assert torch.equal(run_as("auto", layer), first)
        assert backends.tuned() == {key: (chosen, seconds)}


def test_autotuned_gradients(layer):
    input, weight = (tensor.clone().requires_grad_() for tensor in layer)
    with backends.flags(autotune=True):
        conv2d(input, weight, padding=1).square().sum().backward()
        assert sorted(key.split()[0] for key in backends.tuned()) == ["backward_input", "backward_weight", "forward"]
    reference = [tensor.detach().double().requires_grad_() for tensor in layer]
    torch.nn.functional.conv2d(*reference, padding=1).square().sum().backward()
    for ours, theirs in zip((input, weight), reference):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-5 * theirs.grad.abs().max().item())


def test_autotune_measures_with_the_weight_that_a_fused_layer_keeps(layer):
    input, weight = layer
    with backends.flags(autotune=True):
        packed = pack_weight(input, weight, padding=1)
        ((key, (chosen, seconds)),) = backends.tuned().items()
        output = conv_fused(input, weight, padding=1, packed=packed)
        assert key.endswith(" packed") and list(backends.tuned()) == [key] and len(seconds) > 1
        run_as("auto", layer)
        assert len(backends.tuned()) == 2  # without a packed weight it is another problem
    expected = pack_weight(input, weight, padding=1, algorithm=chosen)
    assert packed.numel() == expected.numel() and torch.equal(packed[:64], expected[:64])  # the headers
    assert torch.equal(output, run_as(chosen, layer))


def test_autotune_and_precision(layer):
    with backends.flags(autotune=True):
        run_as("auto", layer)
        with backends.flags(precision="highest"):
            found = run_as("auto", layer)
    others = [run_as(name, layer) for name in ("naive", "implicit_gemm", "direct", "amx")]
    assert any(torch.equal(found, other) for other in others)  # which one was the fastest, a loaded machine decides
    assert not torch.equal(found, run_as("winograd", layer))


def test_cache_file_round_trip(layer):
    with backends.flags(autotune=True):
        run_as("auto", layer)
    choices = backends.tuned()
    path = backends.save()
    assert path == backends.cache_path
    backends.clear()
    assert backends.tuned() == {}
    assert backends.load() == 1
    assert backends.tuned() == choices


def test_a_choice_from_the_file_is_followed(layer):
    with backends.flags(autotune=True):
        run_as("auto", layer)
    path = backends.save()
    content = json.loads(path.read_text())
    for entry in content["choices"].values():
        entry[0] = "naive"
    path.write_text(json.dumps(content))
    backends.clear()
    backends.load()
    with backends.flags(autotune=True):
        assert torch.equal(run_as("auto", layer), run_as("naive", layer))


def test_missing_file_is_no_choices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.load() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("\x00\xff", "cannot be read"),
        ("[]", "not such a file"),
        ('{"format": 1}', "not such a file"),
        (
            '{"format": 1, "cpu": "", "instruction_set": "", "version": "", "torch": "", "choices": {"a": 1}}',
            "not such",
        ),
    ],
)
def test_corrupt_file_is_ignored(content, reason):
    backends.cache_path.parent.mkdir()
    backends.cache_path.write_text(content)
    with pytest.warns(UserWarning, match=reason):
        assert backends.load() == 0
    assert backends.tuned() == {}


def test_foreign_file_is_ignored(layer):
    with backends.flags(autotune=True):
        run_as("auto", layer)
    path = backends.save()
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    backends.clear()
    with pytest.warns(UserWarning, match="it is of torch '1.0' instead of"):
        assert backends.load() == 0


def test_saved_when_the_process_ends(tmp_path):
    program = """
import torch, torch_convlab
torch_convlab.backends.autotune = True
torch_convlab.functional.conv2d(torch.ones(1, 16, 8, 8), torch.ones(16, 16, 3, 3))
print(len(torch_convlab.backends.tuned()))
"""
    path = tmp_path / "saved.json"
    assert run_python(program, TORCH_CONVLAB_CACHE=str(path)).strip() == "1"
    assert len(json.loads(path.read_text())["choices"]) == 1
    backends.cache_path = path
    assert backends.load() == 1
