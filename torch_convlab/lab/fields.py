"""Receptive fields through a graph (lecture item L3): which inputs can reach one output.

Along one axis, output o reads the `size` inputs around ``center + o*jump``. A convolution or a pooling window of
``extent = dilation*(kernel-1) + 1`` adds ``(extent-1)*jump`` to the size and multiplies the jump by its stride. Where
branches meet, the field is the union of theirs. Padding counts as input, so a field may reach over the border.

Statistics of normalization layers do not count, although they too depend on other inputs. What is not known (windows
that are not evenly spaced, operators that no rule covers) is None, never a guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from .. import _C
from .exported import Program, Step

_aten = torch.ops.aten


@dataclass(frozen=True)
class Field:
    """Along one axis of the input; `center` is that of output 0, in pixels of the input."""

    size: int = 1
    jump: float = 1.0
    center: float = 0.0
    whole: bool = False  # every output sees all of the axis, and jump and center mean nothing

    def window(self, kernel: int, stride: int, padding: int, dilation: int) -> Field:
        if self.whole:
            return self
        unit = _C.ReceptiveField()
        unit.step(kernel, stride, padding, dilation)
        center = self.center + unit.center * self.jump
        return Field(self.size + math.ceil((unit.size - 1) * self.jump), self.jump * stride, center)

    def upsampled(self, kernel: int, stride: int, padding: int, dilation: int) -> Field:
        """Through a transposed convolution: the most of its input that any output reads."""
        if self.whole:
            return self
        extent, jump = dilation * (kernel - 1) + 1, self.jump / stride
        taps = min(kernel, math.ceil(extent / stride))
        center = self.center + (padding - (extent - 1) / 2) * jump
        return Field(self.size + math.ceil((taps - 1) * self.jump), jump, center)

    def union(self, other: Field) -> Field | None:
        if self.whole or other.whole:
            return self if self.whole else other
        if self.jump != other.jump:
            return None
        low = min(field.center - (field.size - 1) / 2 for field in (self, other))
        high = max(field.center + (field.size - 1) / 2 for field in (self, other))
        return Field(round(high - low) + 1, self.jump, (low + high) / 2)


@dataclass(frozen=True)
class State:
    """The field along every axis of the input (None: not known), and the axes that lie along each dimension."""

    fields: tuple[Field | None, ...]
    carries: tuple[frozenset[int], ...]

    def mix(self, axes, sizes: tuple[int, ...]) -> State:
        """After a sum over everything along these axes."""
        fields = [Field(sizes[axis], whole=True) if axis in axes else known for axis, known in enumerate(self.fields)]
        return replace(self, fields=tuple(fields))


def receptive_fields(program: Program) -> dict[fx.Node, tuple[Field | None, ...]]:
    """Per step, the receptive field of its output along every spatial axis of the input (all but the first two)."""
    size = tuple(program.input.meta["val"].shape)
    spatial = size[2:]
    start = State(
        tuple(Field() for _ in spatial),
        (frozenset(), frozenset(), *(frozenset({axis}) for axis in range(len(spatial)))),
    )
    states, result = {program.input: start}, {}
    steps = {step.node: step for step in program.steps}
    for node in program.exported.graph.nodes:
        sources = [states[source] for source in node.all_input_nodes if source in states]
        if not sources or node.op != "call_function":
            continue
        step = steps.get(node)
        if step is None:
            states[node] = sources[0]
        else:
            states[node] = _after(step, sources, spatial)
            result[node] = states[node].fields
    return result


def _after(step: Step, sources: list[State], sizes: tuple[int, ...]) -> State:
    target, state, output = step.node.target, sources[0], step.output
    read = step.reads[0].meta["val"]
    if isinstance(read, (tuple, list)):
        read = read[0]
    if rule := _WINDOWS.get(step.operation.removesuffix("_with_indices").rstrip("123d")):
        return _union([rule(step, state, sizes, read, output), *sources[1:]], output)  # a residual may be added
    if step.is_linear:
        return state.mix(state.carries[-1], sizes)
    if _is_pointwise(target, step.operation):
        return _union(sources, output)
    if step.operation in ("permute", "transpose"):
        order = torch.empty(*[1] * read.dim(), device="meta")
        dims = _permutation(step, order.dim())
        return replace(state, carries=tuple(state.carries[dim] for dim in dims))
    if step.operation in ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"):
        return _reshaped(state, tuple(read.shape), tuple(output.shape))
    if step.operation in ("mean", "sum", "amax", "amin"):
        return _reduced(step, state, read.dim(), sizes)
    if step.operation in ("softmax", "log_softmax"):
        return state.mix(state.carries[step.arguments["dim"]], sizes)
    if step.operation.endswith("_norm"):
        return _union(sources, output)
    if step.operation == "cat" and not any(source.carries[step.arguments["dim"]] for source in sources):
        return _union(sources, output)
    if step.operation in ("pad", "constant_pad_nd"):
        return _padded(step, state)
    if step.operation.startswith("upsample_"):
        return _interpolated(step, state, read, output)
    if step.operation in ("matmul", "bmm", "scaled_dot_product_attention"):
        carried = set().union(*(axes for source in sources for axes in source.carries))
        return replace(state.mix(carried, sizes), carries=(frozenset(),) * output.dim())
    return _unknown(sizes, output)


def _unknown(sizes, output) -> State:
    return State((None,) * len(sizes), (frozenset(range(len(sizes))),) * output.dim())


def _convolved(step: Step, state: State, sizes, read, output) -> State:
    problem = step.convolution()
    if problem is None:
        return _unknown(sizes, output)
    change = Field.upsampled if problem.transposed else Field.window
    columns = problem.weight_size[2:], problem.stride, problem.padding, problem.dilation
    return _windowed(state, sizes, change, list(zip(*columns)))


def _pooled(step: Step, state: State, sizes, read, output) -> State:
    count = int(step.operation.removesuffix("_with_indices")[-2]) if step.node.target.namespace == "aten" else None
    kernel = step.arguments["kernel_size"]
    count = count or len(kernel)
    values = [_full(kernel, count)]
    values.append(_full(step.arguments.get("stride") or kernel, count))
    values.append(_full(step.arguments["padding"], count))
    values.append(_full(step.arguments.get("dilation", 1), count))
    return _windowed(state, sizes, Field.window, list(zip(*values)))


def _pooled_to_size(step: Step, state: State, sizes, read, output) -> State:
    count = len(_full(step.arguments["output_size"], 1)) if step.node.target.namespace == "convlab" else None
    count = count or int(step.operation[-2])
    windows = []
    for length, wanted in zip(read.shape[-count:], output.shape[-count:]):
        even = length % wanted == 0
        windows.append((length // wanted, length // wanted, 0, 1) if even else None)
    for dim, (length, wanted) in enumerate(zip(read.shape[-count:], output.shape[-count:])):
        if wanted == 1 and length > 1:
            axes = state.carries[dim - count]
            state, windows[dim] = state.mix(axes, sizes), (1, 1, 0, 1)
    return _windowed(state, sizes, Field.window, windows, mixes_channels=False)


def _windowed(state: State, sizes, change, windows, mixes_channels: bool = True) -> State:
    """Windows of (kernel, stride, padding, dilation) along the last dimensions; None: not known."""
    if mixes_channels and len(state.carries) > len(windows):
        state = state.mix(state.carries[-len(windows) - 1], sizes)
    fields = list(state.fields)
    for dim, window in enumerate(windows):
        axes = state.carries[dim - len(windows)]
        for axis in axes:
            known = fields[axis]
            if known is None or known.whole or window == (1, 1, 0, 1):
                continue
            fields[axis] = change(known, *window) if window and len(axes) == 1 else None
    return replace(state, fields=tuple(fields))


_WINDOWS = {
    "conv": _convolved,
    "conv_transpose": _convolved,
    "max_pool": _pooled,
    "avg_pool": _pooled,
    "adaptive_avg_pool": _pooled_to_size,
    "adaptive_max_pool": _pooled_to_size,
}


def _full(value, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _is_pointwise(target, operation: str) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags or operation in (
        "dropout", "feature_dropout", "relu6", "hardtanh", "clone", "to", "type_as", "_to_copy", "prelu",
    )  # fmt: skip


def _union(sources: list[State], output) -> State:
    """The sources broadcast to one size; dimensions are counted from the last."""
    fields = list(sources[0].fields)
    for source in sources[1:]:
        for axis, (one, other) in enumerate(zip(fields, source.fields)):
            fields[axis] = None if one is None or other is None else one.union(other)
    carries = [frozenset()] * output.dim()
    for source in sources:
        for dim, axes in enumerate(reversed(source.carries)):
            carries[-1 - dim] |= axes
    return State(tuple(fields), tuple(carries))


def _permutation(step: Step, count: int) -> list[int]:
    dims = list(range(count))
    if step.operation == "permute":
        return [dim % count for dim in step.arguments["dims"]]
    first, second = step.arguments["dim0"] % count, step.arguments["dim1"] % count
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _reshaped(state: State, old: tuple[int, ...], new: tuple[int, ...]) -> State:
    """Dimensions of equal product are matched from the left; a group of several shares its axes."""
    carries: list[frozenset[int]] = []
    changed: set[int] = set()
    i = j = 0
    while j < len(new) or i < len(old):
        start_i, start_j = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        axes = frozenset().union(*state.carries[start_i:i])
        inside = new[start_j:j]
        carries += [axes if size > 1 or len(inside) == 1 else frozenset() for size in inside]
        if [size for size in old[start_i:i] if size > 1] != [size for size in inside if size > 1]:
            changed |= axes
    merged = {axis for axis in changed if not (state.fields[axis] and state.fields[axis].whole)}
    # The pixels still see what they saw, but they no longer lie along one dimension at even distances.
    fields = tuple(
        replace(known, jump=math.nan, center=math.nan) if axis in merged and known else known
        for axis, known in enumerate(state.fields)
    )
    return State(fields, tuple(carries[: len(new)]))


def _reduced(step: Step, state: State, count: int, sizes) -> State:
    dims = step.arguments.get("dim")
    dims = range(count) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
    dims = {dim % count for dim in dims}
    state = state.mix(set().union(*(state.carries[dim] for dim in dims)), sizes)
    if step.arguments.get("keepdim"):
        return state
    return replace(state, carries=tuple(axes for dim, axes in enumerate(state.carries) if dim not in dims))


def _padded(step: Step, state: State) -> State:
    amounts = step.arguments["pad"]
    fields = list(state.fields)
    for dim, before in enumerate(amounts[::2]):
        for axis in state.carries[-1 - dim]:
            if fields[axis] and not fields[axis].whole:
                fields[axis] = replace(fields[axis], center=fields[axis].center - before * fields[axis].jump)
    return replace(state, fields=tuple(fields))


def _interpolated(step: Step, state: State, read, output) -> State:
    """Nearest neighbours repeat pixels; linear interpolation reads two of them. Other kinds are not known."""
    fields, kind = list(state.fields), step.operation.removeprefix("upsample_")
    count = read.dim() - 2
    for dim in range(2, 2 + count):
        scale = output.shape[dim] / read.shape[dim]
        for axis in state.carries[dim]:
            known = fields[axis]
            if known is None or known.whole or scale == 1:
                continue
            exact = scale.is_integer() and not step.arguments.get("align_corners")
            reads = 1 if kind.startswith("nearest") else 2 if kind in ("linear1d", "bilinear2d", "trilinear3d") else 0
            if not exact or not reads or len(state.carries[dim]) > 1:
                fields[axis] = None
                continue
            size = known.size + math.ceil((reads - 1) * known.jump)
            center = known.center + (0.5 / scale - 0.5) * known.jump
            fields[axis] = Field(size, known.jump / scale, center)
    return replace(state, fields=tuple(fields))
