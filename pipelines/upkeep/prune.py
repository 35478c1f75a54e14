"""`partialhn features prune`: deletes features that nothing needs any more.

The manifest goes first, then the shards' records, then the shards: a reader or a writer finds
nothing rather than a broken set, wherever a prune was killed; the next one takes the rest.
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
"""A set without a manifest is left alone while its newest file is younger."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)(min|h|d|w)")
_UNITS = {"w": 7 * 86400.0, "d": 86400.0, "h": 3600.0, "min": 60.0}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What lies under one key."""

    key: str
    entries: tuple[StoredFile, ...]
    age: float
    """Seconds since the manifest was written; of an unfinished set, since its newest file was."""
    finished: bool

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)


def stored(storage: Storage) -> Iterator[Stored]:
    """Every key, finished or not, in order."""
    keys = storage.folders(storage.path("features"))
    now = storage.now() if keys else 0.0
    for key in keys:
        entries = tuple(storage.list(storage.path("features", key)))
        manifest = [entry for entry in entries if entry.path.endswith("/manifest.json")]
        newest = max((entry.modified for entry in manifest or entries), default=0.0)
        yield Stored(key, entries, max(0.0, now - newest), bool(manifest))


def prunable(sets: Iterable[Stored], needed: References, older_than: float) -> list[Stored]:
    """What nothing refers to and is old enough; a day at least where it is not finished."""
    return [each for each in sets if each.key not in needed
            and each.age >= (older_than if each.finished else max(older_than, UNFINISHED_SECONDS))]


def delete(storage: Storage, sets: Iterable[Stored]) -> Iterator[tuple[Stored, list[str]]]:
    """Deletes each set and yields it with an empty list, or with the jobs that now use it.

    Raises: InputError where another prune is under way.
    """
    sets = list(sets)
    with InUse(storage, "features prune", prunes=True) as mine:
        mine.add(each.key for each in sets)
        used = running(storage)  # a job that is not seen here waits until we have ended
        for each in sets:
            if each.key not in used:
                _delete(storage, each)
            yield each, used.get(each.key, [])
        clear(storage)


def _delete(storage: Storage, each: Stored) -> None:
    def order(path: str) -> int:
        name = path.rpartition("/")[2]
        return 0 if name == "manifest.json" else 1 if name.endswith(".json") else 2

    for path in sorted((entry.path for entry in each.entries), key=order):
        storage.delete(path)
    storage.delete(storage.path("features", each.key))


def parse_age(text: str) -> float:
    """30d, 12h, 2w, 90min as seconds. Raises: InputError."""
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise InputError(f"older_than is {text!r}; allowed: a number with min, h, d or w, such as "
                         "30d")
    return float(match[1]) * _UNITS[match[2]]


def age_text(seconds: float) -> str:
    """The largest unit that gives one or more: 3d, 5h, 12min."""
    unit = next((unit for unit in ("d", "h") if seconds >= _UNITS[unit]), "min")
    return f"{int(seconds // _UNITS[unit])}{unit}"
