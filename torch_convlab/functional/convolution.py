"""Convolutions with the signatures of `torch.nn.functional`, plus the keyword ``algorithm``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, _activation
from ..autograd.convolution import convolution, convolution_backward_input
from ._arguments import autocast, check_dimensions, check_tensors, expand, integer


def conv1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1,
    *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """1-D convolution, as `torch.nn.functional.conv1d`.

    Args:
        input: ``N x C x L``, or ``C x L``. float32, float64, bfloat16 or float16.
        weight: ``K x C/groups x taps``, same dtype.
        bias: ``K``, same dtype, or None.
        stride, dilation: integers or tuples of one.
        padding: an integer, a tuple of one, ``"valid"`` (none) or ``"same"`` (output as long as input; stride 1).
        groups: divides both C and K.
        algorithm: ``"auto"`` or a key of `torch_convlab.algorithms()`.

    Returns:
        ``N x K x L_out`` with ``L_out = ceil((L - (dilation*(taps-1)+1) + 1 + 2*padding) / stride)`` (lecture item L1).

    Raises:
        RuntimeError: where torch raises it, or if `algorithm` refuses the problem (the message holds the reason).
        ValueError: unknown `algorithm`.
    """
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups, algorithm)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1,
    *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """2-D convolution, as `torch.nn.functional.conv2d`: ``N x C x H x W``, ``K x C/groups x kH x kW``. See `conv1d`.

    The output is channels_last if `input` or `weight` is, as in torch.
    """
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups, algorithm)


def conv3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups: int = 1,
    *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """3-D convolution, as `torch.nn.functional.conv3d`: ``N x C x D x H x W``, ``K x C/groups x kD x kH x kW``.

    See `conv1d` and `conv2d`.
    """
    return _convolution(3, input, weight, bias, stride, padding, dilation, groups, algorithm)


def conv_fused(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    relu: bool | _activation.Activation = False, stride=1, padding=0, dilation=1, groups: int = 1, *,
    algorithm: str = "auto", packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``relu(conv(input, weight, bias) + residual)``, each part if asked for, in one pass over the output.

    In place of ReLU there may be another clamp, such as ReLU6, or SiLU, Hardswish or GELU.

    For inference. Where a gradient is wanted the parts are computed one after another, so that the result is right
    there too.

    Args:
        input, weight, bias, stride, padding, dilation, groups, algorithm: as for `conv1d`, `conv2d` or `conv3d`;
            the weight's dimensions say which. The input is batched.
        residual: of the output's size and dtype, or None.
        relu: whether ReLU comes last, or which other activation.
        packed: what `pack_weight` returned for this weight, which must not have changed since. ``"auto"`` then knows
            that packing costs nothing.
    """
    spatial, activation = weight.dim() - 2, _activation.as_activation(relu)
    output = _short_way(
        spatial, input, weight, bias, residual, packed, *activation.bounds, stride, padding, dilation, groups,
        algorithm, activation.gate,
    )  # fmt: skip
    if output is not NotImplemented:
        return output
    stride, dilation = expand(stride, spatial, "stride"), expand(dilation, spatial, "dilation")
    groups = integer(groups, "groups")
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    if isinstance(padding, str):
        input, padding = _named_padding(padding, input, weight, stride, dilation, spatial)
    else:
        padding = expand(padding, spatial, "padding")
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, weight, bias, residual)
    ):
        output = convolution(input, weight, bias, stride, padding, dilation, groups, algorithm)
        output = output if residual is None else output + residual
        return _activation.apply(activation, output)
    return torch.ops.convlab.convolution_fused(
        input, weight, bias, residual, packed, *activation.bounds, stride, padding, dilation, groups, algorithm,
        activation.gate,
    )  # fmt: skip


