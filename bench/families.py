"""The verb `families`: convolutions of every kind, as they occur in models, one line of results per family and pass.

A shape is written "batch x channels x size -> channels kernel [sSTRIDE] [pPADDING] [dDILATION] [gGROUPS] [T]"; "dw" is
one group per channel, T a transposed convolution. Without p the padding is what keeps the size (none for T or where the
stride is the kernel).
"""

from __future__ import annotations

import re

import conv
import measure
import torch
from measure import Result
from shapes import ConvShape

import torch_convlab

FAMILIES = {
    "3x3 stride 1": """8x64x56x56->64 k3, 8x128x28x28->128 k3, 8x256x14x14->256 k3, 8x512x7x7->512 k3,
        1x128x112x112->128 k3, 1x512x28x28->512 k3, 1x64x56x56->64 k3, 32x32x16x16->32 k3, 2x48x61x35->80 k3""",
    "1x1 ResNet": """8x64x56x56->256 k1, 8x256x56x56->64 k1, 8x512x28x28->128 k1, 8x128x28x28->512 k1,
        8x1024x14x14->256 k1, 8x256x14x14->1024 k1, 8x512x7x7->2048 k1, 8x256x56x56->512 k1 s2 p0""",
    "1x1 MobileNet and batch 1": """2x24x56x56->144 k1, 2x144x28x28->32 k1, 2x192x28x28->64 k1, 2x576x14x14->96 k1,
        2x160x7x7->960 k1, 1x64x56x56->256 k1, 1x256x56x56->64 k1, 1x1024x14x14->256 k1, 1x40x28x28->10 k1""",
    "3x3 stride 2": """8x128x56x56->128 k3 s2, 8x256x28x28->256 k3 s2, 8x512x14x14->512 k3 s2, 2x64x61x35->96 k3 s2,
        32x16x32x32->32 k3 s2, 1x64x64x64->128 k3 s2""",
    "7x7 stem": "8x3x224x224->64 k7 s2, 1x3x224x224->64 k7 s2",
    "depthwise 2-D": """2x96x56x56->96 k3 dw, 2x32x112x112->32 k3 dw, 2x960x7x7->960 k3 dw, 2x240x28x28->240 k5 dw,
        2x96x56x56->96 k7 dw, 2x384x14x14->384 k7 dw, 2x96x112x112->96 k3 s2 dw, 2x240x28x28->240 k5 s2 dw,
        2x128x28x28->128 k3 d2 dw, 2x128x28x28->128 k13 dw""",
    "depthwise 1-D": """4x256x1000->256 k3 dw, 4x256x1000->256 k7 dw, 4x256x1000->256 k15 dw, 4x256x1000->256 k31 dw,
        4x256x1000->256 k65 dw, 1x1536x512->1536 k4 p3 dw""",
    "depthwise 3-D": "1x64x8x56x56->64 k3 dw, 1x128x8x28x28->128 k3x1x1 dw",
    "grouped, 2-8 per group": """2x128x56x56->128 k3 g32, 2x256x28x28->256 k3 g32, 2x256x56x56->256 k3 g32,
        2x128x28x28->128 k3 g16, 2x128x28x28->128 k3 g64, 2x120x28x28->120 k3 g15, 2x256x56x56->256 k3 s2 g32,
        2x64x56x56->128 k3 g64""",
    "grouped, wider": """2x512x14x14->512 k3 g32, 2x1024x7x7->1024 k3 g32, 2x128x28x28->128 k3 g4,
        2x240x28x28->240 k1 g3""",
    "few channels in": """64x1x28x28->20 k5, 64x1x28x28->32 k3 p0, 32x3x32x32->64 k3, 1x3x224x224->64 k3,
        1x3x224x224->32 k3 s2, 1x4x64x64->320 k3, 4x6x14x14->16 k5 p0""",
    "few channels out": "1x64x256x256->3 k3, 1x64x256x256->1 k1, 1x128x128x128->3 k7, 1x320x64x64->4 k3",
    "few channels in and out": "1x3x256x256->3 k3, 1x1x512x512->1 k11, 1x3x512x512->3 k1, 1x8x8x8->8 k3",
    "patch embedding": """4x3x224x224->768 k16 s16, 2x3x224x224->96 k4 s4, 1x96x56x56->192 k2 s2,
        2x3x224x224->1024 k14 s14, 1x64x56x56->64 k8 s8""",
    "1-D dense": """1x512x3199->512 k3 s2 p0, 8x64x1024->64 k3 d4, 1x256x2000->256 k7, 1x128x12000->128 k11 d5,
        1x80x500->512 k7, 1x32x64000->1 k7, 1x1x16000->512 k10 s5 p0, 8x25x400->25 k7 p6 d2""",
    "3-D": """1x16x32x32x32->16 k3, 1x64x16x16x16->64 k3, 1x1x48x48x48->16 k3, 1x4x48x48x48->32 k3,
        2x64x8x28x28->64 k3, 1x64x8x56x56->64 k3x1x1, 1x64x8x56x56->64 k1x3x3, 1x32x32x32x32->64 k3 s2""",
    "transposed": """1x128x64x64->64 k2 s2 T, 4x256x16x16->128 k4 s2 p1 T, 8x64x32x32->3 k4 s2 p1 T,
        2x128x28x28->128 k3 p1 T, 1x256x800->128 k16 s8 p4 T, 1x64x16x16x16->32 k2 s2 T, 8x100x1x1->512 k4 T""",
    "dilated and other": """1x256x33x33->256 k3 d6, 2x64x56x56->64 k3 d2, 2x128x17x17->128 k1x7, 2x64x28x28->64 k5,
        8x256x1x1->16 k1, 32x512x1x1->32 k1""",
}


