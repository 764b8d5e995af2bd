"""torch's own descriptions of its functions and modules, applied to every one that this library replaces.

`op_db` holds sample inputs and wrong inputs of each function, `module_db` those of each module. Both are enumerated
by name, so a function or module added to `torch_convlab.functional` or `torch_convlab.nn` is tested from then on.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from helpers import assert_same_layout, is_dense
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_flatten, tree_map_only

import torch_convlab

# Where we differ on purpose. Nothing outside these tables may.
NOT_COMPUTED = {
    torch.int64: "torch convolves and pools integers with slow loops; here only floating types have kernels",
    torch.complex64: "torch splits complex convolutions into real ones; here only real floating types have kernels",
}
NO_OPINFO = {
    "max_pool1d_with_indices": "max_pool1d with return_indices=True, whose samples are in op_db",
    "max_pool2d_with_indices": "max_pool2d with return_indices=True, whose samples are in op_db",
    "max_pool3d_with_indices": "max_pool3d with return_indices=True, whose samples are in op_db",
    "adaptive_max_pool1d_with_indices": "adaptive_max_pool1d with return_indices=True, whose samples are in op_db",
    "adaptive_max_pool2d_with_indices": "adaptive_max_pool2d with return_indices=True, whose samples are in op_db",
    "adaptive_max_pool3d_with_indices": "adaptive_max_pool3d with return_indices=True, whose samples are in op_db",
}
NOT_ACCEPTED = {
    "batch_norm": (
        lambda sample: sample.input.dim() == 1,
        "an input of one axis has no channels; torch takes it if it is empty, and returns it",
    ),
}

FUNCTIONS = sorted(name for name in torch_convlab.functional.__all__ if hasattr(torch.nn.functional, name))
OPINFOS = [
    pytest.param(info, name, id=f"{name}{info.variant_test_name and '_' + info.variant_test_name}")
    for name in FUNCTIONS
    for info in op_db
    if info.name == f"nn.functional.{name}"
]
MODULES = [
    pytest.param(info, id=info.module_cls.__name__)
    for info in module_db
    if info.module_cls.__name__ in torch_convlab.nn.__all__
    and info.module_cls is getattr(torch.nn, info.module_cls.__name__, None)
]
MANY = 200  # of more samples than this, all run in float32, and every 7th in other dtypes and with scattered tensors


def test_everything_replaced_is_described():
    covered = {name for info, name in (param.values for param in OPINFOS)}
    assert set(FUNCTIONS) - covered <= set(NO_OPINFO)
    assert {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"} <= covered
    names = {info.values[0].module_cls.__name__ for info in MODULES}
    described = {info.module_cls.__name__ for info in module_db}
    assert names == set(torch_convlab.nn.__all__) & described
    assert {"Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"} <= names


def tensors_in(*trees) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, torch.Tensor)]


def fresh(tree):
    """The same arguments on copies of the tensors, with the same strides."""

    def clone(tensor):
        if 0 in tensor.stride():
            copied = tensor.detach().clone()
        else:
            copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            copied.copy_(tensor.detach())
        return copied.requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, clone, tree)


def forward_and_gradients(function, args, kwargs, parameters=()):
    """Outputs, gradients (None where there is none), and the arguments as the call left them (running statistics)."""
    outputs = tensors_in(function(*args, **kwargs))
    leaves = [*(tensor for tensor in tensors_in(args, kwargs) if tensor.requires_grad), *parameters]
    wanted = [output for output in outputs if output.requires_grad]
    gradients = []
    if leaves and wanted:
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.rand(output.shape, generator=generator, dtype=torch.float64) - 0.3 for output in wanted]
        seeds = [seed.to(output.dtype) for seed, output in zip(seeds, wanted)]
        gradients = torch.autograd.grad(wanted, leaves, seeds, allow_unused=True)
    return outputs, list(gradients), tensors_in(args, kwargs)


def largest_in(tensors) -> float:
    finite = [t.detach()[t.isfinite()].abs().max().item() for t in tensors if t is not None and t.isfinite().any()]
    return max(finite, default=0.0)


def assert_equal_within(ours, theirs, relative: float, scale: float, what: str):
    """Equal shapes, dtypes and values, up to `relative` times `scale`, the largest value among related results."""
    assert (ours is None) == (theirs is None), f"{what}: {ours} and {theirs}"
    if ours is None:
        return
    assert ours.requires_grad == theirs.requires_grad, f"{what}: requires_grad"
    torch.testing.assert_close(
        ours, theirs, rtol=relative, atol=relative * scale, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def compare(ours, theirs, args, kwargs, relative, what):
    """Calls both and compares outputs (strides too), gradients, and the arguments as the calls left them.

    All share one scale: a gradient may be a difference of large numbers that is nearly zero.
    """
    results = []
    for function in (ours, theirs):
        copied_args, copied_kwargs = fresh(args), fresh(kwargs)
        results.append(forward_and_gradients(function, copied_args, copied_kwargs))
    scale = largest_in(itertools.chain(*results[1]))
    for kind, actual, expected in zip(("output", "gradient", "argument"), *results):
        assert len(actual) == len(expected), f"{what}: {len(actual)} {kind}s, torch has {len(expected)}"
        for index, pair in enumerate(zip(actual, expected)):
            assert_equal_within(*pair, relative, scale, f"{what}: {kind} {index}")
            if kind == "output" and is_dense(pair[1]):
                assert_same_layout(*pair, f"{what}: {kind} {index}")


def describe(sample) -> str:
    shapes = [
        tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in (sample.input, *sample.args)
    ]
    return f"{shapes} {sample.kwargs}"[:300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info, name", OPINFOS)
def test_samples(info, name, dtype):
    ours, theirs = getattr(torch_convlab.functional, name), getattr(torch.nn.functional, name)
    relative = 2e-5 if dtype == torch.float32 else 1e-12
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for index, sample in enumerate(samples):
        if name in NOT_ACCEPTED and NOT_ACCEPTED[name][0](sample):
            continue
        if len(samples) > MANY and dtype == torch.float64 and index % 7:
            continue
        compare(ours, theirs, (sample.input, *sample.args), sample.kwargs, relative, describe(sample))
        if len(samples) <= MANY or index % 7 == 0:
            apart = sample.noncontiguous()
            compare(
                ours, theirs, (apart.input, *apart.args), apart.kwargs, relative, "noncontiguous " + describe(sample)
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("info, name", OPINFOS)
def test_samples_of_16_bits(info, name, dtype):
    """Forward only, against torch in float64: torch's own 16-bit results round more than once."""
    ours, theirs = getattr(torch_convlab.functional, name), getattr(torch.nn.functional, name)
    if dtype not in info.dtypes:
        pytest.skip(f"torch has no {dtype} {name}")

    def widened(tree):
        return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, fresh(tree))

    samples = list(info.sample_inputs("cpu", dtype))
    for index, sample in enumerate(samples):
        if name in NOT_ACCEPTED and NOT_ACCEPTED[name][0](sample):
            continue
        if len(samples) > MANY and index % 7:
            continue
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        actual = tensors_in(ours(*fresh(args), **fresh(kwargs)))
        expected = tensors_in(theirs(*widened(args), **widened(kwargs)))
        assert len(actual) == len(expected)
        for value, reference in zip(actual, expected):
            assert value.dtype == (dtype if reference.is_floating_point() else reference.dtype)
            rounded = reference.to(value.dtype)
            assert_equal_within(value, rounded, torch.finfo(dtype).eps, largest_in([rounded]), describe(sample))


