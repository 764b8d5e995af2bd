"""The report on a model: its sections, what it refers to, and how a real browser shows it."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn
from verbs import assert_refused, run

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from matplotlib import image

from torch_convlab import lab, models
from torch_convlab.lab import sections

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, the ids of its sections, its tables' cells and its text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.sections, self.cells, self.words = [], [], [], []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[name] for name in ("src", "href", "xlink:href", "data") if name in attributes]
        if tag == "section":
            self.sections.append(attributes["id"])
        self.inside = tag

    def handle_data(self, words):
        self.words.append(words)
        if self.inside == "td":
            self.cells.append(words.strip())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take minutes on a machine that is busy
    try:
        found = lab.report(models.LeNet5(), (2, 1, 28, 28), "lenet5")
    finally:
        torch.set_num_threads(threads)
    assert found.passed
    return found.html(tmp_path_factory.mktemp("report") / "new" / "report.html")


def test_report_has_every_section_and_needs_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.sections == list(sections.SECTIONS)
    links = {reference for reference in page.references if not reference.startswith(("data:", "#"))}
    assert not links and {f"#{key}" for key in sections.SECTIONS} <= set(page.references)
    assert not re.search(r"url\(['\"]?(?!#)|@import|fetch\(|<link|<script src", text)
    assert path.stat().st_size < 2_000_000


def test_report_holds_the_lectures_numbers(path):
    page = Page(path.read_text(encoding="utf-8"))
    for cell in ("20 x 28 x 28", "50 x 20 x 5 x 5", "2450 x 500", "1,225,500", "MaxPoolBackward", "16 x 16"):
        assert cell in page.cells, cell
    words = " ".join(page.words)
    assert "3*g00 + 2*g01 + 6*g10 + 6*g11 = 6623" in words and "1.26 M" in words
    assert "Not for this model" not in words and "✗" not in words


def test_a_section_that_cannot_be_made_says_why_and_a_failed_check_is_kept(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    found = lab.report(model, (1, 1, 16), "chain", sections=["field"])
    expected = "Not for this model: expected an input N x C x H x W to draw, but got (1, 1, 16)"
    assert found.sections[0].blocks[0].text == expected
    found = lab.report(nn.Sequential(nn.ReLU(), nn.Flatten()), (1, 1, 4, 4), "plain", sections=["algorithms", "graph"])
    assert [section.blocks[0].text for section in found.sections] == [
        "Not for this model: it has no convolution and no linear layer",
        "Not for this model: expected a model with parameters that need gradients, but found none",
    ]
    monkeypatch.setattr(sections.gradients().__class__, "autograd_error", lambda self: 0.5)
    found = lab.report(model, (1, 1, 16), sections=["gradients"])
    assert not found.passed
    assert "✗" in found.html(tmp_path / "failed.html").read_text(encoding="utf-8")


def test_text_is_escaped(tmp_path):
    found = lab.report(models.LeNet5(), (1, 1, 28, 28), "<script>alert(1)</script>", sections=["layers"])
    assert "<script>alert" not in found.html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, _ = run(capsys, "report", "lenet5", "1,1,28,28", "--sections", "overview,gradients")
    assert status == 0 and "report-lenet5.html: 2 sections" in printed and "✓ Gradients by hand" in printed
    status, printed, _ = run(
        capsys, "report", "lenet5", "1,1,28,28", "--sections", "layers", "--json", "--output", tmp_path / "x" / "y.html"
    )
    assert status == 0 and [one["key"] for one in json.loads(printed)["sections"]] == ["layers"]
    for arguments, message in {
        ("lenet5", "1,1,28,28", "--sections", "layer"): "unknown section 'layer': expected one of overview, layers",
        ("lenet5", "1,1,28,28", "--output", "report.pdf"): "expected a file name that ends in .html",
        ("lenet5", "1,1,28,28", "--output", "/proc/report.html"): "cannot write /proc/report.html",
        ("lenet5", "1,1,14,14"): "lenet5 does not accept an input of 1 x 1 x 14 x 14",
    }.items():
        assert_refused(capsys, ["report", *arguments], message)


# In a real browser.

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")


def browse(page, *options, dark=False):
    """What the browser prints, and what the page logged: errors and all that scripts write to the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'browser'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *options, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(page.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    logged = [line for line in result.stderr.splitlines() if re.search(r"CONSOLE|Uncaught|net::ERR", line)]
    return result.stdout, logged


@in_browser
def test_browser_opens_the_report_without_an_error_and_runs_its_script(path):
    text = path.read_text(encoding="utf-8")
    actions = "document.querySelector('#layers th:nth-child(6)').click(); document.getElementById('theme').click()"
    used = path.with_name("used.html")
    used.write_text(text.replace("</body>", f"<script>{actions}</script></body>"), encoding="utf-8")
    document, logged = browse(used, "--dump-dom", "--virtual-time-budget=2000")
    assert not logged
    assert 'data-theme="dark"' in document.partition("<head>")[0]
    layers = document.partition('<section id="layers">')[2].partition("</section>")[0]
    order = re.findall(r'<tr><td class="name">(\w+)</td>', layers)
    assert order[:3] == ["conv2", "fc1", "conv1"] and len(order) == 10  # by multiply-adds
    assert Page(document).sections == list(sections.SECTIONS)


@in_browser
def test_browser_notices_an_error(path):
    broken = path.with_name("broken.html")
    broken.write_text(path.read_text(encoding="utf-8").replace("</body>", "<script>missing()</script></body>"))
    assert any("missing is not defined" in line for line in browse(broken, "--dump-dom")[1])


@in_browser
def test_browser_shows_dark_and_light(path):
    shown = {}
    for dark in (True, False):
        picture = path.with_name(f"{dark}.png")
        _, logged = browse(path, f"--screenshot={picture}", "--window-size=1300,2600", dark=dark)
        assert not logged
        shown[dark] = image.imread(picture)[..., :3]
        assert shown[dark].shape == (2600, 1300, 3)
    background = {dark: pixels[5, 1290].mean() for dark, pixels in shown.items()}
    assert background[True] < 0.15 and background[False] == 1
    for dark, pixels in shown.items():
        ink = pixels.mean(-1) > 0.8 if dark else pixels.mean(-1) < 0.3
        assert ink.sum() > 20_000  # text and axes, in both
        orange = (abs(pixels - [0.851, 0.282, 0.059]) < 0.02).all(-1)
        assert orange.sum() > 2000  # the bars of the first chart
