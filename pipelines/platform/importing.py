"""Fewer searches for garbage: none while large libraries are imported, and few during a pass.

PyTorch and MLflow bring half a million objects that stay until the process ends. Python's collector
looks through all objects several times while they come, and through these again whenever it looks
for garbage later: an eighth of the processor time of a `retrain` pass. The records of a thousand
tasks that a pass reads stay as well.
"""

import atexit
import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

SELDOM = 50_000
"""New objects after which garbage is looked for during a pass; Python's own number is 700."""
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


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """A context in which garbage is looked for less often.

    What is no longer used is freed at once as ever; only objects that name each other in a circle
    wait for the search.
    """
    usual = gc.get_threshold()
    if usual[0]:  # 0: somebody has switched the search off
        gc.set_threshold(max(usual[0], SELDOM), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
