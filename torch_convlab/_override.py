"""Routes the functions of torch that unmodified code calls to this library, inside a ``with`` block."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import functional

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


class override(TorchFunctionMode):
    """Context manager: `torch.nn.functional` is computed by this library inside, in code that stays as it is.

    Convolutions, transposed convolutions, linear layers, pooling and normalization are routed, whether called through
    a layer of torch.nn, through `torch.nn.functional` or as ``torch.conv2d`` and the like; gradients come from this
    library too. What it does not compute (other devices and dtypes, tensor subclasses) runs in torch as before.

    It holds for the thread that enters it and ends with the block; blocks may be nested. `calls` counts what was
    routed, by name.

    >>> with torch_convlab.override() as routed:
    ...     output = somebody_elses_model(input)
    >>> routed.calls
    Counter({'conv2d': 53, 'batch_norm': 53, 'max_pool2d': 1, ...})
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = _table().get(function)
        if ours is None or any(issubclass(kind, Tensor) and kind not in _PLAIN for kind in types):
            return function(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors or not all(map(_computable, tensors)):
            return function(*args, **kwargs)
        self.calls[getattr(function, "__name__", str(function)).lstrip("_")] += 1
        return ours(*args, **kwargs)


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _computable(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return strided and tensor.dtype in _DTYPES and _has_kernels(tensor.device.type)


@functools.cache
def _has_kernels(device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("convlab::batch_norm_train", key)


@functools.cache
def _table() -> dict[Callable, Callable]:
    """Functions of torch -> ours, called with the same arguments."""
    table = {}
    for name in functional.__all__:
        theirs = getattr(torch.nn.functional, name, None)
        if theirs is not None:
            table[theirs] = getattr(functional, name)
        native = getattr(torch, name, None)
        if native is not None and name.startswith(("conv", "adaptive_avg_pool", "avg_pool", "rms_norm")):
            table[native] = getattr(functional, name)
    for name, adapter in native_signatures().items():
        if hasattr(torch, name):
            table[getattr(torch, name)] = adapter
    return table


def native_signatures() -> dict[str, Callable]:
    """Our functions with the signatures of ``torch.batch_norm`` and the like, which are those of the ATen operators."""

    def batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True):
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled=True
    ):
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
        return functional.group_norm(input, num_groups, weight, bias, eps)

    def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)

    table = {each.__name__: each for each in (batch_norm, instance_norm, group_norm, layer_norm)}
    for dimensions in (1, 2, 3):
        name = f"max_pool{dimensions}d"
        table[name] = _max_pool(getattr(functional, name))
    return table


def _max_pool(ours: Callable) -> Callable:
    def max_pool(input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
        return ours(input, kernel_size, stride or None, padding, dilation, ceil_mode)

    return max_pool
