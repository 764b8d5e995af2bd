"""The one exception that stands for bad input."""


class LabError(Exception):
    """Bad input: an unknown model, a wrong shape, an unreadable file. Its text is one line, for the user.

    The command line prints it without a traceback and exits with status 2.
    """
