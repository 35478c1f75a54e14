"""Whether a version's files are those that were registered, and their repair.

A version's files may break long after its registration: a disk fills, a copy is cut short, a rule
of the bucket deletes. The models after each task lie in the storage as well, so that damaged files
are written again from there. Only files with the registered SHA-256 are ever written.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from partialhn.checkpoints import shared
from partialhn.errors import IntegrityError
from partialhn.training import lineage
from pipelines.platform.storage import Storage
from pipelines.registry import package
from pipelines.registry.client import Registry
from pipelines.registry.versions import FILES, Version


def repair(registry: Registry, storage: Storage, version: Version) -> list[str]:
    """Writes the damaged files of a version again; returns a line for each of them.

    Nothing is written unless every damaged file can be. Raises: IntegrityError naming one that
    cannot, or if the version was registered without file hashes.
    """
    if FILES not in version.tags:
        raise IntegrityError(f"{version.uri} cannot be repaired: an older release registered it "
                             "without file hashes; allowed: partialhn models rollback")
    registered: Mapping[str, str] = json.loads(version.tags[FILES])
    with tempfile.TemporaryDirectory() as scratch:
        found = registry.stored_hashes(version, Path(scratch) / "version")
        damaged = [path for path, digest in registered.items() if found.get(path) != digest]
        sound = _by_digest(storage, version, Path(scratch) / "learned") if damaged else {}
        lost = [path for path in damaged if registered[path] not in sound]
        if lost:
            raise IntegrityError(
                f"{version.uri} (task {version.task!r}) cannot be repaired: {', '.join(lost)} is "
                "damaged and not stored anywhere else; to go back: partialhn models rollback "
                f"--name {version.stream}")
        for path in damaged:
            registry.write_file(version, path, sound[registered[path]])
        objects = _repair_objects(registry, storage, version)
        added = sorted(set(found) - set(registered))
        for path in added:
            registry.delete_file(version, path)
    return ([f"{version.uri}: {path} was written again" for path in [*damaged, *objects]]
            + [f"{version.uri}: {path}, which was added later, was deleted" for path in added])


def _repair_objects(registry: Registry, storage: Storage, version: Version) -> list[str]:
    """Writes the damaged ones of a version's shared objects again; returns their names.

    Raises: IntegrityError naming one that is damaged in both places.
    """
    place = registry.shared_place(version)
    if place is None:
        return []
    fields = registry.fields(version)
    stored = shared.reader(storage.filesystem, place)
    learned = shared.reader(storage.filesystem, storage.path("runs", version.stream, "learned"))
    written = []
    for sha256 in shared.parts_of(fields):
        with contextlib.suppress(IntegrityError):
            shared.checked(sha256, stored)
            continue
        path = f"{place}/{shared.OBJECTS}/{sha256}.safetensors"
        shared.checked(sha256, learned)  # before anything is deleted
        storage.delete(path)
        shared.copy_object(sha256, learned, storage.filesystem, place)
        written.append(path.rpartition("/")[2])
    return written


def _by_digest(storage: Storage, version: Version, folder: Path) -> dict[str, bytes]:
    """Contents of the files that a version was made of, as far as they are stored, by SHA-256."""
    contents = [Path(package.__file__).with_name("pyfunc_model.py").read_bytes()]
    models = storage.path("runs", version.stream, "learned")
    try:
        lineage.fetch_model(storage.filesystem, models, version.tags["prefix"], folder)
        contents += [file.read_bytes() for file in folder.iterdir()]
    except IntegrityError:  # it is gone as well; then `repair` names the files
        pass
    sample = storage.path("streams", version.stream, "samples",
                          f"{version.tags['prefix']}.parquet")
    if storage.stat(sample) is not None:
        contents.append(storage.read_bytes(sample))
    return {hashlib.sha256(content).hexdigest(): content for content in contents}
