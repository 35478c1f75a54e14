"""`partialhn features prune`: deletes features that are no longer needed.

It deletes the manifest first, then the shards' records, then the shards. So if a prune is killed,
readers and writers see an unfinished set and never a broken one; the next prune deletes the rest.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from partialhn.errors import InputError
from pipelines.features.in_use import InUse, clear
from pipelines.platform.local_files import StoredFile
from pipelines.platform.storage import Storage
from pipelines.upkeep.references import References, running

UNFINISHED_SECONDS = 24 * 3600.0
"""A set without a manifest is kept until its newest file is so many seconds old."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)(min|h|d|w)")
_UNITS = {"w": 7 * 86400.0, "d": 86400.0, "h": 3600.0, "min": 60.0}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The stored files of one key."""

    key: str
    files: tuple[StoredFile, ...]
    age: float
    """Seconds since the manifest was written or, if unfinished, since the newest file was."""
    finished: bool

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def stored(storage: Storage) -> Iterator[Stored]:
    """Every key, finished or not, in order."""
    keys = storage.folders(storage.path("features"))
    now = storage.now() if keys else 0.0
    for key in keys:
        files = tuple(storage.list(storage.path("features", key)))
        manifest = [file for file in files if file.path.endswith("/manifest.json")]
        newest = max((file.modified for file in manifest or files), default=0.0)
        yield Stored(key, files, max(0.0, now - newest), bool(manifest))


def prunable(sets: Iterable[Stored], needed: References, older_than: float) -> list[Stored]:
    """The sets that nothing refers to and that are old enough; unfinished ones at least a day."""
    def least_age(features: Stored) -> float:
        return older_than if features.finished else max(older_than, UNFINISHED_SECONDS)

    return [features for features in sets
            if features.key not in needed and features.age >= least_age(features)]


def delete(storage: Storage, sets: Iterable[Stored]) -> Iterator[tuple[Stored, list[str]]]:
    """Deletes each set unless a running job uses it; yields the set and the jobs that use it.

    Raises: InputError if another prune is running.
    """
    sets = list(sets)
    with InUse(storage, "features prune", prunes=True) as record:
        record.add(features.key for features in sets)
        used = running(storage)  # a job that starts after this waits until the prune has ended
        for features in sets:
            if features.key not in used:
                _delete(storage, features)
            yield features, used.get(features.key, [])
        clear(storage)


def _delete(storage: Storage, features: Stored) -> None:
    def order(path: str) -> int:
        name = path.rpartition("/")[2]
        return 0 if name == "manifest.json" else 1 if name.endswith(".json") else 2

    for path in sorted((file.path for file in features.files), key=order):
        storage.delete(path)
    storage.delete(storage.path("features", features.key))


def parse_age(text: str) -> float:
    """Seconds of an age such as 30d, 12h, 2w or 90min. Raises: InputError for another form."""
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise InputError(f"older_than is {text!r}; allowed: a number with min, h, d or w, such as "
                         "30d")
    return float(match[1]) * _UNITS[match[2]]


def age_text(seconds: float) -> str:
    """An age in its largest unit, for example 3d, 5h or 12min."""
    unit = next((unit for unit in ("d", "h") if seconds >= _UNITS[unit]), "min")
    return f"{int(seconds // _UNITS[unit])}{unit}"
