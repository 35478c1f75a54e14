"""Settings of PyTorch: the device, CPU threads, denormal numbers, TF32, and bfloat16."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from partialhn.config import Arithmetic, Precision
from partialhn.environment import keep_float32, let_streams_overlap
from partialhn.errors import InputError


def configure_torch(threads: int | None = None) -> None:
    """Sets up this process's arithmetic, for the rest of its life.

    threads: CPU threads; None leaves PyTorch's number. Denormal numbers are flushed to zero, and
    on a GPU float32 stays float32: by default PyTorch lets convolutions round to TF32.
    """
    keep_float32()
    if torch.version.cuda is not None:
        let_streams_overlap()
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    # the older of two interfaces first: an export of a network asks it, and it refuses to answer,
    # on a CPU too, where it was left at its default and the newer one says something else
    torch.backends.cudnn.allow_tf32 = False
    for place in _places():
        place.fp32_precision = "ieee"


def _places() -> tuple[Any, ...]:
    """Where PyTorch keeps what a GPU may do to float32."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `gpu`.

    Raises: InputError if a GPU is required and CUDA finds none.
    """
    if wanted != "cpu" and torch.version.cuda is not None:
        let_streams_overlap()  # before CUDA is asked anything
    use_gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "gpu" and not use_gpu:
        raise InputError("device is 'gpu', but CUDA finds no GPU on this machine; allowed: "
                         "auto, cpu, or gpu on a machine with one")
    return torch.device("cuda" if use_gpu else "cpu")


def sleeping_event(stream: Any = None) -> Any:
    """An event after what a stream of a GPU was given so far; default: this thread's stream.

    Who waits for it sleeps. Otherwise CUDA asks without a pause, and a thread that waits takes a
    processor.
    """
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream or torch.cuda.current_stream())
    return event


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done what this thread gave it, before numbers are read from there. A
    device that works while the host waits needs nothing.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            sleeping_event().synchronize()


def device_name(device: torch.device) -> str:
    """The name of a device in results: a GPU's model, otherwise its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast_to(precision: Precision,
                device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which convolutions and matrix products run in `precision`.

    bfloat16 uses PyTorch's autocast; float32 changes nothing.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def arithmetic_of(kind: Arithmetic,
                  device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which convolutions and matrix products have this arithmetic.

    ieee changes nothing: `configure_torch` has set it. tf32 exists on a GPU alone.
    """
    if kind == "bfloat16":
        return autocast_to("bfloat16", device)
    return _tf32() if kind == "tf32" and device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 may be rounded to TF32 in this process."""
    places = _places()
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    try:
        yield
    finally:
        for place, kind in zip(places, before, strict=True):
            place.fp32_precision = kind
