"""The pages in docs/: links and pictures are there, the guides are complete, Sphinx builds them without a warning."""

from __future__ import annotations

import csv
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_convlab

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_pictures_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:csrc|examples|tests|bench|docs)/[\w./]+\w)`", text):
        if "conv_fourier" not in name:  # the guide's imagined algorithm
            assert (DOCS.parent / name).exists(), name


def test_few_products_are_of_few_tiles():
    """The share that docs/algorithms/implicit_gemm.md gives for not splitting sums over threads."""
    few = every = 0
    for row in csv.DictReader((DOCS.parent / "bench/timm_convolutions.csv").open()):
        layer = {name: int(value) for name, value in row.items()}
        if layer["k_h"] * layer["k_w"] != 1:
            continue
        height, width = ((layer[f"{a}_in"] + 2 * layer[f"p_{a}"] - 1) // layer[f"s_{a}"] + 1 for a in "hw")
        pixels, filters = height * width, layer["c_out"] // layer["groups"]
        multiply_adds = layer["layers"] * pixels * filters * layer["c_in"]
        every += multiply_adds
        few += multiply_adds * (-(-pixels // 6) * -(-filters // 64) * layer["groups"] < 48 and pixels > 1)
    assert f"{few / every:.1%}".replace("%", " %") == "0.2 %"
    assert "0.2 % are in products of less than 48 tiles" in (DOCS / "algorithms/implicit_gemm.md").read_text()


def test_pictures_are_small_and_whole():
    pictures = [*DOCS.glob("images/*.png"), *DOCS.glob("images/*.svg")]
    assert len(pictures) >= 10
    for picture in pictures:
        content = picture.read_bytes()
        assert len(content) < 200_000, picture.name
        if picture.suffix == ".png":
            assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
        assert any(f"images/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES), picture.name


def test_every_algorithm_has_a_guide():
    guides = {page.stem: page.read_text(encoding="utf-8") for page in (DOCS / "algorithms").glob("*.md")}
    for name in torch_convlab.algorithms():
        if name not in guides:
            pytest.fail(f"docs/algorithms/{name}.md is missing")
        for part in ("**Idea.**", "**Cost.**", "**Memory.**", "**Limits.**", "**Reference.**", "../images/"):
            assert part in guides[name], (name, part)
    listed = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"algorithms/{name}\n" in listed for name in guides)


def test_commands_in_the_lab_page_are_verbs_with_such_options():
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from torch_convlab import __main__ as command_line

    text = (DOCS / "lab.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m torch_convlab (\S+)(.*)$", text, flags=re.MULTILINE)
    commands = [(verb, rest) for verb, rest in commands if verb != "VERB"]
    assert len(commands) >= 7
    for verb, rest in commands:
        assert verb in command_line.VERBS
        module = importlib.import_module(f"torch_convlab.lab.commands.{verb.replace('-', '_')}")
        parser = command_line.argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(rest.split())


@pytest.mark.parametrize(
    "module", ["gradient_sums", "shared_statistics", "computational_graph"], ids=lambda name: f"lab.{name}"
)
def test_examples_in_docstrings(module):
    pytest.importorskip("matplotlib")
    tested = doctest.testmod(importlib.import_module(f"torch_convlab.lab.{module}"))
    assert tested.failed == 0 and tested.attempted > 0


def test_sphinx_builds_the_pages_without_a_warning_and_offline(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason=f"needs {name}: pip install 'torch_convlab[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(DOCS), str(tmp_path / "pages")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, timeout=300)
    assert result.returncode == 0, result.stderr
    pages = {
        page.relative_to(tmp_path / "pages"): page.read_text("utf-8") for page in tmp_path.rglob("pages/**/*.html")
    }
    for name, text in pages.items():
        assert not re.search(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//', text), name
    assert 'id="torch_convlab.convert"' in pages[Path("api/index.html")]
    assert 'id="torch_convlab.functional.conv2d"' in pages[Path("api/functional.html")]
    assert 'id="torch_convlab.nn.Conv2d"' in pages[Path("api/nn.html")]
    assert 'id="torch_convlab.lab.gradients"' in pages[Path("api/lab.html")]
