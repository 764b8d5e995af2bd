"""What the package says of itself, its geometry, and that importing it changes nothing else."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from cases import CASES
from helpers import run_python

import torch_convlab
from torch_convlab import _C


def test_algorithms():
    algorithms = torch_convlab.algorithms()
    assert next(iter(algorithms)) == "naive"
    assert "auto" not in algorithms
    for name, description in algorithms.items():
        assert re.fullmatch("[a-z_]+", name) and len(description) > 20


def test_build_info():
    info = torch_convlab.build_info()
    assert info["version"] == torch_convlab.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["torch"] == torch.__version__
    assert info["cpp_standard"] >= 202002
    assert info["openmp"] > 0, "without OpenMP parallel_for is serial"
    assert info["instruction_set"] in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("package", [torch_convlab.functional, torch_convlab.nn], ids=["functional", "nn"])
def test_exports_exist_and_are_documented(package):
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert (getattr(package, name).__doc__ or "").strip(), f"{name} has no docstring"


def torch_parameters(function) -> list[tuple[str, str]]:
    """(name, default) of a function of torch.nn.functional: of its signature, or for a built-in, of its docstring."""
    try:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, "" if p.default is p.empty else repr(p.default)) for p in parameters]
    except ValueError:
        text = re.search(r"\w+\((.*?)\) -> ", function.__doc__, re.DOTALL).group(1)
        pieces = [piece.partition("=") for piece in text.split(", ")]
        return [(name.strip(), default.strip()) for name, _, default in pieces]


SAME_SIGNATURE = [name for name in torch_convlab.functional.__all__ if hasattr(torch.nn.functional, name)]


@pytest.mark.parametrize("name", SAME_SIGNATURE)
def test_signatures_are_torchs(name):
    """Names, order and defaults; ours may add keyword-only arguments at the end."""
    ours = inspect.signature(getattr(torch_convlab.functional, name)).parameters.values()
    shared = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = torch_parameters(getattr(torch.nn.functional, name))
    if theirs[0][0] == "args":
        pytest.skip("torch dispatches *args on a flag; the OpInfo samples cover the order")
    assert [p.name for p in shared] == [name for name, _ in theirs]
    for parameter, (_, default) in zip(shared, theirs):
        actual = "" if parameter.default is parameter.empty else repr(parameter.default)
        assert actual == default, f"{parameter.name}: {actual}, torch has {default}"


@pytest.mark.parametrize("name", [name for name in torch_convlab.nn.__all__ if hasattr(torch.nn, name)])
def test_layers_only_replace_the_computation(name):
    """A layer is torch's class with the same constructor, so state_dict, repr and hooks cannot differ."""
    ours, theirs = getattr(torch_convlab.nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    assert ours.__name__ == theirs.__name__ and ours.__module__.startswith("torch_convlab.nn")
    assert ours.state_dict is theirs.state_dict and ours.__repr__ is theirs.__repr__
    assert ours.__setstate__ is theirs.__setstate__ if hasattr(theirs, "__setstate__") else True


def test_import_changes_nothing_of_torch():
    """torch.nn, torch.nn.functional, the default dtype, the threads and the random state are as before."""
    run_python(
        "import torch\n"
        "def look():\n"
        "    names = [(m.__name__, k, id(v)) for m in (torch.nn, torch.nn.functional, torch)\n"
        "             for k, v in vars(m).items() if not k.startswith('_')]\n"
        "    classes = [(k, c) for k, c in vars(torch.nn).items() if isinstance(c, type)]\n"
        "    methods = [(k, j, id(v)) for k, c in classes for j, v in vars(c).items()]\n"
        "    state = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().sum().item()\n"
        "    return set(names), set(methods), state\n"
        "before = look()\n"
        "import torch_convlab\n"
        "after = look()\n"
        "for old, new in zip(before[:2], after[:2]): assert old <= new, sorted(map(str, old - new))[:5]\n"
        "assert before[2] == after[2]\n"
    )


# --- Geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.transposed], ids=str)
def test_geometry_of_every_case(case):
    batch, channels, *input = case.input
    geometry = _C.ConvGeometry(
        batch=batch, in_channels=channels, out_channels=case.out_channels, input=input, kernel=case.kernel,
        stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups,
    )  # fmt: skip
    assert geometry.output == [1] * (3 - case.dims) + list(case.output[2:])
    assert geometry.multiply_adds() == case.multiply_adds
    layer = getattr(torch.nn, f"Conv{case.dims}d")(
        channels, case.out_channels, case.kernel, groups=case.groups, bias=case.bias, device="meta"
    )
    assert geometry.parameters(case.bias) == sum(parameter.numel() for parameter in layer.parameters())
    tensors = (torch.empty(size, device="meta").numel() for size in (case.input, case.weight, case.output))
    assert geometry.bytes(2) == 2 * sum(tensors)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooled_size_is_torchs(ceil_mode):
    for input in range(1, 14):
        for kernel in range(1, 5):
            for stride in range(1, 5):
                for padding in range(kernel // 2 + 1):
                    for dilation in (1, 2, 3):
                        size = _C.pooled_size(input, kernel, stride, padding, dilation, ceil_mode)
                        arguments = kernel, stride, padding, dilation, ceil_mode
                        try:
                            pooled = torch.nn.functional.max_pool1d(
                                torch.empty(1, 1, input, device="meta")[..., None, :][:, :, 0], *arguments
                            )
                        except RuntimeError:
                            assert size <= 0
                        else:
                            assert size == pooled.shape[-1], (input, *arguments)


def test_geometry_refuses_nonsense():
    with pytest.raises(ValueError, match=r"stride to have 2 values.*got 3"):
        _C.ConvGeometry(batch=1, in_channels=1, out_channels=1, input=[5, 5], kernel=[3, 3], stride=[1, 1, 1])
    with pytest.raises(ValueError, match="stride to be positive, but got 0"):
        _C.ConvGeometry(batch=1, in_channels=1, out_channels=1, input=[5], kernel=[3], stride=[0])
    with pytest.raises(ValueError, match="groups=2"):
        _C.ConvGeometry(batch=1, in_channels=3, out_channels=4, input=[5], kernel=[3], groups=2)


def test_receptive_field_center():
    """Same padding keeps output 0 over input 0; without padding it moves to the middle of its window."""
    field = _C.ReceptiveField()
    field.step(3, stride=2, padding=1)
    field.step(5, stride=1, padding=2)
    assert (field.size, field.jump, field.center) == (3 + 4 * 2, 2, 0.0)
    field.step(3, dilation=2)
    assert (field.size, field.center) == (11 + 4 * 2, 4.0)


def vectors_choice(choice):
    """What `auto` takes, or would take if the CPU had no tiles."""
    if choice.chosen != "amx":
        return choice.chosen
    costs = {name: verdict.cost for name, verdict in choice.verdicts.items() if verdict.cost is not None}
    del costs["amx"]
    return min(costs, key=costs.get)


def test_explain_convolution():
    """The choice and each algorithm's verdict: a reason or a cost, never both."""
    choice = torch_convlab.explain_convolution((1, 64, 56, 56), (64, 64, 3, 3), padding=1)
    assert vectors_choice(choice) == "winograd"
    assert choice.verdicts.keys() == torch_convlab.algorithms().keys()
    assert all((verdict.refusal is None) != (verdict.cost is None) for verdict in choice.verdicts.values())
    assert "groups" in choice.verdicts["depthwise"].refusal
    assert choice.verdicts["naive"].cost > choice.verdicts["implicit_gemm"].cost > choice.verdicts["winograd"].cost
    strided = torch_convlab.explain_convolution((1, 96, 56, 56), (64, 96, 3, 3), stride=3, padding=1)
    assert vectors_choice(strided) == "implicit_gemm" and "stride" in strided.verdicts["winograd"].refusal
    assert vectors_choice(torch_convlab.explain_convolution((1, 32, 9, 9), (32, 1, 3, 3), groups=32)) == "depthwise"
    wide = {"input_size": (8, 512, 28, 28), "weight_size": (512, 512, 1, 1), "memory_format": torch.channels_last}
    expected = "strassen" if torch_convlab.build_info()["instruction_set"] == "avx512" else "implicit_gemm"
    assert vectors_choice(torch_convlab.explain_convolution(**wide)) == expected
    assert vectors_choice(torch_convlab.explain_convolution(**wide, dtype=torch.float64)) == "implicit_gemm"
    with torch_convlab.backends.flags(precision="highest"):
        assert torch_convlab.explain_convolution(**wide).chosen in ("implicit_gemm", "amx")


def test_explain_convolution_with_vectors():
    """Choices that were measured on CPUs without tiles."""
    if torch_convlab.build_info()["multiplies_tiles"]:
        pytest.skip("this CPU multiplies tiles")
    stem = torch_convlab.explain_convolution((1, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    assert vectors_choice(stem) == "winograd"  # 144 multiplications for 9 outputs instead of 441
    dilated = {"input_size": (1, 256, 28, 28), "weight_size": (256, 256, 3, 3)}
    assert vectors_choice(torch_convlab.explain_convolution(**dilated, padding=2, dilation=2)) == "winograd"
    # Most taps lie in the padding, where a product leaves them out.
    assert vectors_choice(torch_convlab.explain_convolution(**dilated, padding=24, dilation=24)) == "implicit_gemm"
    for input_size, weight_size, chosen in (
        ((1, 256, 2000), (256, 256, 3), "winograd"),  # half of the multiplications
        ((1, 16, 2000), (16, 16, 3), "direct"),  # too few channels to pay for the transforms
        ((1, 128, 8, 14, 14), (128, 128, 3, 1, 1), "winograd"),  # one line of taps, too
        ((1, 64, 56, 56), (64, 64, 7, 7), "winograd"),  # four segments
        ((1, 24, 56, 56), (144, 24, 1, 1), "direct"),  # sums of 24 terms
    ):
        last = {"memory_format": torch.channels_last}
        assert vectors_choice(torch_convlab.explain_convolution(input_size, weight_size, **last)) == chosen
    with pytest.raises(ValueError, match="memory_format"):
        torch_convlab.explain_convolution((1, 8, 9, 9), (8, 8, 3, 3), memory_format=torch.preserve_format)
    # Each pass of a strided layer has the same number of products; the gradient of its input is written in parts.
    for pass_ in ("forward", "backward_input", "backward_weight"):
        strided = torch_convlab.explain_convolution(
            (8, 128, 56, 56), (128, 128, 3, 3), stride=2, padding=1, pass_=pass_
        )
        assert vectors_choice(strided) == "winograd", pass_
        assert strided.verdicts["winograd"].cost < 0.8 * strided.verdicts["implicit_gemm"].cost, pass_
    double = torch_convlab.explain_convolution((1, 64, 56, 56), (64, 64, 3, 3), padding=1, dtype=torch.float64)
    assert vectors_choice(double) == "implicit_gemm" and double.verdicts["winograd"].refusal is None
    # Winograd transforms the weights of a map of four tiles in every call; a product finds them packed.
    small = {"input_size": (1, 512, 7, 7), "weight_size": (512, 512, 3, 3), "padding": 1}
    assert vectors_choice(torch_convlab.explain_convolution(**small)) == "winograd"
    assert vectors_choice(torch_convlab.explain_convolution(**small, packed=True)) == "implicit_gemm"


def test_explain_convolution_with_tiles():
    """Where the CPU has tiles they are taken for 16 bits and 1x1 layers of float32; else never."""
    image, last = (8, 256, 28, 28), {"memory_format": torch.channels_last}
    tiles = torch_convlab.build_info()["multiplies_tiles"]
    for dtype, kernel in (
        (torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1), (torch.float32, 1)
    ):  # fmt: skip
        for pass_ in ("forward", "backward_input", "backward_weight"):
            choice = torch_convlab.explain_convolution(
                image, (256, 256, kernel, kernel), padding=kernel // 2, dtype=dtype, pass_=pass_, **last
            )
            assert (choice.chosen == "amx") == tiles, (dtype, kernel, pass_)
    double = torch_convlab.explain_convolution(image, (256, 256, 1, 1), dtype=torch.float64, **last)
    assert "float64" in double.verdicts["amx"].refusal
    depthwise = torch_convlab.explain_convolution(image, (256, 1, 3, 3), groups=256, dtype=torch.bfloat16, **last)
    assert depthwise.chosen == "depthwise"


def test_explain_convolution_on_cuda():
    """CUDA's own refusals and choice, whether or not a GPU is there."""

    def explain(channels, groups=1, **keywords):
        sizes = (8, channels, 56, 56), (channels, channels // groups, 3, 3)
        return torch_convlab.explain_convolution(*sizes, padding=1, groups=groups, device="cuda", **keywords)

    dense = explain(64, dtype=torch.bfloat16)
    assert dense.chosen == "implicit_gemm"
    assert "no kernel for 16 bits" in dense.verdicts["winograd"].refusal
    assert dense.verdicts["naive"].cost > dense.verdicts["direct"].cost > dense.verdicts["implicit_gemm"].cost
    assert explain(128, groups=128, dtype=torch.float16).chosen == "depthwise"
    assert explain(128, groups=32, dtype=torch.bfloat16).chosen == "direct"  # four channels each
    double = explain(64, dtype=torch.float64)
    assert double.chosen == "direct" and "tensor cores" in double.verdicts["implicit_gemm"].refusal
    for dtype in (torch.float32, torch.float64, torch.bfloat16):  # weights once through memory, on few pixels alone
        for pass_ in ("forward", "backward_input", "backward_weight"):
            chosen = [
                torch_convlab.explain_convolution(
                    (batch, 2048, 1, 1), (1000, 2048, 1, 1), dtype=dtype, pass_=pass_, device="cuda"
                ).chosen
                for batch in (1, 8, 256)
            ]
            assert chosen[:2] == ["inner_product"] * 2 and chosen[2] != "inner_product"
    many = torch_convlab.explain_convolution((1 << 28, 4096, 1, 1), (4096, 4096, 1, 1), device="cuda")
    assert "2^31 blocks on CUDA" in many.verdicts["inner_product"].refusal
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert explain(128).chosen == "winograd" and explain(32).chosen == "implicit_gemm"
        assert "stride 1 on CUDA" in explain(128, stride=2).verdicts["winograd"].refusal
        assert "1820 groups" in explain(2048, groups=2048).verdicts["winograd"].refusal
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert explain(128).chosen == "implicit_gemm"  # as fast, and nearer to the result
    huge = torch_convlab.explain_convolution((1, 1, 1 << 15, 1 << 15), (1, 1, 3, 3), device=torch.device("cuda"))
    assert huge.chosen == "naive" and "2^29" in huge.verdicts["implicit_gemm"].refusal


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_size": (1, 4, 5), "weight_size": (4, 4, 3, 3)}, "3 to 5 values"),
        ({"input_size": (1, 4, 5, 5), "weight_size": (4, 3, 3, 3)}, "to be 4, got 3"),
        ({"input_size": (1, 4, 5, 5), "weight_size": (4, 4, 3, 3), "pass_": "backward"}, "pass_ to be one of forward"),
        ({"input_size": (1, 4, 5, 5), "weight_size": (4, 4, 3, 3), "dtype": torch.int8}, "dtype to be one of float32"),
        ({"input_size": (1, 4, 5, 5), "weight_size": (4, 4, 3, 3), "stride": 0}, "stride"),
        ({"input_size": (1, 4, 5, 5), "weight_size": (4, 4, 3, 3), "device": "meta"}, "device"),
    ],
)
def test_explain_convolution_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch_convlab.explain_convolution(**arguments)
