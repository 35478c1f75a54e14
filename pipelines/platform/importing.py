"""Imports of large libraries without a search for garbage.

PyTorch and MLflow bring half a million objects that stay until the process ends. Python's collector
looks through all objects several times while they come, and through these again whenever it looks
for garbage later: an eighth of the processor time of a `retrain` pass.
"""

import atexit
import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()
_STARTED: set[str] = set()


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """A context in which a large module is imported, for the first time in this process.

    No garbage is looked for meanwhile, and the objects that exist afterwards are not looked through
    again. Does nothing where the module is imported already, or by another thread.
    """
    with _LOCK:
        first = module not in sys.modules and module not in _STARTED and gc.isenabled()
        _STARTED.add(module)
        if first:
            gc.disable()
    try:
        yield
    finally:
        if first:
            gc.enable()
            gc.freeze()
            atexit.register(gc.unfreeze)  # libraries report what nobody takes down at the end
