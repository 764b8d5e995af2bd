"""The verb `model`: whole models, ours fused against torch eager, torch.compile and, where installed, their peers.

`--mode infer` times ours (converted and fused) against torch eager, torch.compile with freezing and, in float32, ONNX
Runtime and OpenVINO (extra `[peers]`). `--mode train` times forward, backward and an SGD step, and measures the peak of
what autograd keeps for backward. Every contender runs in NCHW and in channels_last, if it knows both. One that is not
ready (compiled, and called once) within its budget, or that fails, is left out, and the result says so.
"""

from __future__ import annotations

import contextlib
import copy
import io
import signal
from collections.abc import Callable

import measure
import models
import torch
import torch._inductor.config
from layers import in_format
from measure import Result
from torch.profiler import ProfilerActivity, profile

import torch_convlab

TOLERANCE = 1e-3  # of max|output| against torch eager; winograd's rounding through fifty layers stays below


def add_arguments(parser) -> None:
    parser.add_argument("--name", choices=models.MODELS, default="resnet50")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--without", action="append", default=[], help="leave out compile, onnxruntime, openvino")
    parser.add_argument("--budget", type=float, default=300, help="seconds in which each peer is ready (default 300)")
    parser.add_argument("--profile", action="store_true", help="also say where our time goes, by operator and shape")


def _converted(model: torch.nn.Module, example: torch.Tensor) -> torch.nn.Module:
    model = torch_convlab.convert(copy.deepcopy(model))
    return torch_convlab.fuse(model, example)


def _onnxruntime(model, example) -> Callable:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (example,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(model, example) -> Callable:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(model, example_input=example), "CPU", hints)
    array = example.numpy()
    return lambda: torch.from_numpy(compiled(array)[0])


PEERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}


class OutOfTime(Exception):
    """Raised in the middle of what takes longer than its budget."""


@contextlib.contextmanager
def _at_most(seconds: float):
    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # once more every second, should the exception be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Contenders:
    """Calls by name, what each first returned, and why some that were wanted are not among them."""

    def __init__(self, options, progress):
        self.calls: dict[str, Callable] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.left_out: dict[str, str] = {}
        self._options, self._progress = options, progress

    def add(self, name: str, call: Callable) -> None:
        self.outputs[name] = call()
        self.calls[name] = call

    def add_peer(self, name: str, make: Callable[[], Callable]) -> None:
        """Adds `make()`, once it has been called; or says why not."""
        if name.split()[0] in self._options.without:
            return
        self._progress(f"preparing {name}")
        try:
            with _at_most(self._options.budget):
                self.add(name, make())
            return
        except ImportError:
            reason = "not installed"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            late = any(isinstance(cause, OutOfTime) for cause in _causes(error))
            text = str(error).strip().splitlines() or [""]
            reason = f"not ready after {self._options.budget:g} s" if late else f"{type(error).__name__}: {text[0]}"
        self.left_out[name] = reason
        self._progress(f"{name} is left out: {reason}")


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _inference(model, example, contenders: Contenders) -> None:
    for format in ("nchw", "nhwc"):
        formatted = in_format(example, format)
        layout = torch.contiguous_format if format == "nchw" else _channels_last(example)
        theirs = copy.deepcopy(model).to(memory_format=layout)
        ours = _converted(model, example).to(memory_format=layout)
        contenders.add(f"torch {format}", lambda m=theirs, x=formatted: m(x))
        contenders.add(f"ours {format}", lambda m=ours, x=formatted: m(x))

        def compiled(theirs=theirs, formatted=formatted):
            network = torch.compile(copy.deepcopy(theirs))
            return lambda: network(formatted)

        contenders.add_peer(f"compile {format}", compiled)
    for name, make in PEERS.items():
        contenders.add_peer(name, lambda make=make: make(copy.deepcopy(model), example))


def _channels_last(example: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if example.dim() == 4 else torch.channels_last_3d


def _step(model, input, target) -> Callable:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=True)
        output = model(input)
        loss = (output * target).sum() / output.numel()
        loss.backward()
        optimizer.step()
        return output.detach()

    return step


