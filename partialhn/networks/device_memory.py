"""The memory of a device: a process's share of it, and what is said where it does not suffice."""

import contextlib
import re
from collections.abc import Iterator

import torch

from partialhn.errors import InputError
from partialhn.networks.draws import ALONE

RESIDENT_SHARE = 0.5
"""Largest part of the memory that a process may still take on a GPU, for features or images that
stay there: weights, gradients and the outputs of layers need the rest."""
_SAYS = re.compile(r"out of memory|_ALLOC_FAILED|you tried to allocate")
_ADVICE = re.compile(r" If reserved but unallocated memory is large.*", re.DOTALL)


class DeviceMemoryError(InputError):
    """A device has too little memory for some work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, CUDA or one of its libraries asked for memory that there was not."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _SAYS.search(str(error)) is not None)


def explanation(error: BaseException, work: str, allowed: str) -> DeviceMemoryError:
    """The error for the user: the work, the bytes that were asked for and are free, and a way out.

    work: what needed the memory, with its sizes.
    """
    numbers = _ADVICE.sub("", str(error).strip()).rstrip(".")
    return DeviceMemoryError(f"too little memory for {work}: {numbers}; allowed: {allowed}")


@contextlib.contextmanager
def explained(work: str, allowed: str) -> Iterator[None]:
    """A context in which running out of memory raises a `DeviceMemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explanation(error, work, allowed) from error


def limit_share(device: torch.device, share: float) -> None:
    """Lets this process take at most that share of a GPU's memory, so that it takes nothing from
    others that use the same GPU. Without effect on a CPU, and for the whole GPU.
    """
    if device.type == "cuda" and share < 1:
        torch.cuda.set_per_process_memory_fraction(share, _index(device))


def release(device: torch.device) -> None:
    """Gives back the memory of a GPU that this process holds and does not use.

    PyTorch refuses to while another thread records a step.
    """
    if device.type == "cuda":
        with ALONE:
            torch.cuda.empty_cache()


def fits(nbytes: int, most: int, device: torch.device) -> bool:
    """Whether features or images of so many bytes, at most `most`, may stay on the device.

    On a GPU they take at most `RESIDENT_SHARE` of what this process may still take there.
    """
    if nbytes > most or device.type != "cuda":
        return nbytes <= most
    return nbytes <= RESIDENT_SHARE * still_free(device)


def still_free(device: torch.device) -> int:
    """Bytes that this process may still take on a GPU: what is free there, within its share."""
    index = _index(device)
    free, total = torch.cuda.mem_get_info(index)
    used = torch.cuda.memory_allocated(index)
    unused = torch.cuda.memory_reserved(index) - used
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index)) - used
    return int(min(free + unused, allowed))


def _index(device: torch.device) -> int:
    """The GPU's number in this process."""
    return torch.cuda.current_device() if device.index is None else device.index
