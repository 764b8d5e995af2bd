"""The lab's gradients, normalization sets and computational graph: the lecture's numbers, pictures, exit codes."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as xml

import pytest
import torch
from torch import nn
from verbs import assert_refused, run

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib import image
from matplotlib.patches import Rectangle

import torch_convlab
from torch_convlab import lab, models
from torch_convlab.lab import computational_graph, figure

# Gradients (lecture items L7, L8).


def test_l7_the_sum_of_one_weights_gradient():
    found = lab.gradients()
    terms = found.weight_terms(0, 1)
    assert [str(term) for term in terms] == ["3*g00", "2*g01", "6*g10", "6*g11"]
    assert [term.place for term in terms] == [(0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 1), (0, 0, 1, 2)]
    assert found.weight_gradient[0, 0, 0, 1] == 3 * 1 + 2 * 10 + 6 * 100 + 6 * 1000 == 6623
    assert found.bias_terms(0) == [1, 10, 100, 1000]


def test_l8_the_sum_of_one_inputs_gradient():
    found = lab.gradients()
    middle = found.input_terms(1, 1)
    assert [str(term) for term in middle[:4]] == ["5*g00", "4*g01", "2*g10", "1*g11"]
    assert [term.factor for term in middle[4:]] == [14, 13, 11, 10]  # the second kernel
    assert [str(term) for term in found.input_terms(0, 0)] == ["1*g00", "10*g00[k=1]"]  # a corner: one patch
    assert found.input_gradient[0, 0, 1, 1] == 1245 - 4 + sum((14 * 2, 13 * 20, 11 * 200, 10 * 2000)) + 4


@pytest.mark.parametrize("stride, padding, dilation", [*itertools.product((1, (2, 1)), (0, (1, 2)), (1, (1, 2)))])
@pytest.mark.parametrize("algorithm", ["naive", "implicit_gemm"])
def test_sums_are_what_autograd_gives(stride, padding, dilation, algorithm):
    input, weight = torch.randn(2, 2, 5, 6), torch.randn(3, 2, 2, 3)
    found = lab.gradients(input, weight, stride=stride, padding=padding, dilation=dilation)
    assert found.autograd_error(algorithm) < 1e-6 * found.weight_gradient.abs().max()
    leaves = input.double().requires_grad_(), weight.double().requires_grad_()
    output = nn.functional.conv2d(*leaves, stride=stride, padding=padding, dilation=dilation)
    by_torch = torch.autograd.grad(output, leaves, found.grad_output)
    torch.testing.assert_close(found.input_gradient, by_torch[0], rtol=1e-12, atol=1e-6)
    torch.testing.assert_close(found.weight_gradient, by_torch[1], rtol=1e-12, atol=1e-6)


def test_a_wrong_sum_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(lab.gradient_sums.Gradients, "_read", lambda self, y, x, row, column: (y + row, x + row))
    status, printed, _ = run(capsys, "gradients")
    assert status == 1 and "✗ autograd" in printed


def marks(axes, fill):
    """Places (row, column, height, width) of what is marked in a number grid."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_gid()]
    patches = [patch for patch in patches if ("fill" in patch.get_gid()) == fill]
    return [(p.get_y() + 0.5, p.get_x() + 0.5, p.get_height(), p.get_width()) for p in patches]


def test_picture_of_the_gradients_marks_patches_and_kernels():
    drawn = lab.gradients().draw()
    by_title = {axes.get_title(): axes for axes in drawn.axes if axes.texts}
    places = {"3*g00": (0, 1), "2*g01": (0, 2), "6*g10": (1, 1), "6*g11": (1, 2)}
    for (title, place), patch in zip(places.items(), ((0, 0), (0, 1), (1, 0), (1, 1))):
        axes = by_title[title]
        assert [text.get_text() for text in axes.texts] == list("2324566832101234")
        assert marks(axes, fill=True) == [(*place, 1, 1)]
        assert marks(axes, fill=False) == [(*patch, 3, 3)]
    for title, place in {"5*g00": (1, 1), "1*g11": (0, 0), "14*g00[k=1]": (1, 1), "10*g11[k=1]": (0, 0)}.items():
        assert marks(by_title[title], fill=True) == [(*place, 1, 1)]
    assert len(marks(by_title["input, read by filter 0"], fill=False)) == 4
    assert any(text.get_text().startswith("gradient of weight (0, 1) = 3*g00 + 2*g01") for text in drawn.texts)


def test_pictures_are_written_as_png_and_svg(tmp_path, capsys):
    for suffix in ("png", "svg"):
        path = tmp_path / "new" / f"gradients.{suffix}"
        assert run(capsys, "gradients", "--output", path)[0] == 0
        if suffix == "png":
            pixels = image.imread(path)
            assert pixels.shape[0] > 500 and pixels.shape[1] > 900
            orange = (abs(pixels[..., :3] - [0.95, 0.75, 0.68]) < 0.04).all(-1)
            assert orange.sum() > 2000  # the marked squares
        else:
            text = path.read_text()
            xml.fromstring(text)
            assert "currentColor" in text and "prefers-color-scheme:dark" in text and "3*g00" in text
    assert path.stat().st_size < 200_000


