"""The measuring verbs: what their tables hold, that their numbers are consistent, and how they refuse."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch_convlab
from torch_convlab import __main__ as command_line
from torch_convlab import backends, lab, models
from torch_convlab.lab import advice, ceilings, environment, machine
from torch_convlab.lab.exported import Convolution

LENET5 = ["lenet5", "2,1,28,28"]


@pytest.fixture(autouse=True)
def a_known_machine(monkeypatch):
    """Tests of tables need no measured peak; one thread times by CPU time, which other processes do not disturb."""
    known = machine.Machine("a test", 1, peak=100e9, peak_of="torch.mm", bandwidth=20e9)
    monkeypatch.setattr(machine, "_measured", {1: known})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys, *arguments: str, status: int = 0) -> str:
    assert command_line.main(list(arguments)) == status
    printed = capsys.readouterr()
    return printed.out if status == 0 else printed.out + printed.err


def run_json(capsys, *arguments: str, status: int = 0):
    assert command_line.main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["summary", "lenet", "1,1,28,28"], "unknown model 'lenet'"),
        (["bench", "lenet5", "1,3,28,28"], "lenet5 does not accept an input of 1 x 3 x 28 x 28"),
        (["verify", "resnet18", "1,3,32,32"], "does not run in training mode"),
        (["advise", "torch:nothing", "1,2"], "cannot load model 'torch:nothing'"),
        (["roofline", *LENET5, "--output", "picture.bmp"], "expected --output to end in .png, .svg, .pdf"),
        (["roofline", *LENET5, "--output", "/dev/null/picture.png"], "cannot write /dev/null/picture.png"),
        (["tune", *LENET5, "--cache", "/dev/null/cache.json"], "cannot write /dev/null/cache.json"),
        (["explain"], "expected MODEL and SHAPE, or --input and --weight"),
        (["explain", "lenet5"], "not a mixture"),
        (["explain", *LENET5, "--layer", "conv9"], "no convolution or linear layer called 'conv9'"),
        (["explain", "--input", "1,4,2,2", "--weight", "4,4,3,3"], "the output would be 1 x 4 x 0 x 0"),
        (["explain", "--input", "1,4,5,5", "--weight", "4,3,3,3"], "to be 4, got 3 * 1"),
        (["explain", "--input", "1,4,5,5", "--weight", "4,4,3,3", "--stride", "0"], "stride to be positive"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith(f"python -m torch_convlab {arguments[0]}: ")


# --- info, doctor ---------------------------------------------------------------------------------------------------


def test_info(capsys):
    printed, facts = run(capsys, "info"), run_json(capsys, "info")
    assert facts["torch_convlab"]["version"] == torch_convlab.__version__
    assert facts["torch"]["version"] == torch.__version__ and facts["torch"]["threads"] == 1
    assert facts["torch_convlab"]["instruction set"] in ("baseline", "avx2", "avx512")
    for section, values in facts.items():
        assert f"{section}\n" in printed
        for name, value in values.items():
            assert any(line.split() == [*name.split(), *str(value).split()] for line in printed.splitlines()), name


def test_doctor_is_content_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CONVLAB_CACHE", str(tmp_path / "new" / "cache.json"))
    printed = run(capsys, "doctor")
    assert "✗" not in printed and "✓ OpenMP" in printed and "none yet" in printed
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "what", ["corrupt cache", "unwritable cache", "no OpenMP", "wrong results", "too many threads"]
)
def test_doctor_names_what_is_wrong_and_how_to_mend_it(what, capsys, monkeypatch, tmp_path):
    cache = tmp_path / "cache.json"
    monkeypatch.setenv("TORCH_CONVLAB_CACHE", str(cache))
    expected, severe = {
        "corrupt cache": (("cannot be read", f"delete {cache}"), False),
        "unwritable cache": (("cannot write", "set TORCH_CONVLAB_CACHE"), False),
        "no OpenMP": (("one thread only", "-fopenmp"), True),
        "wrong results": (("WRONG, off by 2", "build it again"), True),
        "too many threads": (("they wait for each other", "torch.set_num_threads("), True),
    }[what]
    if what == "corrupt cache":
        cache.write_text("{")
    elif what == "unwritable cache":
        cache.mkdir()
    elif what == "no OpenMP":
        built = {**torch_convlab.build_info(), "openmp": 0}
        monkeypatch.setattr(environment, "build_info", lambda: built)
    elif what == "wrong results":
        monkeypatch.setattr(environment.functional, "conv2d", lambda *rest, **named: -torch.conv2d(*rest, **named))
    else:
        monkeypatch.setattr(environment.torch, "get_num_threads", lambda: 1000)
    printed = run(capsys, "doctor", status=int(severe)) if severe else run(capsys, "doctor")
    assert all(part in printed for part in expected)
    assert ("✗" in printed) == severe and ("!" in printed) != severe


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_one_convolution(capsys):
    (result,) = run_json(capsys, "explain", "--input", "1,64,14,14", "--weight", "64,64,3,3", "--padding", "1")
    rows = {row["algorithm"]: row for row in result["algorithms"]}
    assert rows.keys() == torch_convlab.algorithms().keys()
    choice = torch_convlab.explain_convolution((1, 64, 14, 14), (64, 64, 3, 3), padding=1)
    assert result["chosen"] == choice.chosen
    assert [name for name in rows if rows[name]["chosen"]] == [choice.chosen] and rows[choice.chosen]["seconds"] > 0
    for name, verdict in choice.verdicts.items():
        assert (rows[name]["refusal"], rows[name]["cost"]) == (verdict.refusal, verdict.cost)
    assert "groups" in rows["depthwise"]["refusal"] and rows["depthwise"]["seconds"] is None
    assert rows["winograd"]["seconds"] > 0 and rows["implicit_gemm"]["seconds"] > 0
    assert result["multiply_adds"] == 64 * 64 * 9 * 14 * 14
    assert result["bytes"] == 4 * (2 * 64 * 14 * 14 + 64 * 64 * 9)
    assert result["bound"] == pytest.approx(2 * result["multiply_adds"] / 100e9) and result["bound_by"] == "arithmetic"
    # The weights' transforms, of 36 points for the tiles in use; the naive loop borrows nothing.
    assert rows["winograd"]["workspace"] > 4 * 9 * 64 * 64 and rows["naive"]["workspace"] == 0


def test_explain_a_model_prints_every_distinct_layer_once(capsys):
    printed = run(capsys, "explain", "resnet18", "1,3,64,64", "--no-measure")
    assert printed.count("layer1.0.conv1, layer1.0.conv2, layer1.1.conv1, ...: forward") == 1
    assert "fc: forward, input 1 x 512 x 1 x 1, weight 1000 x 512 x 1 x 1" in printed
    strided = torch_convlab.explain_convolution((1, 64, 16, 16), (128, 64, 1, 1), stride=2).verdicts["winograd"]
    assert strided.refusal in printed
    one = run(
        capsys, "explain", "resnet18", "1,3,64,64", "--no-measure", "--layer", "layer2.0", "--pass", "backward_weight"
    )
    assert one.count("backward_weight, input") == 3 and "layer1" not in one


def test_explain_every_pass_dimension_and_transposed():
    problem = Convolution((2, 8, 9), (8, 8, 3), (1,), (1,), (1,))
    for pass_ in ("forward", "backward_input", "backward_weight"):
        result = lab.explain_layer(problem, pass_=pass_)
        assert result.pass_ == pass_ and any(row.chosen and row.seconds > 0 for row in result.algorithms)
    upward = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2))
    (result,) = lab.explain(upward, (1, 4, 5, 5))
    assert result.pass_ == "backward_input" and result.problem.input_size == (1, 6, 10, 10)
    assert result.multiply_adds == 4 * 5 * 5 * 6 * 4


# --- bench, roofline ------------------------------------------------------------------------------------------------


def test_bench(capsys):
    result = run_json(capsys, "bench", *LENET5, "--rounds", "2")
    assert [layer["names"] for layer in result["layers"]] == [
        ["conv1"],
        ["pool1"],
        ["conv2"],
        ["pool2"],
        ["fc1"],
        ["fc2"],
    ]
    assert sum(layer["multiply_adds"] for layer in result["layers"]) == 2 * 6_522_000
    assert list(result["tasks"]) == ["inference", "training step"]
    for layer in result["layers"]:
        speed = layer["speed"]
        assert layer["error"] < 1e-5 and 0 < speed["low"] <= speed["ratio"] <= speed["high"]
        assert set(speed["ours"]) == ({"contiguous"} if layer["operation"] == "linear" else {"NCHW", "channels_last"})


def test_bench_prints_and_trains(capsys):
    printed = run(capsys, "bench", "lenet5", "2,1,28,28", "--rounds", "2", "--layers-only", "--train")
    assert "forward and backward" in printed and "geometric mean over all layers" in printed
    assert "training step" not in printed
    line = next(line for line in printed.splitlines() if "fc1" in line)
    assert len(line.split()) == 2 + 3 + 2 * 2 + 1 + 3  # name, kind, size, two times with units, ratio, quartiles


def test_bench_does_not_time_wrong_results(capsys, monkeypatch):
    monkeypatch.setattr(torch_convlab.functional, "linear", lambda *arguments: torch.zeros(2, 1) + 1)
    printed = run(capsys, "bench", *LENET5, "--rounds", "2", "--layers-only", status=1)
    assert "fc1: not timed, its output is" in printed


def test_roofline_places_every_layer(capsys, tmp_path):
    path = tmp_path / "new" / "roofline.png"
    result = run_json(capsys, "roofline", *LENET5, "--output", str(path))
    points = {point["names"][0]: point for point in result["points"]}
    assert list(points) == ["conv1", "pool1", "conv2", "pool2", "fc1", "fc2"]
    work, moved = 2 * 4_900_000, 4 * (2 * (20 * 14 * 14 + 50 * 14 * 14) + 50 * 20 * 25 + 50)
    assert (points["conv2"]["multiply_adds"], points["conv2"]["bytes"]) == (work, moved)
    assert points["conv2"]["bound_by"] == "arithmetic" and points["conv2"]["bound"] == pytest.approx(2 * work / 100e9)
    assert points["fc1"]["bound_by"] == points["pool1"]["bound_by"] == "memory"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib import image

    pixels = image.imread(path)
    assert pixels.shape[:2] == (750, 1200) and pixels[..., :3].std() > 0.05


def test_roofline_picture_shows_the_numbers():
    points = [
        ceilings.Point(["a", "b"], "conv2d", 10**9, 10**7, 0.05, 0.02, "arithmetic"),
        ceilings.Point(["c"], "linear", 10**6, 4 * 10**6, 4e-4, 2e-4, "memory"),
        ceilings.Point(["d"], "max_pool2d", 0, 10**6, 1e-4, 5e-5, "memory"),
    ]
    result = ceilings.Roofline(
        "a model", (1, 3, 8, 8), "NCHW", machine.Machine("cpu", 2, 100e9, "torch.mm", 20e9), points
    )
    (axes,) = ceilings.roofline_figure(result).axes
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_title().startswith("a model, input 1x3x8x8")
    (roofs,) = axes.lines
    assert list(roofs.get_xdata())[1] == 5.0 and list(roofs.get_ydata())[1:] == [100e9, 100e9]
    marks = {marks.get_label(): marks.get_offsets().tolist() for marks in axes.collections}
    assert marks == {"conv2d": [[200.0, 4e10]], "linear": [[0.5, 5e9]]}
    assert {text.get_text() for text in axes.texts} == {"peak 100 GFLOP/s (torch.mm)", "copy 20.0 GB/s"}


def test_machine_is_measured_once(monkeypatch):
    monkeypatch.setattr(machine, "_measured", {})
    monkeypatch.setattr(machine, "_SIZE", 256)
    monkeypatch.setattr(machine, "_COPIED", 2**20)
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    first = machine.measure_machine()
    assert first is machine.measure_machine() and first.threads == 1 and first.peak_of in machine._products()
    assert 1e9 < first.peak < 1e13 and 1e8 < first.bandwidth < 1e13
    assert first.bound(first.peak, 0) == (2.0, "arithmetic") and first.bound(0, first.bandwidth) == (1.0, "memory")


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify(capsys):
    printed = run(capsys, "verify", "resnet18", "2,3,64,64", "--all")
    assert "passed" in printed and "running_var" in printed and "diverges" not in printed
    result = run_json(capsys, "verify", *LENET5)
    assert result["passes"] is True and result["first_divergence"] is None
    assert result["output"]["ours"] < 1e-5 and 0 < result["output"]["ours_ulps"] < 200
    row = result["layers"][0]
    assert (row["name"], row["kind"], row["size"]) == ("conv1", "output", [2, 20, 28, 28])


def test_verify_names_the_first_layer_that_diverges(capsys, monkeypatch):
    right = torch_convlab.nn.MaxPool2d.forward
    monkeypatch.setattr(torch_convlab.nn.MaxPool2d, "forward", lambda self, input: right(self, input) + 0.1)
    printed = run(capsys, "verify", *LENET5, status=1)
    assert "FAILED: the first to diverge is pool1: output" in printed and "diverges" in printed


def test_verify_notices_wrong_running_statistics(monkeypatch):
    model = nn.Sequential(nn.BatchNorm1d(3)).train()
    right = torch_convlab.nn.BatchNorm1d.forward

    def forgetful(self, input):
        output = right(self, input)
        self.running_var.mul_(1.001)
        return output

    monkeypatch.setattr(torch_convlab.nn.BatchNorm1d, "forward", forgetful)
    result = lab.verify(model, torch.randn(8, 3, 5))
    assert result.first_divergence == "0: running_var"


def test_ulps_are_units_of_the_last_place():
    from torch_convlab.lab import verification

    exact = torch.tensor([1.5, -1.0], dtype=torch.float64)
    off = exact + torch.tensor([0.0, 3 * 2.0**-23], dtype=torch.float64)
    row = verification._comparison(("layer", "output"), off, exact, exact, 1.5)
    assert row.ours_ulps == pytest.approx(3) and row.theirs_ulps == 0
    assert row.ours == pytest.approx(3 * 2.0**-23 / 1.5)


def test_dropout_does_not_disturb_verification():
    result = lab.verify(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train(), torch.randn(3, 4))
    assert result.passes and {row.name for row in result.layers} == {"0", "1", "2"}


# --- tune -----------------------------------------------------------------------------------------------------------


def test_tune_writes_the_cache_and_tells_what_changed(capsys, tmp_path):
    path = tmp_path / "cache.json"
    before, settings = backends.tuned(), (backends.algorithm, backends.autotune)
    try:
        result = run_json(capsys, "tune", *LENET5, "--cache", str(path), "--pass", "forward")
        names = [entry["names"] for entry in result["entries"]]
        # The one channel of conv1's input looks the same in both memory formats.
        assert names == [["conv1"], ["conv2"], ["conv2"], ["fc1"], ["fc2"]]
        written = json.loads(path.read_text())["choices"]
        keys = [key for key in written if "channels=20->50" in key]
        assert len(keys) == 2 and all(key.startswith("forward float32") for key in keys)
        for entry in result["entries"]:
            assert entry["before"] is None and entry["seconds"][entry["chosen"]] == min(entry["seconds"].values())
        # A cache that holds something else: the next run says what it replaces.
        content = json.loads(path.read_text())
        content["choices"] = {key: ["naive", {"naive": 1.0}] for key in written}
        path.write_text(json.dumps(content))
        printed = run(capsys, "tune", *LENET5, "--cache", str(path), "--pass", "forward")
        assert "5 problems measured with 1 thread(s), 5 choices changed" in printed
        assert any(line.split()[:4] == ["conv2", "forward", "NCHW", "naive"] for line in printed.splitlines())
        assert "naive" not in {choice for choice, _ in json.loads(path.read_text())["choices"].values()}
        assert (backends.algorithm, backends.autotune) == settings
    finally:
        torch_convlab._C.set_tuned_table(before)


def test_tune_replaces_a_corrupt_cache_and_says_so(capsys, tmp_path):
    path, before = tmp_path / "cache.json", backends.tuned()
    path.write_text("not JSON")
    try:
        printed = run(capsys, "tune", *LENET5, "--cache", str(path), "--pass", "backward_weight")
    finally:
        torch_convlab._C.set_tuned_table(before)
    assert f"note: ignored the algorithm cache {path}: cannot be read" in printed
    assert json.loads(path.read_text())["choices"]


# --- advise ---------------------------------------------------------------------------------------------------------


def rules(model: nn.Module, inputs: torch.Tensor) -> dict[str, list[str]]:
    return {found.rule: found.where for found in lab.advise(model, inputs)}


def block(channels=16, bias=False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, bias=bias), nn.BatchNorm2d(channels), nn.ReLU())


def test_advise_small_batches():
    assert rules(block().train(), torch.randn(7, 3, 8, 8)) == {"small-batch": ["1"]}
    assert not rules(block().train(), torch.randn(8, 3, 8, 8))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(block()).train()
    assert "small-batch" not in rules(synchronized, torch.randn(2, 3, 8, 8))


def test_advise_modes():
    model = nn.Sequential(block(), nn.Dropout()).eval()
    assert rules(model, torch.randn(8, 3, 8, 8)) == {"foldable-norm": ["0.1"]}
    model[0][1].train()
    model[1].train()
    assert rules(model, torch.randn(8, 3, 8, 8))["train-mode-norm"] == ["0.1", "1"]
    without = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert rules(without, torch.randn(8, 3, 4, 4)) == {"norm-without-statistics": ["0"]}


def test_advise_bias_before_norm():
    assert rules(block(bias=True).train(), torch.randn(8, 3, 8, 8)) == {"bias-before-norm": ["0"]}
    linear = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    assert rules(linear, torch.randn(8, 4)) == {"bias-before-norm": ["0"]}


def test_advise_flatten_heads(capsys):
    """L12, with the numbers of the lecture's LeNet-5: 2450 x 500 weights, against 50 x 500."""
    printed = run(capsys, "advise", "lenet5", "8,1,28,28")
    assert (
        "flatten-head: fc1" in printed
        and "1,225,000 weights" in printed
        and "leaves 25,000 (49 times fewer)" in printed
    )
    assert "flatten-head" not in rules(models.resnet18(), torch.randn(8, 3, 64, 64))
    assert rules(models.alexnet().eval(), torch.randn(8, 3, 224, 224)) == {"flatten-head": ["classifier.1"]}


