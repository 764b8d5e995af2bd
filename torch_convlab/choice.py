"""Which algorithm computes a convolution, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _C


@dataclass(frozen=True)
class Verdict:
    """What one algorithm says to a problem: a reason to refuse it, or the cost it expects.

    `cost` is in multiply-adds of a perfectly running matrix product, on CUDA of its scalar units: comparable between
    algorithms, not a time.
    """

    refusal: str | None
    cost: float | None


@dataclass(frozen=True)
class Choice:
    """The algorithm that ``"auto"`` takes, and the verdict of every algorithm, by name."""

    chosen: str
    verdicts: dict[str, Verdict]


_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def explain_convolution(
    input_size,
    weight_size,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    pass_="forward",
    dtype=torch.float32,
    device="cpu",
    packed=False,
    memory_format=torch.contiguous_format,
) -> Choice:
    """Say which algorithm ``"auto"`` takes for a convolution, and what each algorithm says to it.

    Args:
        input_size: ``N, C, *spatial`` with one to three spatial sizes.
        weight_size: ``K, C/groups, *kernel``.
        stride, padding, dilation: integers, or one per spatial axis.
        pass_: ``"forward"``, ``"backward_input"`` or ``"backward_weight"``.
        dtype: float32, float64, bfloat16 or float16.
        device: ``"cpu"`` or ``"cuda"``, as a string or `torch.device`; none need be there.
        packed: whether the weight is kept as the kernel reads it, as layers of a fused model keep it in eval mode.
        memory_format: of the tensors, ``torch.contiguous_format``, ``torch.channels_last`` or ``channels_last_3d``.

    Raises:
        ValueError: sizes, `pass_`, `dtype`, `device` or `memory_format` that no convolution has.

    >>> explain_convolution((1, 64, 56, 56), (64, 64, 3, 3), padding=1).chosen
    'winograd'
    """
    spatial = len(input_size) - 2
    if len(weight_size) != len(input_size) or spatial < 1:
        raise ValueError(f"expected input_size and weight_size of 3 to 5 values, got {input_size} and {weight_size}")
    if weight_size[1] * groups != input_size[1]:
        raise ValueError(f"expected weight_size[1] * groups to be {input_size[1]}, got {weight_size[1]} * {groups}")

    def full(value):
        return [value] * spatial if isinstance(value, int) else list(value)

    geometry = _C.ConvGeometry(
        batch=input_size[0],
        in_channels=input_size[1],
        out_channels=weight_size[0],
        groups=groups,
        input=list(input_size[2:]),
        kernel=list(weight_size[2:]),
        stride=full(stride),
        padding=full(padding),
        dilation=full(dilation),
    )
    name = str(dtype).removeprefix("torch.")
    if pass_ not in _C.Pass.__members__:
        raise ValueError(f"expected pass_ to be one of {', '.join(_C.Pass.__members__)}, got {pass_!r}")
    if name not in _C.Dtype.__members__:
        raise ValueError(f"expected dtype to be one of {', '.join(_C.Dtype.__members__)}, got {dtype}")
    kind = torch.device(device).type
    if kind not in _C.Device.__members__:
        raise ValueError(f"expected device to be one of {', '.join(_C.Device.__members__)}, got {device}")
    if memory_format not in _FORMATS:
        raise ValueError(f"expected memory_format to be one of {', '.join(map(str, _FORMATS))}, got {memory_format}")
    chosen, verdicts = _C.explain(
        geometry,
        _C.Pass.__members__[pass_],
        _C.Dtype.__members__[name],
        _C.Device.__members__[kind],
        bool(packed),
        memory_format != torch.contiguous_format,
    )
    return Choice(chosen, {key: Verdict(reason or None, cost) for key, (reason, cost) in verdicts.items()})
