"""Sphinx: `make docs`, or `sphinx-build docs build/docs`. Needs the extra `[docs]`; builds offline."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch_convlab  # noqa: E402

project = "torch_convlab"
version = release = torch_convlab.__version__
author = copyright = "the authors of torch_convlab"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"torch_convlab {version}"
myst_heading_anchors = 3
default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what is expected, with sizes and units
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_param = False
nitpicky = False
