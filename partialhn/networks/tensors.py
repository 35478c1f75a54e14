"""Functions on dictionaries of named tensors."""

import hashlib

import torch
from torch import Tensor


def hash_tensors(tensors: dict[str, Tensor], prefix: str = "") -> str:
    """SHA-256 in hexadecimal over `prefix` and the names, types, shapes and bytes of all tensors.

    Tensors count in the order of their names.
    """
    digest = hashlib.sha256(prefix.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`; the new names leave it out."""
    return {key.removeprefix(prefix): value for key, value in tensors.items()
            if key.startswith(prefix)}
