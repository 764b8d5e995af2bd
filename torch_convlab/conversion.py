"""What `convert` did with each layer, and the checks by which it may leave one alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from . import nn as layers
from .nn import timm

RECORD = "_convlab_conversion"


@dataclass(frozen=True)
class LayerConversion:
    """One layer: `reason` says why it was left alone, and is empty if it was swapped.

    `error` and `torch_error` are the largest ``max|error| / max|reference|`` of its output and gradients, measured
    against float64; `speed` is torch's time divided by ours. None: not measured.
    """

    name: str
    layer: str
    swapped: bool
    error: float | None = None
    torch_error: float | None = None
    speed: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """One entry for every layer (module without children) of a model; printing it shows `table`."""

    layers: list[LayerConversion]

    def table(self) -> str:
        """As plain text, one line per layer."""
        head = ("layer", "class", "swapped", "error", "torch's", "speed", "reason")
        cells = [head, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        swapped = sum(layer.swapped for layer in self.layers)
        return "\n".join([*lines, f"{swapped} of {len(self.layers)} layers are computed by torch_convlab"])

    def html(self, path: str | Path) -> Path:
        """Write the table as a page that needs nothing else; needs jinja2 (extra ``[lab]``). Returns `path`."""
        import jinja2

        environment = jinja2.Environment(loader=jinja2.PackageLoader("torch_convlab", "lab"), autoescape=True)
        rows = [dict(zip(("name", "layer", "swapped", "error", "theirs", "speed", "reason"), _cells(layer)))
                | {"is_swapped": layer.swapped} for layer in self.layers]  # fmt: skip
        text = environment.get_template("conversion.html.jinja").render(rows=rows)
        path = Path(path)
        path.write_text(text, encoding="utf-8")
        return path

    def __str__(self) -> str:
        return self.table()


def conversion_report(model: nn.Module) -> ConversionReport:
    """What `convert` did, or would do, with every layer of `model`; measurements are those that `convert` took."""
    measured = vars(model).get(RECORD, {})
    entries = []
    for name, module in named_layers(model):
        record = measured.get(name, {})
        swapped = _is_ours(type(module))
        reason = "" if swapped else record.get("reason") or refusal(module) or "convert was not called"
        record = {key: record.get(key) for key in ("error", "torch_error", "speed")}
        entries.append(LayerConversion(name, type(module).__name__, swapped, **record, reason=reason))
    return ConversionReport(entries)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, and those of timm that `convert` takes as a whole."""
    wholes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if timm.is_batch_norm(module):
            wholes += (name + "." if name else "",)
            yield name, module
        elif not any(True for _ in module.children()) and not name.startswith(wholes):
            yield name, module


def refusal(module: nn.Module) -> str:
    """Why `convert` leaves a layer alone whatever it computes; empty if it does not."""
    from .convert import conversions

    table = conversions()
    if "forward" in vars(module):
        return "its instance has a forward of its own"
    if type(module) in table:
        return ""
    base = next((kind.__name__ for kind in type(module).__mro__ if kind in table), None)
    if base is not None:
        return f"it is a subclass of torch.nn.{base}, which may compute something else"
    return "this library has no such layer"


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith(layers.__name__ + ".")


def measure(model: nn.Module, inputs, verify: bool, only_if_faster: bool) -> dict[str, dict]:
    """By name, the measurements of every layer that `convert` can swap, and the reason not to.

    The model is run once, as torch.nn computes it, to see what its layers read.
    """
    from .convert import conversions, revert
    from .lab import verification

    twin = verification.without_dropout(revert(copy.deepcopy(model)))
    calls = verification.record(twin, inputs, verification.random_projection)
    grouped = defaultdict(list)
    for call in calls:
        grouped[call.name.partition(" (call ")[0]].append(call)
    first_name = {id(module): name for name, module in twin.named_modules()}
    records = {
        name: _measure_layer(grouped[name], verify, only_if_faster)
        for name, module in twin.named_modules()
        if type(module) in conversions() and not refusal(module)
    }
    names = twin.named_modules(remove_duplicate=False)
    return {name: records[first] for name, module in names if (first := first_name[id(module)]) in records}


def _measure_layer(calls: list, verify: bool, only_if_faster: bool) -> dict:
    from .lab.verification import compare

    if not calls:
        return {"reason": "example_inputs do not reach it as a layer of one tensor"}
    record = {}
    if only_if_faster:
        record["speed"] = _speed(calls, calls[0].module.training)
        if record["speed"] < 1:
            record["reason"] = "torch is faster"
    if verify:
        rows = [row for call in calls for row in compare(call)]
        record["error"], record["torch_error"] = max(row.ours for row in rows), max(row.theirs for row in rows)
        bad = [row for row in rows if not row.passes]
        if bad:
            record["reason"] = f"{bad[0].kind} is off by {bad[0].ours:.1e}"
    return record


def _speed(calls: list, train: bool) -> float:
    """torch's time / ours, both in turns: of forward, or of forward and backward in training mode."""
    from .convert import convert
    from .lab.timing import interleave

    ours = theirs = 0.0
    for call in calls:
        twins = {"theirs": copy.deepcopy(call.module), "ours": convert(copy.deepcopy(call.module))}
        for twin in twins.values():
            twin._forward_hooks.clear()
            twin._forward_pre_hooks.clear()
        timing = interleave({owner: _task(twin, call, train) for owner, twin in twins.items()})
        ours += timing.median("ours")
        theirs += timing.median("ours") * timing.ratio("ours", "theirs")[0]  # by turns: what slows one slows both
    return theirs / ours


def _task(module: nn.Module, call, train: bool):
    if not train or call.grad_output is None:

        def task():
            with torch.inference_mode():
                module(call.input)

    else:
        input = call.input.clone().requires_grad_(call.input.is_floating_point())

        def task():
            module(input).backward(call.grad_output)

    return task


def _cells(layer: LayerConversion) -> tuple[str, ...]:
    values = asdict(layer)
    errors = ["" if values[key] is None else f"{values[key]:.1e}" for key in ("error", "torch_error")]
    speed = "" if layer.speed is None else f"{layer.speed:.2f}"
    return (layer.name, layer.layer, "yes" if layer.swapped else "no", *errors, speed, layer.reason)
