"""The registry that `Stream.register` writes to, found by its entry point.

This package imports no registry. Another one, such as `pipelines`, names a function in the
entry-point group `partialhn.registries`.
"""

from collections.abc import Callable
from importlib import metadata

from partialhn.errors import InputError
from partialhn.run import StreamRun

GROUP = "partialhn.registries"
Register = Callable[[StreamRun, str, str, str | None], str]
"""Registers the learned models: (run, name, storage, tracking URI) -> the URI of the newest."""


def installed_registry() -> Register:
    """The registry that is installed; the first by name where there are several.

    Raises: InputError where there is none.
    """
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    if not entries:
        raise InputError(f"no registry is installed (entry points {GROUP}); allowed: install "
                         "partialhn with its pipelines, or save() the model")
    register: Register = entries[0].load()
    return register
