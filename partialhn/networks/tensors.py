"""Dictionaries of named tensors: their hash, and a part of one."""

import hashlib

import torch
from torch import Tensor


def hash_tensors(tensors: dict[str, Tensor], prefix: str = "") -> str:
    """SHA-256 over names, types, shapes and bytes, in order of the names."""
    digest = hashlib.sha256(prefix.encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, named without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items()
            if key.startswith(prefix)}
