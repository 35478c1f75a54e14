"""Models that share tensors: each stores what is new and names the rest by its content.

    <models>/<model>/model.json           the fields; `parts` names the files of the tensors
    <models>/objects/<sha256>.safetensors  tensors that one or more models share

A model of many tasks differs from the model before it in little: the tensors of one task, and a few
that every task changes. Those become two new files, and the model names all files that together
hold its tensors. Of a tensor that several files hold, the last one counts. `complete` puts the
files together to a checkpoint folder as `partialhn.checkpoints.checkpoint` writes it.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from partialhn.checkpoints import FIELDS, TENSORS, checkpoint
from partialhn.checkpoints.checkpoint import write_whole
from partialhn.errors import IntegrityError
from partialhn.json_files import read_object
from partialhn.networks.tensors import hash_tensors

OBJECTS, PARTS = "objects", "parts"
MOST_PARTS = 64
"""Small parts of a model after which they are merged into one."""
READERS = 16
"""Parts that are read at once."""
Part = dict[str, Any]
"""Entry of `parts`: sha256 and bytes of an object, and how many parts were merged into it."""
Read = Callable[[str], bytes]
"""Content of an object by its SHA-256. Raises: FileNotFoundError."""
ORIGIN = "partialhn_origin"
"""Attribute of a tensor that was loaded: its object's SHA-256 and its name there."""
_NAMES: dict[str, frozenset[str]] = {}
"""Names of the tensors of the objects that this process has seen, by the object's SHA-256."""
_DIGESTS: dict[str, dict[str, str]] = {}
"""Hashes of those of their tensors that this process has compared with others, likewise."""


def upload(tensors: dict[str, Tensor], fields: dict[str, Any], filesystem: pafs.FileSystem,
           models: str, model: str, before: str) -> int:
    """Stores a model that shares what it can; returns the bytes that it needs, shared ones too.

    fields: as in the fields of a checkpoint. models: folder of all models. before: the model that
    it was learned from; empty for none.
    """
    read = reader(filesystem, models)
    known = _parts_of(filesystem, models, before) if before else []
    held: dict[str, str] = {}
    for part in known:
        held |= {name: str(part["sha256"]) for name in _names(part["sha256"], read)}
    if any(name not in tensors for name in held):
        known, held = [], {}  # another shape of model: nothing is shared
    new = {name: value for name, value in tensors.items() if name not in held}
    comparison = _Comparison(read)
    changed = {name: value for name, value in tensors.items()
               if name in held and not comparison.is_stored(name, value, held[name])}
    parts = _needed(known, set(changed), read) + [
        _store(filesystem, models, chosen) for chosen in (new, changed) if chosen]
    parts = _merged(parts, filesystem, models, read)
    content = json.dumps(fields | {PARTS: parts}).encode()
    write_whole(filesystem, f"{models}/{model}/{FIELDS}", content)
    return len(content) + sum(int(part["bytes"]) for part in parts)


def complete(folder: Path, read: Read) -> None:
    """Writes the tensors file of a local copy of a model that shares its tensors.

    Raises: IntegrityError for a part that is missing or damaged.
    """
    fields = read_object(folder / FIELDS, f"checkpoint {folder}")
    parts = fields.get(PARTS)
    if parts is None or (folder / TENSORS).exists():
        return
    tensors = tensors_of(fields, read)
    draft = folder / f".{TENSORS}"
    save_file(tensors, draft)
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()
    if digest != fields.get("tensors_sha256"):
        text = json.dumps(fields | {"tensors_sha256": digest}, indent=1)
        (folder / FIELDS).write_text(text, encoding="utf-8")
    draft.replace(folder / TENSORS)


