"""Convolution, pooling and normalization for PyTorch by hand-written kernels; drop-in, and open about what ran."""

from __future__ import annotations

import torch  # first: loads the libraries that _C links against

from . import _C

__version__ = "0.1.0"


def algorithms() -> dict[str, str]:
    """Names of the convolution algorithms, each with a one-line description.

    Every name is a value of the keyword ``algorithm`` of the convolutions in `torch_convlab.functional`; besides
    them there is ``"auto"``.
    """
    return _C.algorithms()


def build_info() -> dict[str, object]:
    """How the compiled part was built, and the instruction set it chose on this machine."""
    return {"version": __version__, "torch": torch.__version__, **_C.build_info()}


from . import _flops, backends, functional, models, nn  # noqa: E402, F401
from ._override import override  # noqa: E402
from .choice import explain_convolution  # noqa: E402
from .conversion import conversion_report  # noqa: E402
from .convert import convert, revert  # noqa: E402
from .fuse import fuse, fusion_report  # noqa: E402
from .recompute import recompute_batch_norm  # noqa: E402

__all__ = [
    "algorithms",
    "backends",
    "build_info",
    "conversion_report",
    "convert",
    "explain_convolution",
    "functional",
    "fuse",
    "fusion_report",
    "models",
    "nn",
    "override",
    "recompute_batch_norm",
    "revert",
]