def test_advise_memory_formats():
    inputs = torch.randn(8, 3, 8, 8)
    model = nn.Sequential(block(), block(16)[1:], nn.Conv2d(16, 16, 3)).train()
    last = inputs.contiguous(memory_format=torch.channels_last)
    assert "memory-format" not in rules(model, inputs)
    assert rules(model, last)["memory-format"] == ["0.0", "2"]
    model.to(memory_format=torch.channels_last)
    assert "memory-format" not in rules(model, last)
    assert rules(model, inputs)["memory-format"] == ["0.0", "2"]
    model[2].to(memory_format=torch.contiguous_format)
    assert rules(model, last)["memory-format"] in (["2"], ["0.0"])


def test_advise_vector_lanes(monkeypatch):
    monkeypatch.setattr(advice, "build_info", lambda: {"instruction_set": "avx512"})
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 31, 3), nn.Conv2d(31, 31, 3, groups=31))
    (found,) = lab.advise(model, torch.randn(8, 3, 9, 9))
    assert found.rule == "vector-lanes" and found.where == ["0"] and "0: 20" in found.message
    monkeypatch.setattr(advice, "build_info", lambda: {"instruction_set": "baseline"})
    assert not lab.advise(model, torch.randn(8, 3, 9, 9))


def test_advise_json(capsys):
    found = run_json(capsys, "advise", "resnet18", "2,3,64,64")
    assert {entry["rule"] for entry in found} == {"small-batch", "foldable-norm"}
    assert len(found[1]["where"]) == 20 and not math.isnan(len(found[0]["message"]))