def tensors_of(fields: dict[str, Any], read: Read) -> dict[str, Tensor]:
    """The tensors of a model that shares them.

    Raises: IntegrityError for a part that is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda part: _load(str(part["sha256"]), read), fields[PARTS]):
            tensors |= found
    return tensors


def parts_of(fields: dict[str, Any]) -> list[str]:
    """The objects that a model needs; none for one that holds its tensors itself."""
    return [str(part["sha256"]) for part in fields.get(PARTS, [])]


def reader(filesystem: pafs.FileSystem, models: str) -> Read:
    """Reads the objects beside the models of a folder."""
    def read(sha256: str) -> bytes:
        with filesystem.open_input_file(f"{models}/{OBJECTS}/{sha256}.safetensors") as source:
            return bytes(source.readall())
    return read


def copy_object(sha256: str, read: Read, filesystem: pafs.FileSystem, models: str) -> None:
    """Copies an object to the models of another folder, unless it is there.

    Raises: IntegrityError for a damaged object.
    """
    path = f"{models}/{OBJECTS}/{sha256}.safetensors"
    if filesystem.get_file_info([path])[0].type == pafs.FileType.NotFound:
        write_whole(filesystem, path, checked(sha256, read))


def copy_objects(parts: Sequence[str], read: Read, filesystem: pafs.FileSystem,
                 models: str) -> None:
    """The same for many objects, several at once."""
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda sha256: copy_object(sha256, read, filesystem, models), parts):
            pass


def checked(sha256: str, read: Read) -> bytes:
    """Content of an object. Raises: IntegrityError if it is missing or damaged."""
    try:
        content = read(sha256)
    except FileNotFoundError as error:
        raise IntegrityError(f"the shared tensors {sha256[:12]}... are missing: {error}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise IntegrityError(f"the shared tensors {sha256[:12]}... are damaged")
    return content


def added_bytes(filesystem: pafs.FileSystem, models: str, model: str, before: str) -> int:
    """Bytes that storing a model has added to those of the model before it."""
    stored = filesystem.get_file_info(pafs.FileSelector(f"{models}/{model}"))
    known = {part["sha256"] for part in _parts_of(filesystem, models, before)} if before else set()
    new = [int(part["bytes"]) for part in _parts_of(filesystem, models, model)
           if part["sha256"] not in known]
    return sum(new) + sum(int(info.size) for info in stored)


def _load(sha256: str, read: Read) -> dict[str, Tensor]:
    content = checked(sha256, read)
    try:
        tensors = load(content)
        for name, value in tensors.items():
            setattr(value, ORIGIN, (sha256, name))
        _NAMES[sha256] = frozenset(tensors)
        return tensors
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"the shared tensors {sha256[:12]}... cannot be read: {error}"
                             ) from error


def _names(sha256: str, read: Read) -> frozenset[str]:
    """Names of the tensors of an object."""
    if sha256 not in _NAMES:
        _load(sha256, read)
    return _NAMES[sha256]


class _Comparison:
    """Compares tensors with those of objects, of which it reads as few as it can."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._loaded: dict[str, dict[str, Tensor]] = {}

    def is_stored(self, name: str, value: Tensor, sha256: str) -> bool:
        """Whether an object holds this very tensor. One that was loaded from it and not written to
        since need not be hashed.
        """
        if getattr(value, ORIGIN, None) == (sha256, name) and value._version == 0:
            return True
        digests = _DIGESTS.setdefault(sha256, {})
        if name not in digests:
            if sha256 not in self._loaded:
                self._loaded[sha256] = _load(sha256, self._read)
            digests[name] = hash_tensors({name: self._loaded[sha256][name]})
        return digests[name] == hash_tensors({name: value})


def _parts_of(filesystem: pafs.FileSystem, models: str, model: str) -> list[Part]:
    """The parts of a stored model; none where it holds its tensors itself, or is not stored."""
    with contextlib.suppress(FileNotFoundError), filesystem.open_input_file(
            f"{models}/{model}/{FIELDS}") as source:
        return list(json.loads(source.readall()).get(PARTS, []))
    return []


def _needed(parts: Sequence[Part], changed: set[str], read: Read) -> list[Part]:
    """The parts that hold at least one tensor that no later part and no change replaces."""
    needed: list[Part] = []
    replaced = set(changed)
    for part in reversed(parts):
        names = _names(part["sha256"], read)
        if not names <= replaced:
            needed.append(part)
        replaced |= names
    return needed[::-1]


def _merged(parts: list[Part], filesystem: pafs.FileSystem, models: str, read: Read) -> list[Part]:
    """The same tensors in fewer parts, where many small ones have come together."""
    small = [place for place, part in enumerate(parts) if part["merged"] == 1]
    if len(small) <= MOST_PARTS:
        return parts
    first, last = small[0] + 1, small[-1]  # the first part holds the trunk, the last what changes
    tensors: dict[str, Tensor] = {}
    for part in parts[first:last]:
        if part["merged"] == 1:
            tensors |= _load(part["sha256"], read)
    pack = _store(filesystem, models, tensors) | {"merged": last - first}
    return [*parts[:first], *[part for part in parts[first:last] if part["merged"] > 1], pack,
            *parts[last:]]


def _store(filesystem: pafs.FileSystem, models: str, tensors: dict[str, Tensor]) -> Part:
    content = save({name: value.detach().cpu().contiguous().clone()
                    for name, value in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    _DIGESTS[sha256] = {name: hash_tensors({name: value}) for name, value in tensors.items()}
    _NAMES[sha256] = frozenset(tensors)
    copy_object(sha256, lambda _: content, filesystem, models)
    return {"sha256": sha256, "bytes": len(content), "merged": 1}


def stored_bytes(folder: Path) -> int:
    """Bytes of a complete local copy of a model: those of its stored files, shared ones too."""
    parts = read_object(folder / FIELDS, f"checkpoint {folder}").get(PARTS)
    if parts is None:
        return sum(file.stat().st_size for file in folder.iterdir())
    return (folder / FIELDS).stat().st_size + sum(int(part["bytes"]) for part in parts)


def copy_model(source: Path, model: str, filesystem: pafs.FileSystem, models: str) -> None:
    """Copies a model, with the objects that it needs, from a local folder of models to another."""
    fields = read_object(source / model / FIELDS, f"checkpoint {source / model}")
    if PARTS not in fields:
        checkpoint.upload(source / model, filesystem, f"{models}/{model}")
        return
    read = reader(pafs.LocalFileSystem(), str(source))
    copy_objects(parts_of(fields), read, filesystem, models)
    write_whole(filesystem, f"{models}/{model}/{FIELDS}", (source / model / FIELDS).read_bytes())
