"""The algorithm amx: what splitting numbers into bfloat16 keeps, and what it does not. (Every problem of cases.py is
checked in test_convolution.py; tiles in software, in test_dispatch.py.)"""

from __future__ import annotations

import helpers
import pytest
import torch

from torch_convlab import functional as F

pytestmark = pytest.mark.skipif(helpers.KERNELS == "cuda", reason="amx has kernels for the CPU alone")
LAST = {"memory_format": torch.channels_last}


def relative_error(input, weight) -> float:
    expected = torch.nn.functional.conv2d(input.double(), weight.double())
    actual = F.conv2d(input, weight, algorithm="amx")
    return ((actual.double() - expected) / expected).abs().max().item()


@pytest.mark.parametrize("bits", [0x3F808080, 0x3F817F7F, 0x3FFFFFFF, 0x3F80FFFF], ids=hex)
def test_float32_keeps_all_digits(bits):
    """Sums whose terms are all the same, so that what is left out of a product cannot cancel."""
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for sign in (1, -1):
        input = torch.full((1, 64, 5, 5), value.item()).contiguous(**LAST)
        assert relative_error(input, sign * torch.full((32, 64, 1, 1), value.item())) < 2.0**-21


def test_float16_products_are_exact():
    """Three terms of 22 bits each, rounded once."""
    input = torch.tensor([1.0009765625, 1.9990234375, -1.4990234375], dtype=torch.float16).view(1, 3, 1, 1)
    weight = torch.tensor([1.9990234375, 1.0009765625, 1.0009765625], dtype=torch.float16).view(1, 3, 1, 1)
    expected = (input.double() * weight.double()).sum().half()
    assert F.conv2d(input, weight, algorithm="amx").item() == expected.item()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e36])
def test_range_of_float32(scale):
    torch.manual_seed(0)
    input, weight = torch.rand(2, 40, 6, 6) * scale, torch.rand(17, 40, 3, 3)
    assert relative_error(input, weight) < 2e-6


def test_what_has_no_parts():
    """An infinity makes NaN, as the guide says, where it is read and nowhere else; tiny numbers lose digits."""
    input, weight = torch.ones(1, 32, 8, 8), torch.ones(16, 32, 3, 3)
    input[0, 3, 0, 0] = float("inf")
    output = F.conv2d(input, weight, padding=1, algorithm="amx")
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[:2, :2] = True
    assert torch.equal(~output[0].isfinite(), touched.expand(16, 8, 8))
    tiny = torch.full((1, 32, 4, 4), 1.5e-38)
    assert relative_error(tiny, torch.ones(16, 32, 1, 1)) < 2.0**-7


def test_a_sum_of_many_terms_stays_near_float64():
    torch.manual_seed(0)
    for dtype, channels in ((torch.float32, 2048), (torch.bfloat16, 512)):
        input = torch.randn(1, channels, 6, 6).to(dtype).contiguous(**LAST)
        weight = torch.randn(32, channels, 3, 3).to(dtype)
        expected = torch.nn.functional.conv2d(input.double(), weight.double())
        error = (F.conv2d(input, weight, algorithm="amx").double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-6 if dtype == torch.float32 else 2.0**-8)


def test_few_channels_are_spans_of_a_line():
    """Taps of a kernel line as channels: at both borders, with a stride, and narrower than the kernel."""
    torch.manual_seed(0)
    for width, kernel, stride, padding in ((23, 7, 2, 3), (9, 5, 1, 4), (5, 5, 3, 2), (3, 3, 1, 2), (40, 3, 4, 0)):
        input = torch.randn(2, 3, 6, width).contiguous(**LAST)
        weight = torch.randn(20, 3, 2, kernel)
        for layout in (torch.contiguous_format, torch.channels_last):
            arguments = (stride, (1, padding))
            expected = torch.nn.functional.conv2d(input.double(), weight.double(), None, *arguments)
            actual = F.conv2d(
                input, weight.contiguous(memory_format=layout), None, stride, (1, padding), algorithm="amx"
            )
            assert (actual.double() - expected).abs().max() < 1e-5


def test_same_bits_for_every_number_of_threads():
    """Blocks follow the number of threads, and with them how many copies of deep tensors are made; sums do not."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for channels, size, kernel in ((1536, 14, 1), (640, 7, 3), (768, 9, (1, 3))):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        input = torch.randn(4, channels, size, size).contiguous(**LAST)
        weight = torch.randn(48, channels, *kernel)
        results = []
        try:
            for number in (1, 2, 3, 8):
                torch.set_num_threads(number)
                results.append(F.conv2d(input, weight, padding=(kernel[0] // 2, kernel[1] // 2), algorithm="amx"))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)
