"""Files of weights, as others write them: opened without running code, as a flat table of tensors.

Two forms are known: safetensors, and what `torch.save` writes (zip, or the older form), which is
read by PyTorch's restricted reader (`weights_only`). The content decides, not the file's name.
"""

import argparse
import contextlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from partialhn.errors import InputError

NAMES_IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin")
"""Files that a folder from a model hub holds its weights in; the first one found counts."""
_TORCH_ZIP, _TORCH_OLD = b"PK\x03\x04", b"\x80"


def weights_path(source: str) -> Path | None:
    """The file of weights that a path names: the file itself, or one inside the folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        return next((path / name for name in NAMES_IN_A_FOLDER if (path / name).is_file()), None)
    return path if path.is_file() else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; names inside nested tables are joined with points.

    Numbers, texts and other values beside the tensors are passed over.

    Raises: InputError for a file that is damaged, holds no tensors, or would have to run code.
    """
    with path.open("rb") as file:
        begin = file.read(64)
    if begin.startswith((_TORCH_ZIP, _TORCH_OLD)):
        tensors = dict(_flat(_torch_table(path), ""))
    elif begin[8:9] == b"{":  # eight bytes of length, then JSON
        tensors = _safetensors(path)
    else:
        raise InputError(f"trunk file {str(path)!r} is no file of weights: it begins with "
                         f"{begin[:24]!r}{_hint(begin)}; allowed: safetensors, or a PyTorch "
                         "checkpoint that torch.save wrote")
    if not tensors:
        raise InputError(f"trunk file {str(path)!r} holds no tensors; allowed: the weights of a "
                         "network, as torch.save(network.state_dict(), FILE) writes them")
    return tensors


def metadata_of(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file that has been read; none of another file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:  # safetensors raises its own bare exception type: it is a checkpoint
        return {}


def _hint(begin: bytes) -> str:
    if begin.startswith(b"version https://git-lfs"):
        return " (a pointer of Git LFS; `git lfs pull` fetches the file itself)"
    if begin.lstrip()[:1] == b"<":
        return " (a web page; the download gave something else than the file)"
    return ""


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own bare exception type
        raise InputError(f"trunk file {str(path)!r} cannot be read as safetensors: {error}"
                         ) from error


def _torch_table(path: Path) -> object:
    """The tables in a PyTorch checkpoint. `argparse.Namespace`, which training scripts put beside
    the weights, is a plain record and allowed too.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), \
                warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise almost anything
        objects = _objects_in(path)
        if objects:
            raise InputError(f"trunk file {str(path)!r} holds objects of Python ({objects}) and "
                             "not tensors alone; it is not opened, because that would run code "
                             "from the file; allowed: a file of torch.save(network.state_dict(), "
                             "FILE), or safetensors") from error
        if _is_program(path):
            raise InputError(f"trunk file {str(path)!r} is a program of torch.export or torch.jit; "
                             "allowed: a file of torch.save(network.state_dict(), FILE), or "
                             "safetensors") from error
        raise InputError(f"trunk file {str(path)!r} cannot be read as a PyTorch checkpoint: "
                         f"{str(error).splitlines()[0] if str(error) else error!r}") from error


def _is_program(path: Path) -> bool:
    """Whether a file holds a network's code beside its weights, as .pt2 and TorchScript do."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        return any(name.endswith(("/archive_format", "/constants.pkl"))
                   for name in file.namelist())
    return False


def _objects_in(path: Path) -> str:
    """Names of the first objects of a checkpoint that only running code could rebuild."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # the same damage again; the first message stands
        return ""
    return ", ".join(sorted(set(objects) - {"argparse.Namespace"})[:3])


def _flat(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
