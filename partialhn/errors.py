"""The errors a user can cause, apart from the errors that are ours.

Every message names the thing, the value found and what is allowed. The command line turns
`InputError` into exit code 2 and anything else into exit code 1.
"""

from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used: an option, a path, an image, a model name."""


class DivergedError(InputError):
    """The loss of a task is no longer finite with these options; other tasks may do well."""

    def __init__(self, message: str, task: str = "") -> None:
        """task: name of the task's slot."""
        super().__init__(message)
        self.task = task


class IntegrityError(RuntimeError):
    """Something stored is not what it says it is: a shard, a manifest, a checkpoint."""


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then the one behind it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
