"""Moves a ReLU behind the max pooling that reads it, where a layer in front of it does not compute it.

Both take the larger of two numbers, so their order does not matter, and behind the pooling there are fewer of them. The
winner of a window whose maximum is positive is the same; where it is not, no gradient passes the ReLU in either order.
The same holds for ReLU6 and Hardtanh.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from . import nn as layers
from ._graph import clamp_of, is_layer, module_of
from ._hooks import has_hooks

_POOLINGS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    layers.MaxPool1d, layers.MaxPool2d, layers.MaxPool3d,
    layers.AdaptiveMaxPool1d, layers.AdaptiveMaxPool2d, layers.AdaptiveMaxPool3d,
)  # fmt: skip


@dataclass(frozen=True)
class Move:
    """An activation that is computed after `pooling` instead of before it."""

    activation: str
    pooling: str

    def __str__(self) -> str:
        return f"{self.activation}: behind {self.pooling}"


def find(model: nn.Module, graph: fx.Graph, taken: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of an activation that is not `taken` by a layer, and the pooling that alone reads it."""
    pairs = []
    for node in graph.nodes:
        readers = list(node.users)
        clamp = None if node in taken or len(readers) != 1 else clamp_of(node, model)
        # The gradients of torch.clamp pass at its bounds, where which of two inputs wins is a matter of order.
        if clamp is None or clamp.name == "clamp" or not _is_max_pooling(readers[0], node, model):
            continue
        source = node.all_input_nodes[0]
        # An activation that works in place changes what other readers and views see: nobody else has a layer's output.
        if len(source.users) == 1 and is_layer(source, model):
            pairs.append((node, readers[0]))
    return pairs


def _is_max_pooling(reader: fx.Node, source: fx.Node, model: nn.Module) -> bool:
    module = module_of(reader, model)
    if type(module) not in _POOLINGS or has_hooks(module) or "forward" in vars(module):
        return False
    # With dilation a window may lie in the padding as a whole: its maximum is -inf, which ReLU would make zero.
    dilated = getattr(module, "dilation", 1) not in (1, (1,), (1, 1), (1, 1, 1))
    return reader.args == (source,) and not reader.kwargs and not module.return_indices and not dilated


def apply(graph: fx.Graph, pairs: list[tuple[fx.Node, fx.Node]]) -> list[Move]:
    """Moves them, in the graph itself."""
    moves = []
    for activation, pooling in pairs:
        source = activation.all_input_nodes[0]
        with graph.inserting_after(pooling):
            moved = graph.node_copy(activation, lambda _, pooling=pooling: pooling)
        pooling.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
        pooling.replace_input_with(activation, source)
        graph.erase_node(activation)
        moves.append(Move(*(node.target if node.op == "call_module" else node.name for node in (moved, pooling))))
    return moves