def test_gradients_command_prints_the_lectures_sum(capsys):
    status, printed, _ = run(capsys, "gradients")
    assert status == 0 and "gradient of weight (0, 1) = 3*g00 + 2*g01 + 6*g10 + 6*g11 = 6623" in printed
    status, printed, _ = run(capsys, "gradients", "--json", "--kernel", "1 2;3 4", "--padding", 1, "--weight", "1,1")
    data = json.loads(printed)
    assert status == 0 and data["autograd_error"] == 0 and len(data["weight_terms"]) == 16
    assert data["weight_terms"][0]["text"] == "2*g00"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gradients", "--stride", "0"], "expected stride to be one or two integers of at least 1, but got 0"),
        (["gradients", "--weight", "3,0"], "expected a place inside weight of size (2, 1, 3, 3)"),
        (["gradients", "--weight", "3"], "expected ROW,COLUMN such as 0,1, but got '3'"),
        (["gradients", "--input", "1 2;3"], "expected rows of one length"),
        (["gradients", "--input", "1 2;3 4"], "expected a kernel that fits the padded input"),
        (["gradients", "--kernel", "1", "--kernel", "1 2"], "expected kernels of one size"),
        (["gradients", "--output", "picture.gif"], "expected a file name that ends in .svg or .png"),
        (["gradients", "--output", "/proc/picture.png"], "cannot write /proc/picture.png"),
        (["normalize", "--groups", "4"], "expected groups to divide the 6 channels, but got 4"),
        (["normalize", "--shape", "4,6,4"], "expected a shape N,C,S,S"),
        (["normalize", "--shape", "4,6,1,1"], "with at least 3 pixels, but got (4, 6, 1, 1)"),
        (["graph", "lenet5", "1,1,28,28", "--output", "graph.png"], "expected a file name that ends in .svg"),
        (["graph", "resnet18", "1,3,32,32"], "in training mode: ValueError: Expected more than 1 value per channel"),
        (["graph", "torch.nn:Identity", "1,3"], "expected a model with parameters that need gradients"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, arguments, message)


# Normalization (lecture items L14, L17).


def test_which_elements_share_statistics():
    found = lab.normalize(groups=3)
    n, c = found.input.shape[:2]
    example = torch.arange(n).view(n, 1, 1, 1).expand(found.input.shape)
    channel = torch.arange(c).view(1, c, 1, 1).expand(found.input.shape)
    expected = {
        "batch": channel,
        "layer": example,
        "instance": example * c + channel,
        "group": example * 3 + channel // 2,
    }
    for kind in found.kinds:
        assert torch.equal(kind.sets, expected[kind.name]), kind.name
        for number in range(kind.set_count):
            values = kind.output[kind.sets == number]
            assert abs(values.mean()) < 1e-6 and abs(values.var(correction=0) - 1) < 1e-4
    assert [kind.depends_on_batch for kind in found.kinds] == [True, False, False, False]
    assert (found["group"].set_count, found["group"].set_size) == (12, 32)


def test_normalization_is_torchs():
    input = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    found = lab.normalize(input, groups=2)
    reference = {
        "batch": nn.functional.batch_norm(input, None, None, training=True),
        "layer": nn.functional.layer_norm(input, input.shape[1:]),
        "instance": nn.functional.instance_norm(input),
        "group": nn.functional.group_norm(input, 2),
    }
    for name, value in reference.items():
        torch.testing.assert_close(found[name].output, value, rtol=1e-9, atol=1e-9)


def test_picture_of_normalization_marks_the_first_set():
    found = lab.normalize()
    shown = {axes.get_title().partition("\n")[0]: axes for axes in found.draw().axes}
    for kind in found.kinds:
        axes = shown[kind.name]
        assert axes.get_title().endswith(f"{kind.set_count} sets of {kind.set_size}")
        (drawn,) = (one.get_array() for one in axes.images)
        expected = (kind.sets == 0).permute(0, 2, 1, 3).reshape(16, 24)
        assert (torch.tensor(drawn) == expected).all() and expected.sum() == kind.set_size


def test_normalize_command(capsys, tmp_path):
    path = tmp_path / "normalize.png"
    status, printed, _ = run(capsys, "normalize", "--output", path)
    assert status == 0 and "\x1b[" not in printed and path.stat().st_size > 10_000
    status, printed, _ = run(capsys, "normalize", "--json")
    kinds = {kind["name"]: kind for kind in json.loads(printed)["kinds"]}
    assert kinds["batch"]["spread_of_channel_means"] < 1e-12 < kinds["batch"]["spread_of_example_means"]
    assert kinds["layer"]["spread_of_example_means"] < 1e-12 < kinds["layer"]["spread_of_channel_means"]


# Computational graph (lecture item L20).