def _training(model, example, contenders: Contenders) -> dict[str, int]:
    kept = {}
    target = torch.randn(model(example).shape, generator=torch.Generator().manual_seed(1))
    for format in ("nchw", "nhwc"):
        input = in_format(example, format)
        layout = torch.contiguous_format if format == "nchw" else _channels_last(example)
        for who, network in (("torch", copy.deepcopy(model)), ("ours", _converted(model, example))):
            network.to(memory_format=layout)
            kept[f"{who} {format}"] = saved_bytes(network, input)
            contenders.add(f"{who} {format}", _step(network, input, target))

        def compiled(input=input, layout=layout):
            return _step(torch.compile(copy.deepcopy(model).to(memory_format=layout)), input, target)

        contenders.add_peer(f"compile {format}", compiled)
    return kept


def saved_bytes(model, input) -> int:
    """Bytes of the distinct tensors that autograd keeps between forward and backward, parameters not counted."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
    del output
    return total


def _table(call: Callable) -> str:
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    averages = found.key_averages(group_by_input_shape=True)
    return averages.table(
        sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40, max_shapes_column_width=70
    )


def run(options, progress) -> Result:
    torch.manual_seed(0)
    example = models.example(options.name, options.batch)
    model = models.MODELS[options.name](torch.nn)
    name = f"model-{options.name}-{options.mode}-n{options.batch}"
    result = Result(name, ["contender", "ms", "quartiles", "ours is faster by", "error", "kept for backward, MB"])
    kept: dict[str, int] = {}
    contenders = Contenders(options, progress)
    calls = contenders.calls
    if options.mode == "infer":
        model = models.settle(model, example).eval()
        torch._inductor.config.freezing = True
    else:
        model.train()
    with torch.set_grad_enabled(options.mode == "train"):
        if options.mode == "infer":
            _inference(model, example, contenders)
        else:
            kept = _training(model, example, contenders)
        reference = copy.deepcopy(model).double()(example.double()).detach()
        errors = {who: _error(contenders.outputs[who], reference) for who in calls}
        progress("timing")
        timing = measure.interleave(calls, options.rounds, max(options.seconds, 0.2))
    best = timing.best([who for who in calls if who.startswith("ours")])
    records = {}
    for who in calls:
        ratio, low, high = timing.ratio(who, best)
        records[who] = {
            "milliseconds": timing.median(who) * 1e3, "ratio": ratio, "ratio_quartiles": [low, high],
            "error": errors[who], "kept_bytes": kept.get(who),
        }  # fmt: skip
        wrong = not errors[who] <= TOLERANCE
        result.failed |= wrong and who.startswith("ours")
        result.rows.append([
            who, f"{timing.median(who) * 1e3:.2f}", f"{low:.2f}-{high:.2f}", f"{ratio:.2f}",
            "WRONG" if wrong else f"{errors[who]:.1e}", f"{kept[who] / 1e6:.0f}" if who in kept else "-",
        ])  # fmt: skip
    eager = timing.best([who for who in calls if who.startswith("torch")])
    rest = timing.best([who for who in calls if not who.startswith("ours")])
    result.summary = [
        f"{name}, {torch.get_num_threads()} threads: against eager {timing.ratio(eager, best)[0]:.2f}, against the "
        f"best of all ({rest}) {timing.ratio(rest, best)[0]:.2f}"
    ]
    result.summary += [f"{who} is left out: {reason}" for who, reason in contenders.left_out.items()]
    if kept:
        result.summary.append(f"kept for backward: {kept[best] / kept[eager]:.2f} of torch's")
    if options.profile:
        with torch.set_grad_enabled(options.mode == "train"):
            result.summary.append(_table(calls[best]))
    result.data = {"name": name, "contenders": records, "left_out": contenders.left_out}
    return result


def _error(output, reference) -> float:
    return ((output.double() - reference).abs().max() / reference.abs().max()).item()
