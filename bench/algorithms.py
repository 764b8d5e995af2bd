"""The verb `algorithms`: what `auto` chose, how much slower than the best algorithm it was, and every one's error.

Regret is the time of the chosen algorithm over that of the fastest one, less one. Errors are max|error| over
max|reference| against float64, of each algorithm in both memory formats, beside torch's own.
"""

from __future__ import annotations

import conv
import families
import measure
import shapes
import torch
from measure import Result

import torch_convlab

HOPELESS = 8  # algorithms expected to take that many times as long as the choice are not run


def add_arguments(parser) -> None:
    parser.add_argument("--suite", choices=[*shapes.SUITES, "timm", "families"], default="timm")
    parser.add_argument("--sample", type=int, default=60, help="timm: how many shapes to draw (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pass", dest="pass_", choices=conv.PASSES, default="forward")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=conv.DTYPES, default="float32")


def _shapes(options) -> list[tuple[int, shapes.ConvShape]]:
    if options.suite == "families":
        return [families.parse(entry) for text in families.FAMILIES.values() for entry in text.split(",")]
    chosen = shapes.timm(options.sample, options.seed) if options.suite == "timm" else shapes.suite(options.suite)
    return [(options.batch, shape) for shape in chosen]


def _worth_trying(choice) -> list[str]:
    limit = HOPELESS * choice.verdicts[choice.chosen].cost
    return [name for name, verdict in choice.verdicts.items() if verdict.refusal is None and verdict.cost <= limit]


def _measure(shape: shapes.ConvShape, batch: int, options) -> dict:
    operands = conv.operands(shape, batch, conv.DTYPES[options.dtype], options.pass_)
    reference = conv.calls(shape, options.pass_, *(tensor.double() for tensor in operands), "auto")[0]()
    choices = {label: conv.explain(shape, operands, options.pass_, label == "nhwc") for label in ("nchw", "nhwc")}
    promising = {name for choice in choices.values() for name in _worth_trying(choice)}
    # In either format; an algorithm may refuse one of the two.
    tried = {
        label: sorted(name for name in promising if choice.verdicts[name].refusal is None)
        for label, choice in choices.items()
    }
    errors, contenders = {}, {}
    for label, tensors in (("nchw", operands), ("nhwc", [conv.in_channels_last(tensor) for tensor in operands])):
        errors[f"torch {label}"] = conv.error(conv.calls(shape, options.pass_, *tensors, "auto")[0](), reference)
        for name in tried[label]:
            call = conv.calls(shape, options.pass_, *tensors, name)[1]
            errors[f"{name} {label}"] = conv.error(call(), reference)
            contenders[f"{name} {label}"] = call
    timing = measure.interleave(contenders, options.rounds, options.seconds)
    regrets = [
        timing.median(f"{choices[label].chosen} {label}")
        / min(timing.median(f"{name} {label}") for name in tried[label])
        - 1
        for label in ("nchw", "nhwc")
    ]
    return {
        "shape": f"{batch}x{shape.name}",
        "chosen": choices["nhwc"].chosen,
        "regret": max(regrets),
        "regret_by_format": regrets,
        "microseconds": {name: timing.median(name) * 1e6 for name in contenders},
        "errors": errors,
    }


@torch.no_grad()
def run(options, progress) -> Result:
    result = Result(f"algorithms-{options.suite}-{options.pass_}-{options.dtype}", ["shape", "auto", "regret", "best"])
    records = []
    for batch, shape in _shapes(options):
        record = _measure(shape, batch, options)
        records.append(record)
        fastest = min(record["microseconds"], key=record["microseconds"].get)
        row = [record["shape"], record["chosen"], f"{record['regret']:.0%}", fastest]
        result.rows.append(row)
        progress("  ".join(row))
    names = ["torch nchw", "torch nhwc"]
    names += [f"{name} {label}" for name in torch_convlab.algorithms() for label in ("nchw", "nhwc")]
    for name in names:
        errors = [record["errors"][name] for record in records if name in record["errors"]]
        if errors:
            typical = measure.geomean(max(error, 1e-12) for error in errors)
            result.summary.append(
                f"error of {name:19} largest {max(errors):.1e}, geomean {typical:.1e} over {len(errors)} shapes"
            )
    regrets = sorted(record["regret"] for record in records)
    result.summary += [
        f"regret of auto, {torch.get_num_threads()} threads: mean {sum(regrets) / len(regrets):.1%}, "
        f"median {regrets[len(regrets) // 2]:.1%}, largest {regrets[-1]:.0%}"
    ]
    result.data = {"name": result.name, "shapes": records}
    return result
