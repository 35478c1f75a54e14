"""Numerical settings of PyTorch: CPU threads, denormal numbers, TF32, and bfloat16."""

import contextlib

import torch

from partialhn.config import Precision


def configure_torch(threads: int | None = None) -> None:
    """Sets up this process's arithmetic, for the rest of its life.

    threads: CPU threads; None leaves PyTorch's number. Denormal numbers are flushed to zero, and
    on a GPU float32 stays float32: by default PyTorch lets convolutions round to TF32.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def autocast_to(precision: Precision,
                device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which convolutions and matrix products run in `precision`.

    bfloat16 uses PyTorch's autocast; float32 changes nothing.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
