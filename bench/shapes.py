"""The convolutions of real models, as data: what `bench/run.py conv` measures.

A suite is the list of distinct convolutions of a model, each with the number of layers that have it. Spatial sizes are
those of the usual input (224 x 224 unless the suite says otherwise).
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

TIMM = Path(__file__).with_name("timm_convolutions.csv")


@dataclass(frozen=True)
class ConvShape:
    """One convolution without its batch size; tuples have one entry per spatial dimension."""

    in_channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    layers: int = 1
    transposed: bool = False

    @property
    def spatial(self) -> int:
        return len(self.size)

    @property
    def name(self) -> str:
        def joined(values):
            return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))

        parts = [
            f"{self.in_channels}x{'x'.join(map(str, self.size))}",
            f"{'T' if self.transposed else ''}->{self.out_channels}",
            f"k{joined(self.kernel)}",
            f"s{joined(self.stride)}",
            f"p{joined(self.padding)}",
        ]
        if set(self.dilation) != {1}:
            parts.append(f"d{joined(self.dilation)}")
        if self.groups > 1:
            parts.append("dw" if self.groups == self.in_channels else f"g{self.groups}")
        return " ".join(parts)


def conv(c, size, k, kernel, stride=1, padding=0, groups=1, layers=1, dilation=1, bias=False, dims=2) -> ConvShape:
    def full(value):
        return value if isinstance(value, tuple) else (value,) * dims

    return ConvShape(c, full(size), k, full(kernel), full(stride), full(padding), full(dilation), groups, bias, layers)


def _resnet(width: int, groups: int) -> list[ConvShape]:
    """Bottleneck ResNet with stages of 3, 4, 6, 3 blocks; `width` is the first stage's inner width."""
    shapes = [conv(3, 224, 64, 7, 2, 3)]
    channels, size = 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, out = width << stage, 256 << stage
        stride = 1 if stage == 0 else 2
        shapes += [
            conv(channels, size, inner, 1),
            conv(inner, size, inner, 3, stride, 1, groups),
            conv(channels, size, out, 1, stride),
        ]
        size //= stride
        shapes += [
            conv(inner, size, out, 1, layers=blocks),
            conv(out, size, inner, 1, layers=blocks - 1),
            conv(inner, size, inner, 3, 1, 1, groups, layers=blocks - 1),
        ]
        channels = out
    return shapes


def _vgg16() -> list[ConvShape]:
    rows = [(3, 224, 64, 1), (64, 224, 64, 1), (64, 112, 128, 1), (128, 112, 128, 1), (128, 56, 256, 1)]
    rows += [(256, 56, 256, 2), (256, 28, 512, 1), (512, 28, 512, 2), (512, 14, 512, 3)]
    return [conv(c, size, k, 3, 1, 1, layers=layers, bias=True) for c, size, k, layers in rows]


def _mobilenet_v2() -> list[ConvShape]:
    shapes = [conv(3, 224, 32, 3, 2, 1), conv(32, 112, 32, 3, 1, 1, groups=32), conv(32, 112, 16, 1)]
    channels, size = 16, 112
    for out, repeats, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for index in range(repeats):
            inner, step = channels * 6, stride if index == 0 else 1
            shapes += [conv(channels, size, inner, 1), conv(inner, size, inner, 3, step, 1, groups=inner)]
            size //= step
            shapes.append(conv(inner, size, out, 1))
            channels = out
    return [*shapes, conv(320, 7, 1280, 1)]


def _convnext_tiny() -> list[ConvShape]:
    shapes = [conv(3, 224, 96, 4, 4, bias=True)]
    for stage, blocks in enumerate((3, 3, 9, 3)):
        channels, size = 96 << stage, 56 >> stage
        if stage:
            shapes.append(conv(channels // 2, size * 2, channels, 2, 2, bias=True))
        shapes.append(conv(channels, size, channels, 7, 1, 3, groups=channels, layers=blocks, bias=True))
    return shapes


def _unet3d() -> list[ConvShape]:
    """Input 1 x 64^3: two 3x3x3 convolutions per level, 16 to 128 channels, and back up by transposed ones."""
    shapes, size = [], 64
    channels = 1
    for out in (16, 32, 64, 128):
        shapes += [conv(channels, size, out, 3, 1, 1, dims=3), conv(out, size, out, 3, 1, 1, dims=3)]
        channels, size = out, size // 2
    for out, size in ((64, 16), (32, 32), (16, 64)):
        up = conv(2 * out, size // 2, out, 2, 2, dims=3, bias=True)
        shapes.append(ConvShape(**{**up.__dict__, "transposed": True}))
        shapes.append(conv(2 * out, size, out, 3, 1, 1, dims=3))
    return [*shapes, conv(16, 64, 2, 1, dims=3, bias=True)]


def _wav2vec2() -> list[ConvShape]:
    """One second of audio, and the grouped positional convolution."""
    shapes, length = [conv(1, 16000, 512, 10, 5, dims=1)], 3199
    for kernel in (3, 3, 3, 3, 2, 2):
        shapes.append(conv(512, length, 512, kernel, 2, dims=1))
        length = (length - kernel) // 2 + 1
    return [*shapes, conv(768, length, 768, 128, 1, 64, groups=16, dims=1, bias=True)]


def _distinct(shapes: list[ConvShape]) -> list[ConvShape]:
    counts: dict[ConvShape, int] = {}
    for shape in shapes:
        key = ConvShape(**{**shape.__dict__, "layers": 1})
        counts[key] = counts.get(key, 0) + shape.layers
    return [ConvShape(**{**key.__dict__, "layers": layers}) for key, layers in counts.items()]


SUITES = {
    "resnet50": lambda: _resnet(64, 1),
    "resnext50": lambda: _resnet(128, 32),
    "vgg16": _vgg16,
    "mobilenet_v2": _mobilenet_v2,
    "convnext_tiny": _convnext_tiny,
    "lenet5": lambda: [conv(1, 28, 20, 5, 1, 2, bias=True), conv(20, 14, 50, 5, 1, 2, bias=True)],
    "unet3d": _unet3d,
    "wav2vec2": _wav2vec2,
}


def suite(name: str) -> list[ConvShape]:
    """The distinct convolutions of a model. Raises KeyError for an unknown one."""
    return _distinct(SUITES[name]())


def timm(sample: int | None = None, seed: int = 0) -> list[ConvShape]:
    """Convolutions of the timm collection (ConvBench, MIT licence), or `sample` drawn in proportion to `layers`."""
    with TIMM.open() as file:
        rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]
    shapes = [
        ConvShape(
            r["c_in"], (r["h_in"], r["w_in"]), r["c_out"], (r["k_h"], r["k_w"]), (r["s_h"], r["s_w"]),
            (r["p_h"], r["p_w"]), (r["d_h"], r["d_w"]), r["groups"], bool(r["bias"]), r["layers"],
        )
        for r in rows
    ]  # fmt: skip
    if sample is None or sample >= len(shapes):
        return shapes
    generator = random.Random(seed)
    # Without replacement and in proportion to `layers`: the largest keys u^(1/weight) (Efraimidis and Spirakis 2006).
    keyed = sorted(shapes, key=lambda shape: generator.random() ** (1 / shape.layers), reverse=True)
    return keyed[:sample]
