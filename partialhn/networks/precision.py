"""How a process calculates."""

import contextlib

import torch

from partialhn.config import Precision


def configure_torch(threads: int | None = None) -> None:
    """From now on: threads (as many as there are, by default), no denormal numbers, and a GPU's
    float32 is float32: PyTorch alone would let its convolutions round to TF32.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def autocast_to(precision: Precision,
                     device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it convolutions and what follows them are bfloat16's, where that is the precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
