"""The program `partialhn`: the command line in a process of its own.

At its end Python searches all objects for garbage and takes every module apart. PyTorch and MLflow
bring half a million objects, so this takes a second or two of the processor after every command
that loads them, and nobody gains from it: the operating system frees the memory. A process that has
done its work in order leaves without it.
"""

import atexit
import os
import sys


def main() -> None:
    """Runs the command of `sys.argv` and ends the process with its code."""
    end = _End()
    atexit.register(end.leave)  # before anything else is registered, so it is called last
    from pipelines.cli.main import main as run_command

    try:
        run_command()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            end.code = error.code or 0
        raise


class _End:
    """The end of the process, once its exit code is known."""

    def __init__(self) -> None:
        self.code: int | None = None

    def leave(self) -> None:
        """Ends the process at once. Threads that are waited for have ended, and everything that
        libraries have registered for the end has been called.
        """
        if self.code is None:
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()  # raises where nobody reads it; Python then ends and says so
        os._exit(self.code)
