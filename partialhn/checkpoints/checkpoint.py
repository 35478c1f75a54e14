"""The checkpoint folder: safetensors and JSON, written completely or not at all, read strictly.

    model.safetensors   every tensor by name
    model.json          the fields, and the SHA-256 of the tensors file; written last

Nothing is pickled, so loading a checkpoint cannot run code.
"""

import contextlib
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from partialhn.checkpoints import FIELDS, TENSORS
from partialhn.errors import IntegrityError
from partialhn.folders import content_of
from partialhn.json_files import parse_object, read_object

FORMAT = 1


def save(folder: Path, kind: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Writes a checkpoint folder; replaces an older one of the same name."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
              draft / TENSORS)
    digest = hashlib.sha256((draft / TENSORS).read_bytes()).hexdigest()
    head = {"format": FORMAT, "kind": kind, "tensors_sha256": digest}
    (draft / FIELDS).write_text(json.dumps(head | fields, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    draft.replace(folder)


def upload(folder: Path, filesystem: pafs.FileSystem, target: str) -> None:
    """Copies a checkpoint folder to any filesystem; the fields last, since they make it complete.

    Other fields are deleted first, so that an interrupted copy never mixes old and new. The same
    files stay: another process that stores them may be reading them.
    """
    contents = {name: (folder / name).read_bytes() for name in (TENSORS, FIELDS)}
    with contextlib.suppress(OSError):  # what cannot be read is written
        if all(content_of(filesystem, f"{target}/{name}") == contents[name]
               for name in (FIELDS, TENSORS)):
            return
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{target}/{FIELDS}")
    for name, content in contents.items():
        write_whole(filesystem, f"{target}/{name}", content)


def write_whole(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Writes a file, which nobody sees before it is complete; makes its folder. Several processes
    may write the same one at once.
    """
    local = isinstance(filesystem, pafs.LocalFileSystem)
    if local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    # S3 shows only complete objects
    draft = f"{path}.{uuid.uuid4().hex}.draft" if local else path
    with filesystem.open_output_stream(draft) as sink:
        sink.write(content)
    if local:
        filesystem.move(draft, path)


def fetch(filesystem: pafs.FileSystem, source: str, folder: Path, *,
          fields_alone: bool = False) -> bool:
    """Copies a checkpoint folder from any filesystem; returns False if there is no complete one.

    fields_alone: without the tensors file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FIELDS,) if fields_alone else (FIELDS, TENSORS):
        content = content_of(filesystem, f"{source}/{name}")
        if content is None:
            return False
        (folder / name).write_bytes(content)
    return True


def read_fields(filesystem: pafs.FileSystem, source: str) -> dict[str, Any] | None:
    """The fields of a checkpoint folder on any filesystem; None if there is no checkpoint.

    Raises: IntegrityError for fields that cannot be read.
    """
    content = content_of(filesystem, f"{source}/{FIELDS}")
    return None if content is None else parse_object(content, f"checkpoint {source}")


def load(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint folder; returns its tensors by name, and its fields.

    Raises: IntegrityError if a file is missing, damaged, or of another kind or format.
    """
    fields = read_object(folder / FIELDS, f"checkpoint {folder}")
    try:
        digest = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    except OSError as error:
        raise IntegrityError(f"checkpoint {folder} cannot be read: {error}") from error
    if fields.get("format") != FORMAT or fields.get("kind") != kind:
        raise IntegrityError(f"checkpoint {folder} is of kind {fields.get('kind')!r} in format "
                             f"{fields.get('format')!r}; expected {kind!r} in {FORMAT}")
    expected = str(fields.get("tensors_sha256"))
    if digest != expected:
        raise IntegrityError(f"checkpoint {folder} is damaged: {TENSORS} has sha256 "
                             f"{digest[:12]}..., expected tensors_sha256 {expected[:12]}...")
    try:
        return load_file(folder / TENSORS), fields
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"checkpoint {folder} is damaged: {TENSORS} is no safetensors file: "
                             f"{error}") from error
