"""Timing of memory-bound layers, ours against torch's, in both memory formats; what `norm` and `pool` share.

A contender's bandwidth counts each tensor that the pass has to read or write once. It is stated as a fraction of that
of `Tensor.copy_` of the layer's input, which takes its turn among the contenders: so a tensor that fits the cache is
compared with a copy inside the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import measure
import torch
from measure import Result

FORMATS = ("nchw", "nhwc")
# max|error| / max|reference| against float64 above which a result is reported as wrong. Gradients of parameters are
# long sums; in 16 bits a ReLU's mask flips where the output rounds to zero, and its gradient is off by all of itself.
TOLERANCE = {"float32": 1e-4, "float64": 1e-12, "bfloat16": 1.0, "float16": 1.0}


@dataclass(frozen=True)
class Layer:
    """One layer at one size: `theirs` and `ours` are functions of the activations and then the parameters."""

    kind: str
    name: str
    activations: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...]
    theirs: Callable
    ours: Callable
    layers: int = 1
    reads_input: bool = True  # the backward pass needs the input again
    formats: tuple[str, ...] = FORMATS


def in_format(tensor: torch.Tensor, format: str) -> torch.Tensor:
    if format == "nchw" or tensor.dim() < 3:
        return tensor.contiguous()
    if tensor.dim() == 3:
        return tensor.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)


def _leaves(layer: Layer, dtype: torch.dtype, format: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in layer.activations]
    leaves = [in_format(value.to(dtype), format) for value in values]
    leaves += [torch.randn(size, generator=generator).to(dtype) for size in layer.parameters]
    return [leaf.requires_grad_() for leaf in leaves]


def _call(function: Callable, pass_: str, leaves: list[torch.Tensor], format: str) -> Callable[[], list[torch.Tensor]]:
    """The pass as a function without arguments."""
    if pass_ == "forward":
        plain = [leaf.detach() for leaf in leaves]

        def forward():
            with torch.no_grad():
                return [function(*plain)]

        return forward
    if pass_ == "train":
        return lambda: [function(*leaves)]
    generator = torch.Generator().manual_seed(1)
    output = function(*leaves)
    grad = in_format(torch.randn(output.shape, generator=generator).to(output.dtype), format)
    if pass_ == "backward":
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    grad.requires_grad_()
    gradients = torch.autograd.grad(output, leaves, grad, create_graph=True)
    seeds = [torch.randn(g.shape, generator=generator).to(g.dtype) for g in gradients]
    seeds = [in_format(seed, format) for seed in seeds]
    return lambda: torch.autograd.grad(gradients, [*leaves, grad], seeds, retain_graph=True, allow_unused=True)


def _traffic(layer: Layer, pass_: str, output: int) -> int | None:
    """Elements that the pass has to read and write at the least."""
    inputs = sum(math.prod(size) for size in layer.activations)
    if pass_ in ("forward", "train"):
        return inputs + output
    if pass_ == "backward":
        return (inputs if layer.reads_input else 0) + output + inputs
    return None


def _error(results, references) -> float:
    pairs = [(r.double(), e) for r, e in zip(results, references) if r is not None and e is not None]
    return max(((r - e).abs().max() / e.abs().max().clamp_min(1e-300)).item() for r, e in pairs)


def _measure(layer: Layer, pass_: str, dtype: torch.dtype, options) -> dict:
    leaves = _leaves(layer, torch.float64, "nchw")
    reference = _call(layer.theirs, pass_, leaves, "nchw")()
    output = _call(layer.theirs, "forward", leaves, "nchw")()[0].numel()
    contenders, errors = {}, {}
    for format in layer.formats:
        for who, function in (("torch", layer.theirs), ("ours", layer.ours)):
            call = _call(function, pass_, _leaves(layer, dtype, format), format)
            name = f"{who} {format}"
            contenders[name], errors[name] = call, _error(call(), reference)
    del reference
    source = torch.randn(layer.activations[0]).to(dtype)
    target = torch.empty_like(source)
    contenders["copy"] = lambda: target.copy_(source)
    timing = measure.interleave(contenders, options.rounds, options.seconds)
    theirs = timing.best([f"torch {format}" for format in layer.formats])
    best = timing.best([f"ours {format}" for format in layer.formats])
    ratio, low, high = timing.ratio(theirs, best)
    traffic, copied = _traffic(layer, pass_, output), 2 * source.numel()
    return {
        "kind": layer.kind,
        "pass": pass_,
        "shape": layer.name,
        "layers": layer.layers,
        "microseconds": {name: timing.median(name) * 1e6 for name in contenders},
        "errors": errors,
        "format": best.split()[1],
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        **{f"ratio_{format}": timing.ratio(theirs, f"ours {format}")[0] for format in layer.formats},
        "copy_fraction": None if traffic is None else timing.median("copy") / timing.median(best) * traffic / copied,
        "copy_gigabytes_per_second": copied * source.element_size() / timing.median("copy") * 1e-9,
    }


def run(name: str, layers: Iterable[tuple[Layer, str]], dtype: str, options, progress: Callable[[str], None]) -> Result:
    """Measures (layer, pass) pairs; the summary has a geometric mean for every kind and pass."""
    columns = ["kind", "pass", "shape", "ms", "of copy", "format", "ratio", "quartiles", "NCHW", "NHWC", "error"]
    result, records = Result(name, columns), []
    layers = list(layers)
    for index, (layer, pass_) in enumerate(layers):
        record = _measure(layer, pass_, getattr(torch, dtype), options)
        records.append(record)
        error = max(record["errors"][f"ours {format}"] for format in layer.formats)
        wrong = not error <= TOLERANCE[dtype]
        result.failed |= wrong
        low, high = record["ratio_quartiles"]
        fraction = record["copy_fraction"]
        result.rows.append([
            layer.kind, pass_, layer.name, f"{record['microseconds']['ours ' + record['format']] / 1e3:.3f}",
            "-" if fraction is None else f"{fraction:.0%}", record["format"],
            "WRONG" if wrong else f"{record['ratio']:.2f}", f"{low:.2f}-{high:.2f}",
            f"{record['ratio_nchw']:.2f}", f"{record['ratio_nhwc']:.2f}" if "nhwc" in layer.formats else "-",
            f"{error:.1e}",
        ])  # fmt: skip
        progress(f"[{index + 1}/{len(layers)}] {layer.kind} {pass_} {layer.name}: {record['ratio']:.2f}")
    means = {}
    result.summary = [f"{name}, {torch.get_num_threads()} threads, geomean vs the better torch format:"]
    for key in dict.fromkeys((record["kind"], record["pass"]) for record in records):
        chosen = [record for record in records if (record["kind"], record["pass"]) == key]
        mean = measure.geomean(record["ratio"] for record in chosen)
        worst = min(chosen, key=lambda record: record["ratio"])
        fractions = [record["copy_fraction"] for record in chosen if record["copy_fraction"] is not None]
        copy = f", {measure.geomean(fractions):.0%} of copy" if fractions else ""
        means[" ".join(key)] = mean
        result.summary.append(f"  {key[0]} {key[1]}: {mean:.2f}{copy}; worst {worst['ratio']:.2f} ({worst['shape']})")
    result.data = {"name": name, "geomeans": means, "shapes": records}
    return result
