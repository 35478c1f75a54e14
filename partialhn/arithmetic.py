"""How a process calculates."""

import contextlib

import torch

from partialhn.config import Precision


def set_arithmetic(threads: int | None = None, precision: Precision = "float32") -> None:
    """From now on: threads (as many as there are, by default), no denormal numbers, and whether a
    GPU's float32 products may round to TF32. PyTorch alone would let its convolutions do that.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    allowed = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = allowed
    torch.backends.cudnn.conv.fp32_precision = allowed  # type: ignore[attr-defined]


def short_arithmetic(precision: Precision,
                     device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it convolutions and what follows them are bfloat16's, where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
