"""The demo: its data readers, its checks, and the whole of it, quickly."""

from __future__ import annotations

import dataclasses
import gzip
import html.parser
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("sklearn")

import torch_convlab
from torch_convlab import __main__ as command_line
from torch_convlab import models
from torch_convlab.lab import data, timing, train, verification
from torch_convlab.lab.commands import demo


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, words):
        self.words.append(words)


def test_quick_demo_writes_a_report_that_needs_nothing_else(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "bundled_digits", lambda: data.bundled_digits().first(320))
    path = tmp_path / "new folder" / "report.html"
    assert command_line.main(["demo", "--quick", "--epochs", "1", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("320 training images", "largest difference", "every layer alone", "torch / ours", "Summary"):
        assert expected in printed
    assert "✗" not in printed and "\x1b[" not in printed
    page = Page(path.read_text(encoding="utf-8"))
    assert page.references and all(reference.startswith(("data:", "#")) for reference in page.references)
    text = " ".join(page.words)
    assert "layer4.1.conv2" in text and "gradient of weight" in text
    assert "prefers-color-scheme: dark" in text and "url(http" not in text


def test_command_line(capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        assert stop.value.code == 0
        assert "python -m torch_convlab demo" in capsys.readouterr().out
    for arguments in ([], ["unknown"], ["demo", "--epochs", "0"]):
        with pytest.raises(SystemExit) as stop:
            command_line.main(arguments)
        assert stop.value.code == 2
    assert "expected at least 1, but got 0" in capsys.readouterr().err


def test_every_verb_has_a_module():
    for verb in command_line.VERBS:
        module = __import__(f"torch_convlab.lab.commands.{verb.replace('-', '_')}", fromlist=["run"])
        assert callable(module.run) and callable(module.add_arguments)


def test_a_missing_lab_package_is_one_clear_line():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from torch_convlab.__main__ import main; sys.exit(main(['demo', '--quick']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("install the lab's packages: pip install 'torch_convlab[lab]'")
    assert "Traceback" not in result.stderr


def test_a_failed_check_is_the_exit_status(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_train", lambda console, digits, recipe, quick: results)
    monkeypatch.setattr(demo, "_verify_and_time", lambda console, results, quick: None)
    monkeypatch.setattr(demo, "write_report", lambda results, path: None)
    for passed in (True, False):
        results = demo.Results(train.Recipe(), None, None, None, None, None)
        results.check(passed, "something [in brackets]")
        assert command_line.main(["demo"]) == (0 if passed else 1)


def test_bundled_digits():
    digits, again = data.bundled_digits(), data.bundled_digits()
    assert digits.train_images.shape == (1437, 1, 28, 28) and digits.test_images.shape == (360, 1, 28, 28)
    assert torch.equal(digits.train_images, again.train_images)
    assert sorted(set(digits.test_labels.tolist())) == list(range(10))
    assert abs(digits.train_images.mean()) < 1e-5 and abs(digits.train_images.std() - 1) < 1e-5


def write_mnist(folder, compress=False, images=6, size=28, **replaced):
    """Four IDX files of random content; `replaced` gives the bytes of some of them by kind."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("train", "t10k"):
        pixels = torch.randint(256, (images * size * size,), generator=generator).tolist()
        header = b"".join(value.to_bytes(4, "big") for value in (images, size, size))
        files = {
            f"{kind}-images-idx3-ubyte": bytes([0, 0, 8, 3]) + header + bytes(pixels),
            f"{kind}-labels-idx1-ubyte": bytes([0, 0, 8, 1]) + images.to_bytes(4, "big") + bytes(range(images)),
        }
        for name, content in files.items():
            content = replaced.get(name.rpartition("-")[0].replace("-", "_"), content)
            (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_mnist_folder(tmp_path, compress):
    digits = data.mnist_folder(write_mnist(tmp_path, compress))
    assert digits.train_images.shape == digits.test_images.shape == (6, 1, 28, 28)
    assert digits.test_labels.tolist() == list(range(6))


def test_mnist_images_of_another_size_are_resized(tmp_path):
    assert data.mnist_folder(write_mnist(tmp_path, size=16)).train_images.shape == (6, 1, 28, 28)


@pytest.mark.parametrize(
    "replaced,message",
    [
        (
            {"train_images_idx3": bytes([0, 0, 8, 1])},
            r"train-images-idx3-ubyte is no IDX file.*begins with 00 00 08 01",
        ),
        ({"train_images_idx3": b""}, r"train-images-idx3-ubyte is no IDX file.*begins with nothing"),
        (
            {"t10k_labels_idx1": bytes([0, 0, 8, 1, 0, 0, 0, 6, 1, 2])},
            r"should hold 6 values, sizes \[6\], but holds 2",
        ),
        ({"t10k_labels_idx1": bytes([0, 0, 8, 1, 0, 0, 0, 1, 2])}, r"holds 6 t10k images, but 1 t10k labels"),
        ({"t10k_labels_idx1": bytes([0, 0, 8, 1, 0, 0, 0, 6, *[77] * 6])}, r"labels 0 to 9"),
    ],
)
def test_corrupt_mnist_files_are_named(tmp_path, replaced, message):
    with pytest.raises(data.DataError, match=message):
        data.mnist_folder(write_mnist(tmp_path, **replaced))


def test_missing_and_unreadable_mnist_files_are_named(tmp_path, capsys):
    with pytest.raises(data.DataError, match="holds none of train-images-idx3-ubyte, "):
        data.mnist_folder(tmp_path)
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(data.DataError, match=r"cannot read .*train-labels-idx1-ubyte.gz"):
        data.mnist_folder(tmp_path)
    assert command_line.main(["demo", "--data", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_shifts_move_whole_images_and_follow_the_generator():
    images = torch.arange(2 * 5 * 5).view(2, 1, 5, 5).float()
    first = data.shifted(images, 1, torch.Generator().manual_seed(3))
    assert torch.equal(first, data.shifted(images, 1, torch.Generator().manual_seed(3)))
    for old, new in zip(images, first):
        windows = [
            nn.functional.pad(old, [1] * 4, mode="replicate")[:, y : y + 5, x : x + 5]
            for y in range(3)
            for x in range(3)
        ]
        assert any(torch.equal(new, window) for window in windows)


def test_training_is_repeatable():
    digits, recipe = data.bundled_digits().first(200), train.Recipe(epochs=1)
    first, second = train.train_lenet(digits, recipe), train.train_lenet(digits, recipe)
    assert first.losses == second.losses and len(first.losses) == 7
    other = train.train_lenet(digits, dataclasses.replace(recipe, seed=1))
    assert first.losses != other.losses
    assert max(train.differences(first, train.train_lenet(digits, recipe, nn))) < 1e-3


def test_differences_see_nan():
    first, second = train.Run(nn.Identity(), [1.0, float("nan")]), train.Run(nn.Identity(), [1.5, 1.0])
    assert train.differences(first, second) == [0.5, float("inf")]


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1)).train()


def total(output):
    return output.square().sum()


def test_verification_passes_and_names_every_tensor():
    model, inputs = small_network(), torch.randn(2, 2, 6, 6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = verification.verify_layers(model, inputs, total)
    assert all(comparison.passes for comparison in layers)
    kinds = [(comparison.name, comparison.kind) for comparison in layers]
    weight, bias, read = "gradient of weight", "gradient of bias", "gradient of input"
    both = "output", read, weight, bias
    parts = {"0": both, "1": (*both, "running_mean", "running_var"), "2": ("output", read)}
    assert kinds == [(name, kind) for name, these in {**parts, "3": parts["0"]}.items() for kind in these]
    network = verification.verify_network(model, inputs, total)
    assert all(comparison.passes for comparison in network) and len(network) == 4 + 1 + 6 + 2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_verification_notices_a_wrong_layer(monkeypatch, wrong):
    right = torch_convlab.nn.Conv2d.forward
    monkeypatch.setattr(torch_convlab.nn.Conv2d, "forward", lambda self, input: right(self, input) * wrong)
    model, inputs = small_network(), torch.randn(2, 2, 6, 6)
    for check in (verification.verify_layers, verification.verify_network):
        failed = {comparison.name for comparison in check(model, inputs, total) if not comparison.passes}
        assert {"0", "3"} <= failed


def test_verification_tells_calls_of_a_shared_layer_apart():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    names = [comparison.name for comparison in verification.verify_layers(model, torch.randn(2, 3), total)]
    assert "1" in names and "1 (call 2)" in names


def test_timing_takes_turns_and_compares():
    model = models.LeNet5(layers=nn)
    inference, step = timing.time_model(model, torch.randn(1, 1, 28, 28), rounds=3)
    assert inference.task == "inference" and step.task == "training step"
    names = {"ours NCHW", "torch NCHW", "ours channels_last", "torch channels_last"}
    assert set(inference.seconds) == names and all(len(values) == 3 for values in step.seconds.values())
    ratio, low, high = step.ratio("ours NCHW", "torch NCHW")
    assert 0 < low <= ratio <= high
    assert inference.best("ours") in names