def pack_weight(
    input: Tensor, weight: Tensor, stride=1, padding=0, dilation=1, groups: int = 1, *, algorithm: str = "auto"
) -> Tensor:  # fmt: skip
    """The weight in the order in which the kernel that will convolve such an `input` reads it, for `conv_fused`.

    Returns:
        Bytes that mean something to that kernel alone; empty if it reads the weight as it is. Used with an input for
        which another kernel is chosen, they are passed over.
    """
    spatial = weight.dim() - 2
    return torch.ops.convlab.convolution_pack(
        input, weight, expand(stride, spatial, "stride"), expand(padding, spatial, "padding"),
        expand(dilation, spatial, "dilation"), integer(groups, "groups"), algorithm,
    )  # fmt: skip


def conv_transpose1d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, output_padding=0,
    groups: int = 1, dilation=1, *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """1-D transposed convolution, as `torch.nn.functional.conv_transpose1d`.

    The adjoint of `conv1d`: its forward pass is that one's backward-input pass.

    Args:
        input: ``N x C x L``, or ``C x L``.
        weight: ``C x K/groups x taps``.
        bias: ``K``, or None.
        output_padding: added to the output's end; smaller than stride or dilation.

    Returns:
        ``N x K x L_out`` with ``L_out = (L-1)*stride - 2*padding + dilation*(taps-1) + output_padding + 1``.
    """
    return _transposed(1, input, weight, bias, stride, padding, output_padding, groups, dilation, algorithm)


def conv_transpose2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, output_padding=0,
    groups: int = 1, dilation=1, *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """2-D transposed convolution, as `torch.nn.functional.conv_transpose2d`. See `conv_transpose1d`."""
    return _transposed(2, input, weight, bias, stride, padding, output_padding, groups, dilation, algorithm)


def conv_transpose3d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, output_padding=0,
    groups: int = 1, dilation=1, *, algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    """3-D transposed convolution, as `torch.nn.functional.conv_transpose3d`. See `conv_transpose1d`."""
    return _transposed(3, input, weight, bias, stride, padding, output_padding, groups, dilation, algorithm)


def _short_way(*arguments):
    """The convolution where only the CPU kernel has a say in the call, at a third of the cost; else NotImplemented."""
    if torch.compiler.is_compiling():
        return NotImplemented
    return _C.convolution(*arguments)


