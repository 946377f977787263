"""Errors that are the user's to mend: one paragraph naming what was found and what to do.

Scripts print these without a traceback and exit with status 1. Anything else that
escapes is a bug in jaxunet and keeps its traceback.
"""


class JaxUNetError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(JaxUNetError, ValueError):
    """A configuration value, or a combination of them, is not allowed."""


class DataError(JaxUNetError, ValueError):
    """The data on disk is missing, broken or not what the configuration says."""


class SourceGone(DataError):
    """Nothing of a dataset's source files is where they should be."""


class RunError(JaxUNetError, RuntimeError):
    """A run directory or checkpoint cannot be used as asked, or a run had to stop."""


class Stopped(RunError):
    """The run was asked to stop, has saved, and can be resumed; `signal` says by what.

    None says that its own time limit did, which is no failure.
    """

    def __init__(self, message: str, number: int | None):
        super().__init__(message)
        self.signal = number


def shown(name: str) -> str:
    """A name out of a stranger's file, fit to be printed: one short line."""
    return name if name.isprintable() and len(name) <= 100 else f"{name[:100]!a}..."
