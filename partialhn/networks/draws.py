"""Random draws that follow from a seed alone, whatever other threads draw meanwhile."""

import contextlib
import threading
from collections.abc import Iterator

import torch

ALONE = threading.RLock()
"""Held by a thread that draws from PyTorch's global generator, or that records a step on a GPU: no
other thread may seed a generator, or synchronise the device, while a step is recorded."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which PyTorch's CPU generator starts from a seed; it is put back afterwards.

    The generator belongs to the whole process, so one thread at a time is in such a context.
    """
    with ALONE, torch.random.fork_rng(devices=[]):
        # torch.manual_seed formats a call stack for GPUs that are not in use, in half a millisecond
        torch.default_generator.manual_seed(seed)
        yield
