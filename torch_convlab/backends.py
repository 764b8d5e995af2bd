"""How ``algorithm="auto"`` decides: process-wide settings in the manner of `torch.backends`.

Attributes, to read and to set:

``algorithm``
    ``"auto"``, or the name of an algorithm to take wherever it does not refuse.
``precision``
    ``"high"``: winograd and strassen are allowed (float32 errors up to 5e-6 of max|output|). ``"highest"``: only
    algorithms with the error of a plain sum (1e-6). What a layer asks for by name is done in either case.
``autotune``
    True: measure the algorithms once for each new convolution, in the call that meets it first, and remember the
    fastest. Found choices are loaded from `cache_path` when this is switched on and saved there when the process ends.
    A measured choice may differ from run to run, and so may the last bits of the results.
``cache_path``
    The file of measured choices: ``$TORCH_CONVLAB_CACHE``, or ``torch_convlab/algorithms-<key>.json`` in the user's
    cache folder, where the key stands for this CPU, instruction set and version.
``reuse_memory``
    True (the default): large results on the CPU take the memory of results that are no longer used, instead of giving
    it back to the system and asking for new memory, whose first use is slow. Results in use and memory kept for new
    ones never exceed together the most that results have used at one time, or 32 MiB; `release_memory` gives back what
    is kept.

>>> with torch_convlab.backends.flags(precision="highest"):
...     output = model(input)
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import types
import warnings
from pathlib import Path

import torch

from . import _C

_PRECISIONS = ("high", "highest")
_FORMAT = 1


def flags(
    algorithm: str | None = None,
    precision: str | None = None,
    autotune: bool | None = None,
    reuse_memory: bool | None = None,
):
    """Context manager: the given settings inside, the previous ones again after it. It is not local to a thread."""
    wanted = {"algorithm": algorithm, "precision": precision, "autotune": autotune, "reuse_memory": reuse_memory}
    return _flags({name: value for name, value in wanted.items() if value is not None})


@contextlib.contextmanager
def _flags(wanted: dict):
    before, reused = _C.settings(), _C.reuses_memory()
    try:
        for name, value in wanted.items():
            setattr(_module, name, value)
        yield
    finally:
        _C.set_settings(*before)
        _C.set_reuses_memory(reused)


def tuned() -> dict[str, tuple[str, dict[str, float]]]:
    """The measured choices: problem in words -> (fastest algorithm, seconds of each algorithm tried)."""
    return _C.tuned_table()


def clear() -> None:
    """Forget the measured choices of this process. The cache file stays."""
    _C.set_tuned_table({})


def release_memory() -> None:
    """Give the memory kept for new results back to the system; see ``reuse_memory``."""
    _C.release_memory()


def load(path: str | os.PathLike | None = None) -> int:
    """Add the choices in the file (default `cache_path`) to those of this process; return how many there were.

    A missing file holds none. One that cannot be read, or was written on another machine or by another version, is
    ignored with a warning.
    """
    path = Path(path or _module.cache_path)
    entries = _read(path)
    _C.set_tuned_table({**entries, **_C.tuned_table()})
    return len(entries)


def save(path: str | os.PathLike | None = None) -> Path:
    """Write the choices of this process, with those that the file (default `cache_path`) already has; return its path.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    path = Path(path or _module.cache_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be used is replaced
        entries = {**_read(path), **_C.tuned_table()}
    content = {"format": _FORMAT, **_identity(), "choices": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    return path


def _identity() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "cpu": cpu,
        "instruction_set": _C.build_info()["instruction_set"],
        "version": sys.modules[__package__].__version__,
        "torch": torch.__version__,
    }


def _default_path() -> Path:
    if "TORCH_CONVLAB_CACHE" in os.environ:
        return Path(os.environ["TORCH_CONVLAB_CACHE"])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(json.dumps(_identity()).encode()).hexdigest()[:10]
    return folder / "torch_convlab" / f"algorithms-{key}.json"


def _read(path: Path) -> dict:
    """The choices in the file; none, and a warning, if it is not usable."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"ignored the algorithm cache {path}: cannot be read ({error})", stacklevel=3)
        return {}
    try:
        expected = {"format": _FORMAT, **_identity()}
        different = [name for name, value in expected.items() if content[name] != value]
        choices = {
            str(key): (str(chosen), {str(name): float(seconds) for name, seconds in times.items()})
            for key, (chosen, times) in content["choices"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"ignored the algorithm cache {path}: not such a file ({error!r})", stacklevel=3)
        return {}
    if different:
        reason = ", ".join(f"{name} {content[name]!r} instead of {expected[name]!r}" for name in different)
        warnings.warn(f"ignored the algorithm cache {path}: it is of {reason}", stacklevel=3)
        return {}
    known = _C.algorithms()
    return {key: entry for key, entry in choices.items() if entry[0] in known}


class _Backends(types.ModuleType):
    _autotuned = False
    _cache_path: Path | None = None

    @property
    def algorithm(self) -> str:
        return _C.settings()[0]

    @algorithm.setter
    def algorithm(self, value: str) -> None:
        if value not in ("auto", *_C.algorithms()):
            known = ", ".join(["auto", *_C.algorithms()])
            raise ValueError(f"expected algorithm to be one of {known}, but got {value!r}")
        _C.set_settings(value, *_C.settings()[1:])

    @property
    def precision(self) -> str:
        return _PRECISIONS[_C.settings()[1]]

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in _PRECISIONS:
            raise ValueError(f"expected precision to be one of {', '.join(_PRECISIONS)}, but got {value!r}")
        algorithm, _, autotune = _C.settings()
        _C.set_settings(algorithm, value == "highest", autotune)

    @property
    def autotune(self) -> bool:
        return _C.settings()[2]

    @autotune.setter
    def autotune(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"expected autotune to be True or False, but got {value!r}")
        if value and not self._autotuned:
            type(self)._autotuned = True
            load()
            atexit.register(_save_at_exit)
        _C.set_settings(*_C.settings()[:2], value)

    @property
    def reuse_memory(self) -> bool:
        return _C.reuses_memory()

    @reuse_memory.setter
    def reuse_memory(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"expected reuse_memory to be True or False, but got {value!r}")
        _C.set_reuses_memory(value)

    @property
    def cache_path(self) -> Path:
        return self._cache_path or _default_path()

    @cache_path.setter
    def cache_path(self, value: str | os.PathLike | None) -> None:
        type(self)._cache_path = None if value is None else Path(value)


def _save_at_exit() -> None:
    try:
        if tuned():
            save()
    except OSError as error:
        warnings.warn(f"could not save the algorithm cache: {error}", stacklevel=1)


_module = sys.modules[__name__]
_module.__class__ = _Backends