def _convolution(spatial, input, weight, bias, stride, padding, dilation, groups, algorithm):
    output = _short_way(
        spatial, input, weight, bias, None, None, None, None, stride, padding, dilation, groups, algorithm
    )
    if output is not NotImplemented:
        return output
    unbatched = check_dimensions(f"conv{spatial}d", input, spatial)
    _check_types(weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    if unbatched:
        input = input.unsqueeze(0)
    stride, dilation = expand(stride, spatial, "stride"), expand(dilation, spatial, "dilation")
    groups = integer(groups, "groups")
    if isinstance(padding, str):
        input, padding = _named_padding(padding, input, weight, stride, dilation, spatial)
    else:
        padding = expand(padding, spatial, "padding")
    output = convolution(input, weight, bias, stride, padding, dilation, groups, algorithm)
    return output.squeeze(0) if unbatched else output


def _check_types(weight, bias):
    if not isinstance(weight, Tensor):
        check_tensors(weight=weight)
    if bias is not None and not isinstance(bias, Tensor):
        check_tensors(bias=bias)


def _named_padding(name, input, weight, stride, dilation, spatial):
    """The input, padded where 'same' needs an odd amount (one more at the end, as in torch), and the padding left."""
    if name == "valid":
        return input, [0] * spatial
    if name != "same":
        raise RuntimeError(f"Invalid padding string: '{name}', expected 'valid' or 'same'")
    if any(step != 1 for step in stride):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
    if weight.dim() != spatial + 2 or len(dilation) != spatial:
        return input, [0] * spatial  # the operator's check names what is wrong
    total = [dilation[axis] * (weight.shape[axis + 2] - 1) for axis in range(spatial)]
    if any(amount % 2 for amount in total):
        extra = [side for amount in reversed(total) for side in (0, amount % 2)]
        input = torch.nn.functional.pad(input, extra)
    return input, [amount // 2 for amount in total]


def _transposed(spatial, input, weight, bias, stride, padding, output_padding, groups, dilation, algorithm):
    name = f"conv_transpose{spatial}d"
    unbatched = check_dimensions(name, input, spatial)
    _check_types(weight, bias)
    input, weight, bias = autocast(input, weight, bias)
    if unbatched:
        input = input.unsqueeze(0)
    stride, padding = expand(stride, spatial, "stride"), expand(padding, spatial, "padding")
    output_padding = expand(output_padding, spatial, "output_padding")
    dilation, groups = expand(dilation, spatial, "dilation"), integer(groups, "groups")
    size = _transposed_size(name, input, weight, bias, stride, padding, output_padding, groups, dilation)
    if any(extra >= step for extra, step in zip(output_padding, stride)):
        # So long an output is that of more inputs (dilation > stride allows it): they are zeros.
        zeros = [side for extra, step in zip(reversed(output_padding), reversed(stride)) for side in (0, extra // step)]
        input = torch.nn.functional.pad(input, zeros)
    output = convolution_backward_input(input, weight, bias, size, stride, padding, dilation, groups, algorithm)
    return output.squeeze(0) if unbatched else output


def _transposed_size(name, input, weight, bias, stride, padding, output_padding, groups, dilation):
    """Size of the output; raises torch's errors in the caller's terms, where the operator would use its own."""
    spatial = input.dim() - 2
    arguments = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    for argument, values in arguments.items():
        if len(values) != spatial:
            raise RuntimeError(
                f"expected {argument} to be a single integer value or a list of {spatial} values to match the "
                f"convolution dimensions, but got {argument}={values}"
            )
    if groups <= 0:
        raise RuntimeError(f"expected groups to be greater than 0, but got groups={groups}")
    if weight.dim() != spatial + 2:
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, "
            f"but got {input.dim()}-dimensional input of size {list(input.shape)} instead"
        )
    if input.dtype != weight.dtype:
        raise RuntimeError(f"Input type ({input.dtype}) and weight type ({weight.dtype}) should be the same")
    if input.shape[1] != weight.shape[0]:
        raise RuntimeError(
            f"Given transposed=1, weight of size {list(weight.shape)}, expected input{list(input.shape)} to have "
            f"{weight.shape[0]} channels, but got {input.shape[1]} channels instead"
        )
    channels = weight.shape[1] * groups
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise RuntimeError(
            f"Given transposed=1, weight of size {list(weight.shape)}, expected bias to be 1-dimensional with "
            f"{channels} elements, but got bias of size {list(bias.shape)} instead"
        )
    size = [input.shape[0], channels]
    for axis in range(spatial):
        if output_padding[axis] < 0:
            raise RuntimeError(f"negative output_padding is not supported, but got output_padding={output_padding}")
        if stride[axis] <= 0:
            raise RuntimeError(f"non-positive stride is not supported, but got stride={stride}")
        if output_padding[axis] >= max(stride[axis], dilation[axis]):
            raise RuntimeError(
                f"output padding must be smaller than either stride or dilation, but got output_padding="
                f"{output_padding}, stride={stride}, dilation={dilation}"
            )
        extent = dilation[axis] * (weight.shape[axis + 2] - 1) + 1
        length = (input.shape[axis + 2] - 1) * stride[axis] - 2 * padding[axis] + extent + output_padding[axis]
        size.append(length)
    if any(length <= 0 for length in size[2:]):
        raise RuntimeError(
            f"Given input size per channel: ({_by(input.shape[2:])}). Calculated output size per channel: "
            f"({_by(size[2:])}). Output size is too small"
        )
    return size


def _by(sizes) -> str:
    return " x ".join(map(str, sizes))
