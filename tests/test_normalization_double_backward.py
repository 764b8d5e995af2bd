"""Second derivatives of batch norm that are the last: gradients of gradients without a graph are a kernel's."""

from __future__ import annotations

import pytest
import torch
from test_normalization import BATCH_NORMS, FORMATS, OPS, normal, sample
from torch.autograd import forward_ad
from torch.profiler import profile

import torch_convlab.functional as ours

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {
    "2d": (4, 5, 6, 7),
    "2d wide": (2, 64, 9, 9),
    "2d blocks": (2, 3, 80, 90),  # several blocks of 4096 elements
    "2d rows": (300, 33, 1, 2),  # several blocks of rows
    "3d": (2, 10, 3, 4, 5),
    "1d": (3, 37, 7),
    "vectors": (37, 10),
}


def second(call, leaves, along_of):
    """Gradients of ``sum(along * first gradients)`` by the leaves and by the gradient of the output."""
    output = call(*leaves)
    grad = normal(*output.shape, seed=8).to(output.dtype).requires_grad_()
    used = [leaf for leaf in leaves if leaf is not None]
    first = torch.autograd.grad(output, used, grad, create_graph=True)
    along = [normal(*g.shape, seed=9 + index).to(g.dtype) for index, g in enumerate(first)]
    chosen = [index for index in range(len(first)) if index in along_of]
    return torch.autograd.grad(
        [first[index] for index in chosen], [*used, grad], [along[index] for index in chosen], allow_unused=True
    )


def compare(name, shape, format, dtype, affine=True, along_of=range(4), tolerance=1e-9):
    function, reference = BATCH_NORMS[name]
    adds = "add" in name
    tensors = [FORMATS[format](sample(shape, dtype)), normal(*shape, seed=5).to(dtype) if adds else None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors += [normal(shape[1], seed=6).to(wide), normal(shape[1], seed=7).to(wide)] if affine else [None, None]
    results = []
    for call, convert in ((function, torch.Tensor.clone), (reference, torch.Tensor.double)):
        leaves = [None if tensor is None else convert(tensor).requires_grad_() for tensor in tensors]
        results.append(second(lambda x, r, w, b, f=call: f(x, r, None, None, w, b, True), leaves, along_of))
    for mine, exact in zip(*results):
        if mine is None or exact is None:  # the one says nothing where the other says zeros
            assert all(part is None or not part.any() for part in (mine, exact))
            continue
        error = (mine.double() - exact.double()).abs().max().item()
        assert error <= tolerance * max(1.0, exact.abs().max().item()), (error, mine.shape)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_against_torch_in_float64(name, shape, format, affine):
    compare(name, shape, format, torch.float64, affine)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype,tolerance", TOLERANCE.items())
def test_dtypes(dtype, tolerance, format):
    """Sums and lines are computed in float32; results in 16 bits are rounded once. No ReLU, whose mask would flip."""
    for shape in ((4, 37, 6, 7), (2, 3, 80, 90)):
        compare("batch_norm", shape, format, dtype, tolerance=tolerance)


@pytest.mark.parametrize("along_of", [(0,), (0, 1), (0, 2), (0, 3), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_some_gradients_only(format, along_of):
    """Of input, residual, weight and bias; without that of the input there is no kernel."""
    compare("batch_norm_add_relu", (3, 5, 4, 6), format, torch.float64, along_of=along_of)


@pytest.mark.parametrize("format", FORMATS)
def test_a_kernel_computes_it(format):
    x = FORMATS[format](sample((2, 5, 4, 6))).requires_grad_()
    with profile() as record:
        second(lambda x: ours.batch_norm_relu(x, None, None, training=True), [x], range(1))
    assert "convlab::batch_norm_double_backward" in {event.key for event in record.key_averages()}


def test_same_bits_for_every_number_of_threads():
    shape = (5, 48, 19, 23)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for format in FORMATS.values():
                x, g, v, r = (format(normal(*shape, dtype=torch.float32, seed=seed)) for seed in range(4))
                w, m = normal(48, dtype=torch.float32), normal(48, dtype=torch.float32, seed=1)
                results.append(
                    OPS.batch_norm_double_backward(v, w, m, v, g, x, w, m, m, w.abs() + 1, r, 0.0, None, 1e-5)
                )
    finally:
        torch.set_num_threads(threads)
    for index in range(2):
        for one, two, three in zip(*results[index::2]):
            assert torch.equal(one, two) and torch.equal(one, three)


def test_empty():
    for shape in ((0, 3, 4, 4), (2, 0, 3), (2, 3, 0, 4)):
        x, w = torch.empty(shape), torch.ones(shape[1])
        grad_grad, grad_input, grad_weight = OPS.batch_norm_double_backward(
            x, w, w, None, x, x, w, w, w, w, None, None, None, 1e-5
        )
        assert grad_grad.shape == grad_input.shape == shape and torch.equal(grad_weight, torch.zeros(shape[1]))


def test_forward_mode_over_the_second_derivative():
    """A tangent is a further derivative: the kernel, which has none, must not swallow it."""
    x, tangent, w = normal(6, 4), normal(6, 4, seed=1), normal(4, seed=2)

    def plain(x, w):
        variance, mean = torch.var_mean(x, [0], correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * w

    results = []
    for call in (lambda x, w: ours.batch_norm(x, None, None, w, None, True), plain):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
            parts = [forward_ad.unpack_dual(part) for part in second(call, [dual, w.clone().requires_grad_()], (0, 1))]
            results.append([value for part in parts for value in (part.primal.detach(), part.tangent.detach())])
    assert results[0][1].abs().max() > 1
    torch.testing.assert_close(*results)
