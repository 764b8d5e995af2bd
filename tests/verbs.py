"""Calls verbs of the command line inside the tests' process."""

from __future__ import annotations

from torch_convlab import __main__ as command_line


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a verb."""
    try:
        status = command_line.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(capsys, arguments, message: str) -> None:
    """Bad input: status 2, nothing on stdout, and one line that says what is wrong."""
    status, printed, error = run(capsys, *arguments)
    assert status == 2 and not printed
    assert message in error.splitlines()[-1] and "Traceback" not in error
