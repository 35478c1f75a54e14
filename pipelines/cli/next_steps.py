"""The end of a long command: what its user may want to run next."""

import shlex
from collections.abc import Sequence

from pipelines.settings import OutputConfig, mask_password


def next_steps(commands: Sequence[str], storage: str = OutputConfig.storage,
               tracking_uri: str | None = None) -> list[str]:
    """Lines for a terminal: each command, without `partialhn`, with the storage and registry that
    the command before it was given.
    """
    where = "" if storage == OutputConfig.storage else f" --storage {shlex.quote(storage)}"
    if tracking_uri:
        where += f" --tracking-uri {shlex.quote(mask_password(tracking_uri))}"
    return ["next:", *(f"  partialhn {command}{where}" for command in commands)]
