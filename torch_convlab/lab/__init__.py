"""The lab: what the command line (``python -m torch_convlab``) does, as functions that return plain data.

Each verb has a function here, named like it, and a module in `torch_convlab.lab.commands` that reads arguments and
prints. Needs the packages of the extra ``[lab]``.
"""

from __future__ import annotations

import importlib

# Function -> module that holds it; imported on first use. No module may be called like a function.
_FUNCTIONS: dict[str, str] = {
    "info": "environment",
    "doctor": "environment",
    "summary": "layers",
    "explain": "choices",
    "explain_layer": "choices",
    "tune": "tuning",
    "bench": "benchmark",
    "verify": "verification",
    "roofline": "ceilings",
    "advise": "advice",
    "gradients": "gradient_sums",
    "graph": "computational_graph",
    "normalize": "shared_statistics",
    "receptive_field": "field_growth",
    "report": "model_report",
    "train_lenet": "train",
}

__all__ = ["LabError", *_FUNCTIONS]

from .errors import LabError  # noqa: E402


def __getattr__(name: str):
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})
