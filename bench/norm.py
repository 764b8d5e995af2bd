"""The verb `norm`: normalizations of real models, plain and fused with add and ReLU, every pass."""

from __future__ import annotations

import layers
import torch
import torch.nn.functional as F
from layers import Layer

import torch_convlab.functional as ours

PASSES = ("forward", "train", "backward", "double_backward")
# (channels, height and width, layers of ResNet-50 that have this size), without and with a residual add after them.
RESNET50 = [
    (64, 112, 1), (64, 56, 6), (128, 56, 1), (128, 28, 7), (256, 28, 1), (256, 14, 11), (512, 14, 1), (512, 7, 5),
]  # fmt: skip
RESNET50_RESIDUAL = [(256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)]
KINDS = (
    "batch_norm", "batch_norm_relu", "batch_norm_add_relu", "batch_norm_eval", "group_norm", "layer_norm",
    "instance_norm", "rms_norm",
)  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be given several times (default all)")
    parser.add_argument("--pass", dest="pass_", choices=PASSES, action="append", help="(default forward, backward)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=layers.TOLERANCE, default="float32")
    parser.add_argument("--filter", default="", help="only shapes whose name contains this")


def _batch_norm(kind: str, channels: int, size: tuple[int, ...], count: int, batch: int) -> Layer:
    shape = (batch, channels, *size)
    residual = kind == "batch_norm_add_relu"
    statistics = torch.zeros(channels), torch.ones(channels)

    if kind == "batch_norm_eval":
        constants = {dtype: [tensor.to(dtype) for tensor in statistics] for dtype in (torch.float32, torch.float64)}
        constants |= dict.fromkeys((torch.bfloat16, torch.float16), constants[torch.float32])

        def theirs(x, w, b):
            return F.relu_(F.batch_norm(x, *constants[x.dtype], w, b, False))

        def mine(x, w, b):
            return ours.batch_norm_relu(x, *constants[x.dtype], w, b, False)
    elif kind == "batch_norm":

        def theirs(x, w, b):
            return F.batch_norm(x, None, None, w, b, True)

        def mine(x, w, b):
            return ours.batch_norm(x, None, None, w, b, True)
    elif kind == "batch_norm_relu":

        def theirs(x, w, b):
            return F.relu_(F.batch_norm(x, None, None, w, b, True))

        def mine(x, w, b):
            return ours.batch_norm_relu(x, None, None, w, b, True)
    else:

        def theirs(x, r, w, b):
            return F.relu_(F.batch_norm(x, None, None, w, b, True).add_(r))

        def mine(x, r, w, b):
            return ours.batch_norm_add_relu(x, r, None, None, w, b, True)

    name = f"{channels}x{'x'.join(map(str, size))}"
    return Layer(kind, name, (shape,) * (1 + residual), ((channels,),) * 2, theirs, mine, count)


def _group_norm(channels: int, size: tuple[int, ...], groups: int, batch: int) -> Layer:
    return Layer(
        "group_norm", f"{channels}x{'x'.join(map(str, size))} g{groups}", ((batch, channels, *size),),
        ((channels,),) * 2, lambda x, w, b: F.group_norm(x, groups, w, b),
        lambda x, w, b: ours.group_norm(x, groups, w, b),
    )  # fmt: skip


def _instance_norm(channels: int, size: tuple[int, ...], batch: int) -> Layer:
    return Layer(
        "instance_norm", f"{channels}x{'x'.join(map(str, size))}", ((batch, channels, *size),), ((channels,),) * 2,
        lambda x, w, b: F.instance_norm(x, None, None, w, b), lambda x, w, b: ours.instance_norm(x, None, None, w, b),
    )  # fmt: skip


def _layer_norm(rows: tuple[int, ...], features: int, batch: int) -> Layer:
    return Layer(
        "layer_norm", f"{'x'.join(map(str, rows))}x{features}", ((batch, *rows, features),), ((features,),) * 2,
        lambda x, w, b: F.layer_norm(x, (features,), w, b), lambda x, w, b: ours.layer_norm(x, (features,), w, b),
        formats=("nchw",),
    )  # fmt: skip


def _rms_norm(rows: tuple[int, ...], features: int, batch: int) -> Layer:
    return Layer(
        "rms_norm", f"{'x'.join(map(str, rows))}x{features}", ((batch, *rows, features),), ((features,),),
        lambda x, w: F.rms_norm(x, (features,), w, 1e-5), lambda x, w: ours.rms_norm(x, (features,), w, 1e-5),
        formats=("nchw",),
    )  # fmt: skip


def _layers(kind: str, batch: int) -> list[Layer]:
    small = max(1, batch // 4)
    rows = [((56, 56), 96), ((28, 28), 192), ((14, 14), 384), ((7, 7), 768), ((197,), 768), ((512,), 1024)]
    if kind.startswith("batch_norm"):
        sizes = RESNET50_RESIDUAL if "add" in kind else [*RESNET50, *RESNET50_RESIDUAL]
        if kind == "batch_norm_relu":
            sizes = RESNET50
        return [_batch_norm(kind, channels, (size, size), count, batch) for channels, size, count in sizes]
    if kind == "group_norm":
        return [
            *(_group_norm(c, (s, s), 32, batch) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
            *(_group_norm(c, (s, s), 32, small) for c, s in ((320, 64), (640, 32))),
            *(_group_norm(c, (s, s, s), 8, 1) for c, s in ((16, 64), (64, 16))),
        ]
    if kind == "instance_norm":
        return [
            *(_instance_norm(c, (s, s), small) for c, s in ((64, 128), (128, 64), (256, 32))),
            *(_instance_norm(c, (s, s, s), 1) for c, s in ((16, 64), (32, 32), (64, 16), (128, 8))),
        ]
    make = _layer_norm if kind == "layer_norm" else _rms_norm
    return [make(leading, features, batch) for leading, features in rows]


def run(options, progress) -> layers.Result:
    kinds, passes = options.kind or KINDS, options.pass_ or ["forward", "backward"]
    chosen = [
        (layer, pass_)
        for kind in kinds
        for pass_ in passes
        for layer in _layers(kind, options.batch)
        if options.filter in layer.name and not (pass_ == "double_backward" and kind == "batch_norm_eval")
    ]
    name = "-".join(["norm", *(options.kind or ()), *(options.pass_ or ()), f"n{options.batch}", options.dtype])
    return layers.run(name, chosen, options.dtype, options, progress)
