"""A convolution algorithm of your own in one file: by FFT, with refusals, a cost, gradients and a test.

A convolution is a product of spectra: the cost does not grow with the kernel, which pays for large ones. For an
algorithm in C++, which `algorithm="auto"` can take, see docs/adding-an-algorithm.md.
"""

import math
import statistics
import time

import torch
from torch.autograd import Function

import torch_convlab
from torch_convlab import functional as F


def refusal(x, w, stride, dilation, groups):
    """Why this algorithm cannot compute a problem; empty if it can."""
    if stride != 1 or dilation != 1:
        return "the spectrum is of every place: needs stride 1 and dilation 1"
    if groups != 1:
        return "needs groups=1"
    if x.dtype not in (torch.float32, torch.float64):
        return f"needs float32 or float64, got {x.dtype}"
    return ""


def cost(x, w):
    """Expected multiply-adds: three transforms, and a complex product per frequency; for a comparison with others."""
    (n, c, *size), k = x.shape, w.shape[0]
    points = math.prod(size)
    return 2.5 * points * math.log2(points) * (n * c + k * c + n * k) + 4 * n * c * k * points / 2


def convolve(x, w, padding):
    full = [size + 2 * padding for size in x.shape[2:]]
    length = [2 ** math.ceil(math.log2(size)) for size in full]  # powers of two transform fastest
    spectra = torch.fft.rfft2(x, s=length), torch.fft.rfft2(w, s=length)
    product = torch.einsum("nchw,kchw->nkhw", spectra[0], spectra[1].conj())  # conj: correlation, as torch defines it
    y = torch.fft.irfft2(product, s=length).roll((padding, padding), (2, 3))
    return y[:, :, : full[0] - w.shape[2] + 1, : full[1] - w.shape[3] + 1]


class FftConvolution(Function):
    """Backward by the library's own passes: a convolution's derivatives are convolutions."""

    @staticmethod
    def forward(ctx, x, w, padding):
        ctx.save_for_backward(x, w)
        ctx.padding = padding
        return convolve(x, w, padding)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        grad_x = F.conv_transpose2d(g, w, padding=ctx.padding)
        grad_w = F.conv2d(x.transpose(0, 1), g.transpose(0, 1), padding=ctx.padding).transpose(0, 1)
        return grad_x, grad_w, None


def conv2d_fft(x, w, padding=0, stride=1, dilation=1, groups=1):
    if reason := refusal(x, w, stride, dilation, groups):
        raise RuntimeError(f"fft cannot compute this convolution: {reason}")
    return FftConvolution.apply(x, w, padding)


# The definition and float64 say whether it is right.
torch.manual_seed(0)
for n, c, k, size, kernel, padding in ((1, 1, 1, 5, 3, 0), (2, 3, 4, 12, 5, 2), (1, 2, 2, 31, 31, 15)):
    x = torch.randn(n, c, size, size, dtype=torch.float64)
    w = torch.randn(k, c, kernel, kernel, dtype=torch.float64)
    exact = F.conv2d(x, w, padding=padding, algorithm="naive")
    error = ((conv2d_fft(x, w, padding) - exact).abs().max() / exact.abs().max()).item()
    print(f"{c} -> {k} channels, {size} x {size}, kernel {kernel}: error {error:.0e}")
    assert error < 1e-13
inputs = torch.randn(2, 2, 6, 6).double().requires_grad_(), torch.randn(3, 2, 3, 3).double().requires_grad_()
assert torch.autograd.gradcheck(lambda x, w: conv2d_fft(x, w, 1), inputs)
print("gradients: right")
try:
    conv2d_fft(*inputs, stride=2)
except RuntimeError as error:
    print(error)

# Does it pay? Compare the cost with the library's, then measure.
print("kernel  chosen by auto   its cost     fft's cost   its time   fft's time")
for kernel in (3, 15, 31):
    x, w = torch.randn(1, 8, 64, 64), torch.randn(8, 8, kernel, kernel)
    padding = kernel // 2
    choice = torch_convlab.explain_convolution(x.shape, w.shape, padding=padding)
    calls = (lambda: F.conv2d(x, w, padding=padding), lambda: conv2d_fft(x, w, padding))  # noqa: B023
    rounds = []
    for _ in range(6):  # in turns; the first is not counted
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            rounds[-1].append(1e3 * (time.perf_counter() - start))
    its, ffts = map(statistics.median, zip(*rounds[1:]))
    theirs = choice.verdicts[choice.chosen].cost
    costs = f"{theirs:10.2e}   {cost(x, w):10.2e}"
    print(f"{kernel:6}  {choice.chosen:14} {costs}   {its:6.2f} ms  {ffts:6.2f} ms")
