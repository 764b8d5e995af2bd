"""`bench/run.py conv`: every pass of a convolution, ours against torch, both in NCHW and channels_last."""

from __future__ import annotations

import measure
import shapes
import torch
from measure import Result

import torch_convlab
from torch_convlab.lab.machine import measure_machine

PASSES = ("forward", "backward_input", "backward_weight")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# max|error| / max|reference| against float64 above which a result is not timed but reported as wrong.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 1e-2, "float16": 2e-3}


def add_arguments(parser) -> None:
    parser.add_argument("--suite", choices=[*shapes.SUITES, "timm"], default="resnet50")
    parser.add_argument("--sample", type=int, default=100, help="timm: how many shapes to draw (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pass", dest="pass_", choices=PASSES, default="forward")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--algorithm", default="auto")
    parser.add_argument("--filter", default="", help="only shapes whose name contains this, for example 'k3 s1'")


def operands(shape: shapes.ConvShape, batch: int, dtype: torch.dtype, pass_: str):
    """input, weight and grad_output; for a transposed convolution those of the convolution it is the adjoint of."""
    generator = torch.Generator().manual_seed(0)
    if shape.transposed:
        axes = zip(shape.size, shape.stride, shape.padding, shape.dilation, shape.kernel)
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in axes]
        channels, out_channels = shape.out_channels, shape.in_channels
    else:
        size, channels, out_channels = list(shape.size), shape.in_channels, shape.out_channels
    input = torch.randn(batch, channels, *size, generator=generator)
    weight = torch.randn(out_channels, channels // shape.groups, *shape.kernel, generator=generator)
    weight /= weight[0].numel() ** 0.5
    output_size = torch.ops.convlab.convolution(
        input.to("meta"), weight.to("meta"), None, *parameters(shape), "auto"
    ).shape
    grad_output = torch.randn(output_size, generator=generator)
    return [tensor.to(dtype) for tensor in (input, weight, grad_output)]


def parameters(shape):
    return list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups


def calls(shape, pass_: str, input, weight, grad_output, algorithm: str):
    """The same pass by torch and by us, as functions without arguments."""
    stride, padding, dilation, groups = rest = parameters(shape)
    zeros = [0] * len(stride)
    ops = torch_convlab.autograd
    if shape.transposed:  # forward is the adjoint's backward input, and the other way round
        pass_ = {"forward": "backward_input", "backward_input": "forward"}.get(pass_, pass_)
    if pass_ == "forward":
        return (
            lambda: torch.convolution(input, weight, None, stride, padding, dilation, False, zeros, groups),
            lambda: ops.convolution(input, weight, None, *rest, algorithm),
        )
    if pass_ == "backward_input":
        size = list(input.shape)
        return (
            lambda: _torch_backward(shape, grad_output, input, weight, [True, False, False])[0],
            lambda: ops.convolution_backward_input(grad_output, weight, None, size, *rest, algorithm),
        )
    size = list(weight.shape)
    return (
        lambda: _torch_backward(shape, grad_output, input, weight, [False, True, False])[1],
        lambda: ops.convolution_backward_weight(grad_output, input, size, *rest, algorithm),
    )


def _torch_backward(shape, grad_output, input, weight, mask):
    stride, padding, dilation, groups = parameters(shape)
    return torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
    )


def in_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, whose strides say so even where there is one channel, as those of an output do."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(2).clone(memory_format=torch.channels_last).squeeze(2)
    return tensor.clone(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-300)).item()