def outcome(function, *args, **kwargs):
    """The exception raised by a call, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("info, name", [param for param in OPINFOS if param.values[0].error_inputs_func is not None])
def test_error_inputs(info, name):
    ours, theirs = getattr(torch_convlab.functional, name), getattr(torch.nn.functional, name)
    errors = list(info.error_inputs("cpu"))
    assert errors
    wrong = []
    for error in errors:
        sample = error.sample_input
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        expected, actual = outcome(theirs, *fresh(args), **fresh(kwargs)), outcome(ours, *fresh(args), **fresh(kwargs))
        assert isinstance(expected, error.error_type)
        if actual is None and name == "group_norm" and "to be greater than 0, got 0" in str(expected):
            continue  # an error since torch 2.14; here, as before it, the normalization of nothing is nothing
        if type(actual) is not type(expected):
            wrong.append(f"{describe(sample)}\n  torch: {expected!r}\n  ours:  {actual!r}")
        elif not str(actual):
            wrong.append(f"{describe(sample)}: no message")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", NOT_COMPUTED, ids=str)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("conv")])
def test_dtypes_not_computed(name, dtype):
    """NotImplementedError, the type torch raises for a dtype that it lacks, and a message with the dtypes there are."""
    info = next(info for info in op_db if info.name == f"nn.functional.{name}")
    sample = next(iter(info.sample_inputs("cpu", dtype)))
    with pytest.raises(NotImplementedError, match="expected float32, float64, bfloat16 or float16"):
        getattr(torch_convlab.functional, name)(sample.input, *sample.args, **sample.kwargs)


def pairs_of_modules(info, dtype, training):
    """(ours, torch's, forward args, forward kwargs) with equal parameters, for every input that torch tests with."""
    ours_class, theirs_class = getattr(torch_convlab.nn, info.module_cls.__name__), info.module_cls
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for module_input in inputs:
        if module_input.forward_input is None:
            continue
        arguments = module_input.constructor_input
        theirs = theirs_class(*arguments.args, **arguments.kwargs).to(dtype).train(training)
        ours = ours_class(*arguments.args, **arguments.kwargs).to(dtype).train(training)
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)  # the initial running statistics and scales are zeros and ones
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        yield ours, theirs, module_input.forward_input.args, module_input.forward_input.kwargs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", MODULES)
def test_modules(info, dtype, training):
    relative = 2e-5 if dtype == torch.float32 else 1e-12
    count = 0
    for ours, theirs, args, kwargs in pairs_of_modules(info, dtype, training):
        count += 1
        what = repr(theirs)
        results = []
        for module in (ours, theirs):
            copies = fresh(args), fresh(kwargs)
            results.append([*forward_and_gradients(module, *copies, module.parameters()), list(module.buffers())])
        scale = largest_in(itertools.chain(*results[1]))
        for kind, actual, expected in zip(("output", "gradient", "argument", "buffer"), *results):
            assert len(actual) == len(expected)
            for index, pair in enumerate(zip(actual, expected)):
                assert_equal_within(*pair, relative, scale, f"{what}: {kind} {index}")
                if kind == "output" and is_dense(pair[1]):
                    assert_same_layout(*pair, f"{what}: {kind} {index}")
    assert count