def parse(text: str) -> tuple[int, ConvShape]:
    """Batch size and shape of one entry."""
    head, kernel, *rest = re.sub(r"\s+", " ", text.strip()).split(" ")
    left, out = head.split("->")
    batch, channels, *size = (int(value) for value in left.split("x"))
    dims = len(size)

    def full(value: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in value.split("x"))
        return values if len(values) == dims else values * dims

    options = {part[0]: part[1:] for part in rest if part not in ("dw", "T")}
    kernel, transposed = full(kernel[1:]), "T" in rest
    stride, dilation = full(options.get("s", "1")), full(options.get("d", "1"))
    none = transposed or stride == kernel != (1,) * dims
    same = tuple(0 if none else d * (k - 1) // 2 for k, d in zip(kernel, dilation))
    padding = full(options["p"]) if "p" in options else same
    groups = channels if "dw" in rest else int(options.get("g", 1))
    shape = ConvShape(channels, tuple(size), int(out), kernel, stride, padding, dilation, groups, transposed=transposed)
    return batch, shape


def add_arguments(parser) -> None:
    parser.add_argument("--filter", default="", help="only families whose name contains this")
    parser.add_argument("--dtype", choices=conv.DTYPES, default="float32")
    parser.add_argument("--algorithm", default="auto", choices=["auto", *torch_convlab.algorithms()])
    parser.add_argument("--verbose", action="store_true", help="print every shape on standard error")


@torch.no_grad()
def run(options, progress) -> Result:
    columns = ["family", "shapes", "forward", "worst", "backward input", "worst", "backward weight", "worst"]
    result = Result(f"families-{options.dtype}", columns)
    records = []
    for family, text in FAMILIES.items():
        if options.filter not in family:
            continue
        shapes = [parse(entry) for entry in text.split(",")]
        row = [family, str(len(shapes))]
        for pass_ in ("forward", "backward_input", "backward_weight"):
            measured = []
            for batch, shape in shapes:
                record = conv.measure_shape(shape, batch, pass_, options)
                wrong = conv.is_wrong(record, options.dtype)
                result.failed |= wrong
                measured.append({"family": family, "pass": pass_, "batch": batch, **record})
                if options.verbose or wrong:
                    progress(f"  {'WRONG ' if wrong else ''}{record['ratio']:6.2f} {pass_:15} {batch}x{shape.name} "
                             f"{record['algorithm']} {record['format']}")  # fmt: skip
            ratios = [record["ratio"] for record in measured]
            row += [f"{measure.geomean(ratios):.2f}", f"{min(ratios):.2f}"]
            records += measured
        progress("  ".join(row))
        result.rows.append(row)
    slower = [r for r in records if r["ratio"] < 1]
    result.summary = [
        f"{result.name}, {torch.get_num_threads()} threads: geomean over the shapes against the better torch format",
        f"slower than torch: {len(slower)} of {len(records)}",
    ]
    result.data = {"name": result.name, "shapes": records}
    return result
