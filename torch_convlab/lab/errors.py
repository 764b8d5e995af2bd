"""The one exception that stands for bad input, and the check that a file can be written."""

from __future__ import annotations

from pathlib import Path


class LabError(Exception):
    """Bad input: an unknown model, a wrong shape, an unreadable file. Its text is one line, for the user.

    The command line prints it without a traceback and exits with status 2.
    """


def check_writable(path: Path) -> Path:
    """Raises LabError if a file cannot be written there; makes missing folders. Call it before long work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}") from error
    return path
