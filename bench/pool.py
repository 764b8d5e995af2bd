"""The verb `pool`: the usual max, average, adaptive and global pools, 2-D and 3-D, every pass."""

from __future__ import annotations

import layers
import torch.nn.functional as F
from layers import Layer

import torch_convlab.functional as ours

PASSES = ("forward", "train", "backward")
KINDS = ("max", "average", "adaptive", "global", "average_3d", "max_3d")


def add_arguments(parser) -> None:
    parser.add_argument("--kind", choices=KINDS, action="append", help="may be given several times (default all)")
    parser.add_argument("--pass", dest="pass_", choices=PASSES, action="append", help="(default all)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=layers.TOLERANCE, default="float32")
    parser.add_argument("--filter", default="", help="only shapes whose name contains this")


def _pool(kind: str, function: str, batch: int, channels: int, size: tuple[int, ...], *arguments) -> Layer:
    theirs, mine = getattr(F, function), getattr(ours, function)
    text = " ".join(
        f"{letter}{value}" for letter, value in zip("ksp" if "adaptive" not in function else "o", arguments)
    )
    return Layer(
        kind, f"{channels}x{'x'.join(map(str, size))} {text}", ((batch, channels, *size),), (),
        lambda x: theirs(x, *arguments), lambda x: mine(x, *arguments), reads_input=False,
    )  # fmt: skip


def _layers(kind: str, batch: int) -> list[Layer]:
    """Sizes of ResNet, VGG-16, AlexNet, GoogLeNet, LeNet-5, DenseNet, a 3-D UNet; some channels are not vectors."""
    small = max(1, batch // 4)
    if kind == "max":
        cases = [
            (64, 112, 3, 2, 1), (64, 55, 3, 2, 0), (192, 56, 3, 2, 1), (64, 224, 2, 2, 0), (128, 112, 2, 2, 0),
            (256, 56, 2, 2, 0), (512, 14, 2, 2, 0), (20, 28, 2, 2, 0), (50, 14, 2, 2, 0), (480, 14, 3, 1, 1),
        ]  # fmt: skip
        return [_pool(kind, "max_pool2d", batch, c, (s, s), k, stride, p) for c, s, k, stride, p in cases]
    if kind == "average":
        cases = [(128, 56, 2, 2, 0), (512, 14, 2, 2, 0), (192, 35, 3, 1, 1), (20, 28, 2, 2, 0), (64, 112, 3, 2, 1)]
        return [_pool(kind, "avg_pool2d", batch, c, (s, s), k, stride, p) for c, s, k, stride, p in cases]
    if kind == "adaptive":
        cases = [(256, 13, 6), (512, 14, 7), (512, 20, 7)]
        return [_pool(kind, "adaptive_avg_pool2d", batch, c, (s, s), o) for c, s, o in cases]
    if kind == "global":
        cases = [(512, (7, 7)), (2048, (7, 7)), (1280, (7, 7)), (64, (56, 56)), (144, (28, 28))]
        return [
            *(_pool(kind, "adaptive_avg_pool2d", batch, c, s, 1) for c, s in cases),
            _pool(kind, "adaptive_avg_pool3d", small, 128, (8, 8, 8), 1),
        ]
    function = "avg_pool3d" if kind == "average_3d" else "max_pool3d"
    cases = [(16, 64, 2, 2, 0), (32, 32, 2, 2, 0), (64, 16, 2, 2, 0), (32, 28, 3, 2, 1), (64, 14, 3, 1, 1)]
    return [_pool(kind, function, small, c, (s, s, s), k, stride, p) for c, s, k, stride, p in cases]


def run(options, progress) -> layers.Result:
    kinds, passes = options.kind or KINDS, options.pass_ or PASSES
    chosen = [
        (layer, pass_)
        for kind in kinds
        for pass_ in passes
        for layer in _layers(kind, options.batch)
        if options.filter in layer.name
    ]
    name = "-".join(["pool", *(options.kind or ()), *(options.pass_ or ()), f"n{options.batch}", options.dtype])
    return layers.run(name, chosen, options.dtype, options, progress)
