"""What bench/gpu.py computes: layers of common networks, each for torch's and for our functional module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of relative errors, in the 2-norm


@dataclass
class Problem:
    """`call(functional, *tensors)` computes it with torch.nn.functional or torch_convlab.functional."""

    name: str
    shapes: list[tuple[int, ...]]
    call: Callable
    elements_moved: int  # read and written at least, in all passes timed
    multiply_adds: int = 0
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False
    convolution: dict | None = None  # arguments of explain_convolution
    algorithm: str = "auto"  # for ours


def conv_bias_relu(f, x, w, b, *parts):
    """In one kernel where the functional module has one."""
    return f.conv_fused(x, w, b, None, True, *parts) if hasattr(f, "conv_fused") else F.relu(f.conv2d(x, w, b, *parts))


def batch_norm(f, x, w, b):
    return f.batch_norm(x, None, None, w, b, training=True)


def batch_norm_add_relu(f, x, y, w, b):
    if hasattr(f, "batch_norm_add_relu"):
        return f.batch_norm_add_relu(x, y, None, None, w, b, training=True)
    return F.relu(f.batch_norm(x, None, None, w, b, training=True) + y)


def batch_norm_gradient(f, x, w, b):
    """Whose gradients are batch norm's double backward."""
    return torch.autograd.grad(batch_norm(f, x, w, b).pow(4).sum(), x, create_graph=True)[0]


def conv_by(f, algorithm, *arguments):
    return F.conv2d(*arguments) if f is F else f.conv2d(*arguments, algorithm=algorithm)


def convolution(
    what, n, c, size, k, kernel, stride=1, groups=1, dtype=torch.bfloat16, backward=False, fused=False, algorithm="auto"
):
    padding = kernel // 2
    parts = stride, padding, 1, groups
    out = (size + 2 * padding - kernel) // stride + 1
    input, weight = (n, c, size, size), (k, c // groups, kernel, kernel)
    passes = 3 if backward else 1
    tensors = n * c * size**2 + n * k * out**2 + k * c // groups * kernel**2
    return Problem(
        f"{what} {n}x{c}x{size}x{size}->{k} k{kernel} s{stride} g{groups}",
        [input, weight, (k,)] if fused else [input, weight],
        (lambda f, x, w, b: conv_bias_relu(f, x, w, b, *parts))
        if fused
        else (lambda f, x, w: conv_by(f, algorithm, x, w, None, *parts)),
        tensors * passes,
        n * k * out**2 * (c // groups) * kernel**2 * passes,
        dtype,
        backward,
        {"input_size": input, "weight_size": weight, "stride": stride, "padding": padding, "groups": groups},
        algorithm,
    )


def normalizations_and_pools(n, c, size, backward) -> list[Problem]:
    shape, elements = (n, c, size, size), n * c * size**2
    what = f"{'backward' if backward else 'forward'} {n}x{c}x{size}x{size}"
    pooled = elements * 5 // 4 * (2 if backward else 1)
    # The statistics come first, so the input is read twice; once more each, with the gradient, in backward, where bits
    # stand for the residual.
    return [
        Problem(f"batch norm {what}", [shape, (c,), (c,)], batch_norm, elements * (8 if backward else 3),
                backward=backward),
        Problem(f"batch norm + add + relu {what}", [shape, shape, (c,), (c,)], batch_norm_add_relu,
                elements * (10 if backward else 4), backward=backward),
        Problem(f"max pool {what}", [shape], lambda f, x: f.max_pool2d(x, 3, 2, 1), pooled, backward=backward),
        Problem(f"average pool {what}", [shape], lambda f, x: f.avg_pool2d(x, 3, 2, 1), pooled, backward=backward),
    ]  # fmt: skip


DENSE = (
    (64, 56, 64, 3, 1), (128, 28, 128, 3, 1), (256, 14, 256, 3, 1), (512, 7, 512, 3, 1),
    (256, 56, 64, 1, 1), (512, 28, 1024, 1, 2), (3, 224, 64, 7, 2),
)  # fmt: skip
GROUPED = ((128, 56, 3, 1, 128), (240, 28, 5, 1, 240), (144, 56, 3, 2, 144), (96, 56, 7, 1, 96), (128, 56, 3, 1, 32))


def problems(small: bool) -> list[Problem]:
    """Forward alone, then forward and backward. Small: the same kinds in sizes that anything computes at once."""
    listed, n = [], 2 if small else 64
    for backward in (False, True):
        what = "backward" if backward else "forward"
        for c, size, k, kernel, stride in DENSE:
            sizes = (min(c, 16), min(size, 9), min(k, 24)) if small else (c, size, k)
            listed.append(convolution(f"conv {what}", n, *sizes, kernel, stride, backward=backward))
        for c, size, kernel, stride, groups in GROUPED:
            channels, size = (16, 9) if small else (c, size)
            groups = channels // (c // groups)
            listed.append(convolution(f"grouped {what}", n, channels, size, channels, kernel, stride, groups,
                                      backward=backward))  # fmt: skip
        for c, size in ((16, 9),) if small else ((128, 28), (256, 14)):
            for algorithm in ("implicit_gemm", "winograd"):
                listed.append(convolution(f"float32 {algorithm} {what}", n, c, size, c, 3, dtype=torch.float32,
                                          backward=backward, algorithm=algorithm))  # fmt: skip
        for c, size in ((16, 9),) if small else ((64, 112), (256, 56), (2048, 7)):
            listed += normalizations_and_pools(n, c, size, backward)
        few = (2, 16, 1, 24) if small else (8, 2048, 1, 1000)
        listed.append(convolution(f"few pixels {what}", *few, 1, backward=backward))
    c, size = (16, 9) if small else (128, 28)
    listed.append(convolution("conv + bias + relu forward", n, c, size, c, 3, fused=True))
    # Forward, backward and double backward; the latter reads three tensors twice and writes two.
    shape = (n, c, size, size)
    listed.append(Problem(f"batch norm double backward {n}x{c}x{size}x{size}", [shape, (c,), (c,)], batch_norm_gradient,
                          16 * n * c * size**2, dtype=torch.float32, backward=True))  # fmt: skip
    return listed
