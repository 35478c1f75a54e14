"""The stored things that a pass has read; they do not change while it holds the stream's lease."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from partialhn.checkpoints.model import Model
from partialhn.run import TrunkAndHead
from partialhn.training import lineage
from partialhn.training.slots import Slot
from pipelines.platform.storage import Storage
from pipelines.retrain.journal import Decided
from pipelines.retrain.validate import HashArray, read_hashes

READERS = 16
"""Small files that are read from the storage at once."""


@dataclasses.dataclass
class Seen:
    """What one pass has read."""

    learned: dict[str, lineage.Learned] = dataclasses.field(default_factory=dict)
    """The records of learned tasks, by lineage id."""
    slots: dict[str, Slot] = dataclasses.field(default_factory=dict)
    """The slots of decided tasks with their stored features, by lineage id."""
    hashes: dict[str, HashArray] = dataclasses.field(default_factory=dict)
    """Hashes of the images of tasks, by the fingerprint of the task's data."""
    chapters: set[str] = dataclasses.field(default_factory=set)
    """The chapters that are stored and hold what their files hold, by their last lineage id."""
    cut: TrunkAndHead | None = None
    model: tuple[str, Model, int] | None = None
    """The model that was loaded last: its lineage id, itself, and the bytes of its files."""


def hashes_of(storage: Storage, stream: str, base: Sequence[Decided],
              seen: Seen) -> dict[str, HashArray]:
    """Hashes of the images of a model's tasks, by slot. seen: gets what is read."""
    tasks = [task for task in base if task.fingerprint]
    new = [task.fingerprint for task in tasks if task.fingerprint not in seen.hashes]
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda fingerprint: read_hashes(
            storage, storage.path(hashes_path(stream, fingerprint))), new)
        seen.hashes |= dict(zip(new, found, strict=True))
    return {task.slot: seen.hashes[task.fingerprint] for task in tasks}


def hashes_path(stream: str, fingerprint: str) -> str:
    """Path of the hashes of a task's images, below the storage's root."""
    return f"streams/{stream}/images/{fingerprint[:32]}.parquet"