@pytest.mark.parametrize("info", MODULES)
def test_modules_are_torchs(info):
    """repr, isinstance, state_dict, pickling and copying are those of the class that is replaced."""
    for ours, theirs, args, kwargs in itertools.islice(pairs_of_modules(info, torch.float32, False), 20):
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, info.module_cls) and type(ours).__name__ == info.module_cls.__name__
        assert set(vars(ours)) == set(vars(theirs))
        theirs.load_state_dict(ours.state_dict())
        expected = tensors_in(ours(*args, **kwargs))
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(twin) is type(ours) and repr(twin) == repr(ours)
            assert twin.training == ours.training
            assert list(twin.state_dict()) == list(ours.state_dict())
            for actual, output in zip(tensors_in(twin(*args, **kwargs)), expected):
                assert torch.equal(actual, output) or output.isnan().any()


@pytest.mark.parametrize("info", [param for param in MODULES if param.values[0].module_error_inputs_func is not None])
def test_module_error_inputs(info):
    ours_class, theirs_class = getattr(torch_convlab.nn, info.module_cls.__name__), info.module_cls
    raised = 0
    for training in (True, False):
        errors = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
        )
        for error in errors:
            constructor = error.module_error_input.constructor_input
            call = error.module_error_input.forward_input
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                actual = outcome(ours_class, *constructor.args, **constructor.kwargs)
                expected = outcome(theirs_class, *constructor.args, **constructor.kwargs)
            else:
                actual, expected = (
                    outcome(
                        kind(*constructor.args, **constructor.kwargs).train(training), *fresh(call.args), **call.kwargs
                    )
                    for kind in (ours_class, theirs_class)
                )
            assert type(actual) is type(expected), f"torch: {expected!r}\nours: {actual!r}"
            raised += expected is not None  # some raise in training only
    assert raised
