"""Pooling with the signatures of `torch.nn.functional`. Lecture items L10 to L12."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..autograd.pooling import adaptive_avg_pool, adaptive_max_pool, avg_pool, max_pool, max_pool_indices, wants_taps
from ._arguments import expand


def max_pool1d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """1-D max pooling, as `torch.nn.functional.max_pool1d`.

    Args:
        input: ``N x C x L``, or ``C x L``. float32, float64, bfloat16 or float16.
        kernel_size, dilation: integers or tuples of one.
        stride: the same; None means kernel_size.
        padding: the same, at most half the kernel; padded places never win.
        ceil_mode: round the size of the output up, unless the last window would start in the right padding.
        return_indices: also return where in its plane each maximum was found.

    Returns:
        ``N x C x L_out`` with ``L_out = ceil((L - (dilation*(K-1)+1) + 1 + 2*padding) / stride)`` (lecture item L1;
        with ceil_mode the same with ``+ stride - 1`` in the numerator), in the memory format of `input`, or the pair
        of it and int64 indices. NaN is larger than every number; of equal values the first is taken.

    Raises:
        RuntimeError: where torch raises it.
        NotImplementedError: other dtypes.
    """
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """2-D max pooling, as `torch.nn.functional.max_pool2d`: ``N x C x H x W``. See `max_pool1d`."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """3-D max pooling, as `torch.nn.functional.max_pool3d`: ``N x C x D x H x W``. See `max_pool1d`."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool1d_with_indices(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool1d` with its indices, whatever `return_indices` says, as in torch."""
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool2d_with_indices(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool2d` with its indices, whatever `return_indices` says, as in torch."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool3d_with_indices(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`max_pool3d` with its indices, whatever `return_indices` says, as in torch."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def avg_pool1d(
    input: Tensor, kernel_size, stride=None, padding=0, ceil_mode: bool = False, count_include_pad: bool = True,
) -> Tensor:  # fmt: skip
    """1-D average pooling, as `torch.nn.functional.avg_pool1d`.

    Args:
        input: ``N x C x L``, or ``C x L``. float32, float64, bfloat16 or float16; 16-bit sums are kept in float32.
        kernel_size, stride, padding, ceil_mode: as in `max_pool1d`.
        count_include_pad: divide by the size of the window with the padding in it (never beyond the padding).

    Returns:
        ``N x C x L_out``, sized as in `max_pool1d`, in the memory format of `input`.

    Raises:
        RuntimeError: where torch raises it.
        NotImplementedError: other dtypes.
    """
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor, kernel_size, stride=None, padding=0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """2-D average pooling, as `torch.nn.functional.avg_pool2d`: ``N x C x H x W``. See `avg_pool1d`.

    Sums are divided by `divisor_override`, if given, instead of the size of the window.
    """
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor, kernel_size, stride=None, padding=0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """3-D average pooling, as `torch.nn.functional.avg_pool3d`: ``N x C x D x H x W``. See `avg_pool1d`.

    Sums are divided by `divisor_override`, if given, instead of the size of the window.
    """
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_max_pool1d(input: Tensor, output_size, return_indices: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """1-D adaptive max pooling, as `torch.nn.functional.adaptive_max_pool1d`.

    Window o covers ``[floor(o*L/L_out), ceil((o+1)*L/L_out))``.

    Args:
        input: ``N x C x L``, or ``C x L``. float32, float64, bfloat16 or float16.
        output_size: an integer or a tuple of one.
        return_indices: also return where in its plane each maximum was found.

    Returns:
        ``N x C x output_size``, or the pair of it and int64 indices.

    Raises:
        RuntimeError: where torch raises it.
        NotImplementedError: other dtypes.
    """
    return _adaptive_max_pool(1, input, output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size, return_indices: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """2-D adaptive max pooling, as `torch.nn.functional.adaptive_max_pool2d`: ``N x C x H x W``.

    A None in `output_size` keeps the size of the input. See `adaptive_max_pool1d`.
    """
    return _adaptive_max_pool(2, input, output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size, return_indices: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """3-D adaptive max pooling, as `torch.nn.functional.adaptive_max_pool3d`: ``N x C x D x H x W``.

    A None in `output_size` keeps the size of the input. See `adaptive_max_pool1d`.
    """
    return _adaptive_max_pool(3, input, output_size, return_indices)


def adaptive_max_pool1d_with_indices(input: Tensor, output_size, return_indices: bool = False) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool1d` with its indices, whatever `return_indices` says, as in torch."""
    return _adaptive_max_pool(1, input, output_size, True)


def adaptive_max_pool2d_with_indices(input: Tensor, output_size, return_indices: bool = False) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool2d` with its indices, whatever `return_indices` says, as in torch."""
    return _adaptive_max_pool(2, input, output_size, True)


def adaptive_max_pool3d_with_indices(input: Tensor, output_size, return_indices: bool = False) -> tuple[Tensor, Tensor]:
    """`adaptive_max_pool3d` with its indices, whatever `return_indices` says, as in torch."""
    return _adaptive_max_pool(3, input, output_size, True)


def adaptive_avg_pool1d(input: Tensor, output_size) -> Tensor:
    """1-D adaptive average pooling, as `torch.nn.functional.adaptive_avg_pool1d`.

    Window o covers ``[floor(o*L/L_out), ceil((o+1)*L/L_out))``. Output size 1 is global average pooling (L12).

    Args:
        input: ``N x C x L``, or ``C x L``. float32, float64, bfloat16 or float16.
        output_size: an integer or a tuple of one.

    Raises:
        RuntimeError: where torch raises it.
        NotImplementedError: other dtypes.
    """
    return _adaptive_avg_pool(1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size) -> Tensor:
    """2-D adaptive average pooling, as `torch.nn.functional.adaptive_avg_pool2d`: ``N x C x H x W``.

    A None in `output_size` keeps the size of the input. See `adaptive_avg_pool1d`.
    """
    return _adaptive_avg_pool(2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size) -> Tensor:
    """3-D adaptive average pooling, as `torch.nn.functional.adaptive_avg_pool3d`: ``N x C x D x H x W``.

    A None in `output_size` keeps the size of the input. See `adaptive_avg_pool1d`.
    """
    return _adaptive_avg_pool(3, input, output_size)


def _is_unbatched(name, input, spatial):
    if input.dim() not in (spatial + 1, spatial + 2):
        raise RuntimeError(
            f"{name}: Expected {spatial + 1}D or {spatial + 2}D (batch mode) tensor with optional 0 dim batch size for "
            f"input: non-empty {spatial + 1}D or {spatial + 2}D (batch mode) tensor expected for input, "
            f"but got: {list(input.shape)}"
        )
    return input.dim() == spatial + 1


def _windows(spatial, kernel_size, stride, padding):
    kernel_size = expand(kernel_size, spatial)
    stride = kernel_size if stride is None or stride == [] or stride == () else expand(stride, spatial)
    return kernel_size, stride, expand(padding, spatial)


def _short_way(spatial, input) -> bool:
    """Whether to try the functions of _C, which ask no questions about numbers of dimensions; see `conv_fused`."""
    return not torch.compiler.is_compiling() and isinstance(input, Tensor) and input.dim() == spatial + 2


def _max_pool(spatial, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    if not return_indices and _short_way(spatial, input):
        pooled = _C.max_pool(input, kernel_size, stride, padding, dilation, ceil_mode, False)
        if pooled is not NotImplemented:
            return pooled[0]
    unbatched = _is_unbatched(f"max_pool{spatial}d", input, spatial)
    if unbatched:
        input = input.unsqueeze(0)
    kernel_size, stride, padding = _windows(spatial, kernel_size, stride, padding)
    windows = kernel_size, stride, padding, expand(dilation, spatial), ceil_mode
    output, taps = max_pool(input, *windows, return_indices or wants_taps(input))
    return _finish(input, output, taps, windows, unbatched, return_indices)


def _adaptive_max_pool(spatial, input, output_size, return_indices):
    name = f"adaptive_max_pool{spatial}d"
    output_size = _output_size(name, input, output_size, spatial)
    unbatched = _is_unbatched(name, input, spatial)
    if unbatched:
        input = input.unsqueeze(0)
    output, taps = adaptive_max_pool(input, output_size, return_indices or wants_taps(input))
    return _finish(input, output, taps, ([], [], [], [], False), unbatched, return_indices)


def _finish(input, output, taps, windows, unbatched, return_indices):
    if unbatched:
        output = output.squeeze(0)
    if not return_indices:
        return output
    indices = max_pool_indices(taps, list(input.shape), *windows)
    return output, indices.squeeze(0) if unbatched else indices


def _avg_pool(spatial, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    if _short_way(spatial, input):
        windows = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        pooled = _C.avg_pool(input, *windows)
        if pooled is not NotImplemented:
            return pooled
    unbatched = _is_unbatched(f"avg_pool{spatial}d", input, spatial)
    if unbatched:
        input = input.unsqueeze(0)
    windows = _windows(spatial, kernel_size, stride, padding)
    output = avg_pool(input, *windows, ceil_mode, count_include_pad, divisor_override)
    return output.squeeze(0) if unbatched else output


def _adaptive_avg_pool(spatial, input, output_size):
    if _short_way(spatial, input):
        pooled = _C.adaptive_avg_pool(input, output_size)
        if pooled is not NotImplemented:
            return pooled
    name = f"adaptive_avg_pool{spatial}d"
    output_size = _output_size(name, input, output_size, spatial)
    unbatched = _is_unbatched(name, input, spatial)
    if unbatched:
        input = input.unsqueeze(0)
    output = adaptive_avg_pool(input, output_size)
    return output.squeeze(0) if unbatched else output


def _output_size(name, input, output_size, spatial):
    """`output_size` as a list; None keeps the input's size, except in 1-D, where torch takes integers alone."""
    if isinstance(output_size, int):
        return [output_size] * spatial
    if spatial == 1:
        if output_size is None or None in output_size:
            raise TypeError(f"{name}(): output_size must be an int or a tuple of one, but got {output_size}")
        if len(output_size) != 1:
            raise RuntimeError(f"{name}() argument 'output_size' should contain one int (got {len(output_size)})")
    sizes = [None] * spatial if output_size is None else list(output_size)
    if spatial > 1 and input.dim() <= len(sizes):
        raise ValueError(f"Input dimension should be at least {len(sizes) + 1}, but got size {list(input.shape)}")
    kept = input.shape[-spatial:]
    return [kept[axis] if size is None and axis < spatial else size for axis, size in enumerate(sizes)]
