"""fuse: fewer passes over memory in a finished model.

Batch norm is folded into the layer before it (`_fold`), and what follows a layer is computed in that layer's last store
(`_epilogues`); both are found in the model's graph (`_graph`).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from . import _epilogues, _fold, _order
from ._epilogues import Epilogue
from ._fold import Fusion
from ._graph import trace
from ._order import Move
from ._runs import RunningGraphModule
from .recompute import RecomputingGraphModule

_RECORD = "_convlab_fusions"


def fuse(model: nn.Module, example_inputs: Tensor | tuple | None = None, *, recompute: bool = False) -> nn.Module:
    """The model with its layers fused, for inference in eval mode, for training in training mode.

    In eval mode, batch norm becomes part of the convolution or linear layer whose output it alone reads, in place: the
    layer gets new Parameters, folded in float64 and rounded once, and the batch norm becomes `torch.nn.Identity`, or
    what it was fused with (a ReLU; in timm's `BatchNormAct2d` its activation), so that the other layers keep their
    names. Then every convolution and linear layer of this library takes what follows it, a residual addition, a ReLU or
    both, and keeps its weight in the order in which its kernel reads it (`nn.ConvAddReLU`, `nn.LinearAddReLU`). In both
    modes, a batch norm of this library that is not folded takes a ReLU, or an addition and a ReLU, that follow it
    (`nn.BatchNormReLU2d`, `nn.BatchNormAddReLU2d`). Layers of torch.nn are folded but take nothing: `convert` the model
    first. In place of the ReLU there may be ReLU6, Hardtanh, `torch.clamp` by numbers or, not for batch norms, SiLU,
    Hardswish or GELU. ReLUs that are left are moved behind a max pooling that reads them.

    Everything is found by tracing the model with `torch.fx`: modules, functions, methods and operators alike, a ReLU
    module that is called in several places included. A layer is left alone that is called several times or carries
    hooks, whose output is read elsewhere too, or whose input may change before the end of what would be fused;
    `fusion_report` says so.

    Where the model cannot be traced (its forward pass branches on values, say), a warning says so, and only batch
    norms that follow a layer in `torch.nn.Sequential` are folded: it cannot be seen then whether other code reads the
    layer in between.

    Args:
        model: in eval mode it is changed in place, as said above, and goes on computing what it did. In training mode
            it is not changed, nor in eval mode if `fuse` has given additions to its batch norms in training.
        example_inputs: what to call the model with (a tuple of arguments, or the one tensor), to check that outputs,
            and in training mode gradients, stay the same. Without them a linear layer before a batch norm is taken to
            read ``N x D``, and an addition to be one of equal sizes (a fused layer raises if it is not).
        recompute: for training: the result keeps no outputs of batch norms for backward, but computes them again
            (`recompute_batch_norm`). Less memory, some more time, the same bits.

    Returns:
        A `torch.fx.GraphModule` that shares Parameters, buffers and the layers that are not fused with `model`, under
        the same names; or `model` itself, if nothing but batch norms was fused. A second call finds nothing to do.
        In eval mode it calls convolutions that follow each other together, unless one has a hook, and computes blocks
        of pointwise, depthwise and pointwise convolutions in channels_last a strip of lines at a time.

    Raises:
        RuntimeError: outputs or gradients on `example_inputs` changed beyond rounding (`model` is then as it was).
        ValueError: `recompute` for a model in eval mode, or for one that cannot be traced.
    """
    if recompute and not model.training:
        raise ValueError("recompute=True is for training, but the model is in eval mode")
    model, graph = _separated(model, _graph(model))
    if recompute and graph is None:
        raise ValueError(
            f"recompute=True needs a model with batch norms that can be traced, which this {type(model).__name__} is "
            "not: call it inside torch_convlab.recompute_batch_norm()"
        )
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    before = [] if example_inputs is None else _results(model, arguments)
    undo, fusions = [], [] if model.training else _fold.plan(model, graph)
    for fusion in fusions:
        if fusion.folds:
            undo.append(_fold.fold(model, fusion))
    if undo:
        graph = graph and trace(model)
    fused, chains, moves = model, [], []
    if graph is not None:
        if example_inputs is not None:
            _propagate(model, graph, arguments)
        chains, moves = _plan(model, graph)
        if chains or moves or recompute:
            moves = _order.apply(graph, moves)
            training = RecomputingGraphModule if recompute else fx.GraphModule
            fused = _epilogues.apply(model, graph, chains, training if model.training else RunningGraphModule)
    if example_inputs is not None:
        difference = _difference(before, _results(fused, arguments))
        if difference:
            for restore in reversed(undo):
                restore()
            raise RuntimeError(f"fusing changed the results beyond rounding and was undone: {difference}")
    record = list(vars(model).get(_RECORD, ())) + [fusion for fusion in fusions if fusion.folds]
    setattr(model, _RECORD, record)
    if fused is not model:
        setattr(fused, _RECORD, record + [chain.epilogue for chain in chains if chain.parts] + moves)
    return fused


def _plan(model: nn.Module, graph: fx.Graph) -> tuple[list, list]:
    chains = [chain for chain in _epilogues.find(model, graph) if not chain.reason]
    return chains, _order.find(model, graph, {node for chain in chains for node in chain.nodes})


def fusion_report(model: nn.Module) -> list[Fusion | Epilogue | Move]:
    """What `fuse` has done to the model and what it would do now, or the reason why not.

    In eval mode one entry for every batch norm; in both modes one for every layer that an addition or a ReLU follows,
    and one for every ReLU that `fuse` moved behind a max pooling. Each says it in words (``str``) and in fields.
    Epilogues of what is still to be folded are known after folding.
    """
    model, graph = _separated(model, _graph(model))
    report = list(vars(model).get(_RECORD, ()))
    if not model.training:
        report += _fold.plan(model, graph)
    if graph is not None:
        report += [chain.epilogue for chain in _epilogues.find(model, graph) if chain.parts]
    return report


def _separated(model: nn.Module, graph: fx.Graph | None) -> tuple[nn.Module, fx.Graph | None]:
    """In eval mode, the model as it was before its batch norms took additions in training: folded, they cannot."""
    separated = None if model.training or graph is None else _epilogues.separate(model, graph)
    return (model, graph) if separated is None else (separated, trace(separated))


def _graph(model: nn.Module) -> fx.Graph | None:
    if not any(isinstance(module, (*_fold.PRODUCERS, nn.modules.batchnorm._BatchNorm)) for module in model.modules()):
        return None
    try:
        return trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        warnings.warn(
            f"cannot trace {type(model).__name__} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); only "
            "batch norms that directly follow a layer inside torch.nn.Sequential are folded",
            stacklevel=3,
        )
        return None


class _Unchanged:
    """Buffers and the random state of a model, put back at the end: a run in training mode moves both."""

    def __init__(self, model: nn.Module):
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self.fork = torch.random.fork_rng()

    def __enter__(self):
        self.fork.__enter__()
        torch.manual_seed(0)

    def __exit__(self, *error):
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        self.fork.__exit__(*error)


def _propagate(model: nn.Module, graph: fx.Graph, arguments: tuple) -> None:
    """Notes the size of every node's value."""
    with _Unchanged(model), torch.no_grad():
        try:
            ShapeProp(fx.GraphModule(model, graph)).propagate(*arguments)
        except Exception:  # arguments that the graph has not, because their default was traced
            return


def _results(model: nn.Module, arguments: tuple) -> list[Tensor]:
    """Outputs, and in training mode gradients of the parameters for fixed gradients of the outputs."""
    with _Unchanged(model), torch.set_grad_enabled(model.training):
        outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(model(*arguments)) if isinstance(leaf, Tensor)]
        results = [output.detach().clone() for output in outputs]
        differentiable = [output for output in outputs if output.requires_grad]
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if differentiable and parameters:
            grads = [
                torch.cos(torch.arange(o.numel(), device=o.device)).view(o.shape).to(o.dtype) for o in differentiable
            ]
            found = torch.autograd.grad(differentiable, list(parameters.values()), grads, allow_unused=True)
            results += [
                grad for _, grad in sorted(zip(parameters, found), key=lambda pair: pair[0]) if grad is not None
            ]
        return results


def _difference(before: list[Tensor], after: list[Tensor]) -> str:
    """Where the results differ by more than rounding through a deep network explains; empty if nowhere."""
    if len(before) != len(after):
        return f"{len(after)} results in place of {len(before)}"
    for index, (old, new) in enumerate(zip(before, after)):
        if not old.is_floating_point():
            continue
        tolerance = torch.finfo(old.dtype).eps * 1e4 if old.dtype in (torch.float32, torch.float64) else 0.1
        old, new = old.double(), new.double()
        limit = tolerance * old[old.isfinite()].abs().max().item() if old.isfinite().any() else 0.0
        if not torch.allclose(old, new, rtol=0, atol=limit, equal_nan=True):
            return f"output {index} differs by {(new - old).abs().max().item():.2e}, more than {limit:.2e}"
    return ""