def test_graph_of_lenet_by_hand():
    found = lab.graph(models.LeNet5(layers=nn), (2, 1, 28, 28))
    names = ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "flatten", "fc1", "relu3", "fc2"]
    assert [step.name for step in found.steps] == names
    assert [step.inputs for step in found.steps] == [[place - 1] for place in range(10)]
    macs = {"conv1": 2 * 20 * 28 * 28 * 25, "conv2": 2 * 50 * 14 * 14 * 500, "fc1": 2 * 2450 * 500, "fc2": 2 * 5000}
    assert {step.name: step.multiply_adds for step in found.steps if step.multiply_adds} == macs
    # Backward costs twice that, for the two gradients; the first layer's input needs none.
    twice = {name: value * (1 if name == "conv1" else 2) for name, value in macs.items()}
    assert {step.name: step.backward_multiply_adds for step in found.steps if step.backward_multiply_adds} == twice
    assert found.multiply_adds == sum(macs.values()) and found.backward_multiply_adds == sum(twice.values())
    # relu's results in float32, max pooling's int64 indices, what the next convolution or linear layer reads.
    saved = {step.name: step.saved_bytes for step in found.steps}
    assert saved == {
        "conv1": 0, "relu1": 4 * 2 * 15680, "pool1": 8 * 2 * 3920, "conv2": 4 * 2 * 3920, "relu2": 4 * 2 * 9800,
        "pool2": 8 * 2 * 2450, "flatten": 0, "fc1": 4 * 2 * 2450, "relu3": 4 * 2 * 500, "fc2": 0,
    }  # fmt: skip
    assert found.steps[0].parameters == {"weight": (20, 1, 5, 5), "bias": (20,)}
    ours = lab.graph(models.LeNet5(), (2, 1, 28, 28))
    assert ours.saved_bytes == found.saved_bytes - 7 * 2 * (3920 + 2450)  # one byte per index instead of eight


def test_graph_follows_residuals_shared_layers_and_functional_calls():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = torch_convlab.nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()

        def forward(self, input):
            first = self.relu(self.conv(input))
            return torch.sigmoid(self.relu(self.conv(first)) + first)

    found = lab.graph(Block(), (1, 2, 5, 5), input_needs_gradient=True)
    steps = {step.name: step for step in found.steps}
    assert list(steps) == ["conv", "relu", "conv (call 2)", "relu (call 2)", "add", "sigmoid"]
    assert [found.steps[place].name for place in steps["add"].inputs] == ["relu (call 2)", "relu"]
    assert steps["conv"].inputs == [-1] and steps["add"].kind == "function"
    assert steps["conv"].multiply_adds == steps["conv (call 2)"].multiply_adds == 25 * 2 * 18
    # The second call of conv reads relu's result, which relu keeps already.
    assert [saved.owner for saved in steps["conv (call 2)"].saved] == ["relu", "conv.weight"]


def test_saved_bytes_are_what_autograd_packs():
    """Held against saved_tensors_hooks: every storage that is packed, but for parameters, buffers and the input."""
    model, input = models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32)
    known = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers(), input)}
    packed = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        packed[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input)
    expected = sum(storage.nbytes() for address, storage in packed.items() if address not in known)
    assert computational_graph.graph(model, input).saved_bytes == expected > 100_000


def test_graph_leaves_the_model_as_it_was():
    model = models.resnet18(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lab.graph(model, (2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_picture_of_the_graph(tmp_path, capsys):
    path = tmp_path / "graph.svg"
    status, printed, _ = run(capsys, "graph", "resnet18", "2,3,32,32", "--output", path)
    assert status == 0 and "layer1.0.relu (call 2)" in printed
    root = xml.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    found = lab.graph(models.resnet18(), (2, 3, 32, 32))
    boxes = [one.get("class") for one in root.iter(f"{space}rect")]
    assert boxes.count("forward") == len(found.steps) + 1 and boxes.count("backward") == len(found.steps)
    words = [one.text for one in root.iter(f"{space}text")]
    assert "layer4.1.conv2  Conv2d" in words and "of weight 64 x 3 x 7 x 7" in words and "2 x 512 x 1 x 1" in words
    kept = [one for one in root.iter(f"{space}path") if one.get("class") == "saved"]
    assert len(kept) == sum(bool(step.saved) for step in found.steps)
    bottom = max(float(one.get("y")) + float(one.get("height")) for one in root.iter(f"{space}rect"))
    assert bottom < float(root.get("height"))


def test_graph_command_as_json(capsys):
    status, printed, _ = run(capsys, "graph", "lenet5", "1,1,28,28", "--json")
    data = json.loads(printed)
    assert status == 0 and data["multiply_adds"] == 6_522_000 and data["steps"][0]["size"] == [1, 20, 28, 28]


def test_figures_refuse_other_suffixes():
    with pytest.raises(lab.LabError, match=r"ends in .svg or .png, but got 'x.pdf'"):
        figure.output_path("x.pdf")