def measure_shape(shape: shapes.ConvShape, batch: int, pass_: str, options) -> dict:
    """One pass of one shape: errors against float64 first, then times in turns."""
    dtype = DTYPES[options.dtype]
    tensors_given = operands(shape, batch, dtype, pass_)
    reference = calls(shape, pass_, *(t.double() for t in tensors_given), "auto")[0]()
    contenders, errors = {}, {}
    for label, tensors in (("nchw", tensors_given), ("nhwc", [in_channels_last(t) for t in tensors_given])):
        theirs, ours = calls(shape, pass_, *tensors, options.algorithm)
        contenders[f"torch {label}"], contenders[f"ours {label}"] = theirs, ours
        for name, call in ((f"torch {label}", theirs), (f"ours {label}", ours)):
            errors[name] = error(call(), reference)
    timing = measure.interleave(contenders, options.rounds, options.seconds)
    torch_best = timing.best(["torch nchw", "torch nhwc"])
    ours_best = timing.best(["ours nchw", "ours nhwc"])
    ratio, low, high = timing.ratio(torch_best, ours_best)
    weight, output = tensors_given[1], tensors_given[2]
    flops = 2 * output.numel() * weight[0].numel()
    return {
        "shape": shape.name,
        "algorithm": explain(shape, tensors_given, pass_, ours_best.endswith("nhwc")).chosen
        if options.algorithm == "auto"
        else options.algorithm,
        "layers": shape.layers,
        "flops": flops,
        "microseconds": {name: timing.median(name) * 1e6 for name in contenders},
        "errors": errors,
        "gflops": flops / timing.median(ours_best) * 1e-9,
        "format": ours_best.split()[1],
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "ratio_nchw": timing.ratio(torch_best, "ours nchw")[0],
        "ratio_nhwc": timing.ratio(torch_best, "ours nhwc")[0],
    }


def explain(shape: shapes.ConvShape, tensors, pass_: str, channels_last: bool):
    """What `auto` thinks of one pass; of a transposed convolution, of the pass of its adjoint that computes it."""
    input, weight, _ = tensors
    if shape.transposed:
        pass_ = {"forward": "backward_input", "backward_input": "forward"}.get(pass_, pass_)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch_convlab.explain_convolution(
        input.shape, weight.shape, *parameters(shape), pass_=pass_, dtype=input.dtype, memory_format=memory_format
    )


def is_wrong(record: dict, dtype: str) -> bool:
    """Whether one of our results is further from float64 than the tolerance."""
    return not all(record["errors"][f"ours {label}"] <= TOLERANCE[dtype] for label in ("nchw", "nhwc"))


@torch.no_grad()
def run(options, progress) -> Result:
    chosen = shapes.timm(options.sample, options.seed) if options.suite == "timm" else shapes.suite(options.suite)
    chosen = [shape for shape in chosen if options.filter in shape.name]
    name = f"conv-{options.suite}-{options.pass_}-n{options.batch}-{options.dtype}"
    columns = [
        "shape",
        "layers",
        "algorithm",
        "GFLOP/s",
        "format",
        "ratio",
        "quartiles",
        "NCHW",
        "NHWC",
        "error",
        "torch's",
    ]
    result = Result(name, columns)
    records, peak = [], measure_machine().peak
    for index, shape in enumerate(chosen):
        record = measure_shape(shape, options.batch, options.pass_, options)
        records.append(record)
        error = max(record["errors"][f"ours {label}"] for label in ("nchw", "nhwc"))
        theirs = min(record["errors"][f"torch {label}"] for label in ("nchw", "nhwc"))
        wrong = is_wrong(record, options.dtype)
        result.failed |= wrong
        low, high = record["ratio_quartiles"]
        result.rows.append([
            shape.name, str(shape.layers), record["algorithm"], f"{record['gflops']:.1f}",
            f"{record['gflops'] * 1e9 / peak:.2f}", record["format"],
            "WRONG" if wrong else f"{record['ratio']:.2f}", f"{low:.2f}-{high:.2f}",
            f"{record['ratio_nchw']:.2f}", f"{record['ratio_nhwc']:.2f}", f"{error:.1e}", f"{theirs:.1e}",
        ])  # fmt: skip
        progress(f"[{index + 1}/{len(chosen)}] {shape.name}: {record['ratio']:.2f}")
    if records:
        ratios = [record["ratio"] for record in records]
        worst, best = min(records, key=lambda r: r["ratio"]), max(records, key=lambda r: r["ratio"])
        result.summary = [
            f"{name}, {torch.get_num_threads()} threads, {len(records)} shapes",
            f"ours NCHW alone: {measure.geomean(r['ratio_nchw'] for r in records):.2f}, "
            f"ours channels_last alone: {measure.geomean(r['ratio_nhwc'] for r in records):.2f}",
            f"worst {worst['ratio']:.2f} ({worst['shape']}), best {best['ratio']:.2f} ({best['shape']})",
            f"geomean vs the better torch format: {measure.geomean(ratios):.2f}",
        ]
        result.data = {"name": name, "peak_gflops": peak * 1e-9, "geomean": measure.geomean(ratios), "shapes": records}
    return result
