"""Recording live traffic: a limited sample of each task's pooled trunk features.

    <root>/live/<stream>/<trunk>/<writer>.parquet     task, seen, z, id

The id names the image, where it seems to belong to no known task. For each task a reservoir holds
at most CAPACITY rows; every image predicted so far is in it with the same probability (Vitter 1985,
algorithm R). No image is stored. A writer replaces its own file; only the newest KEEP files of a
trunk are kept.

Legend: B images, C channels of pooled features.
"""

import dataclasses
import io
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from partialhn.errors import IntegrityError
from partialhn.folders import folder_entries
from partialhn.predict import Answer
from partialhn.task_inference import NONE, pooled
from pipelines.platform.storage import Storage

CAPACITY = 512
"""Largest number of rows of a task in one writer's file."""
MAX_TASKS = 4096
"""Largest number of tasks in one writer's file."""
KEEP = 32
"""Number of files of a trunk that are kept."""
NEW_TASK_SHARE = 0.2
"""A share of images of no known task above this means that a new task seems to be here: four times
the share that the detector rejects by default where all images are of known tasks."""
FEWEST = 30
"""Smallest number of live images for a test, and of strange ones for a new task."""
EXAMPLES = 5
"""Number of ids of images of no known task that are listed."""
FLUSH_SECONDS = 60.0
MAX_FILE_BYTES = 1 << 30


@dataclasses.dataclass
class _Reservoir:
    """A random sample of all rows seen, each with the same probability."""

    seen: int = 0
    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)

    def add(self, z_C: np.ndarray, image: str, rng: np.random.Generator) -> None:
        self.seen += 1
        if len(self.rows) < CAPACITY:
            self.rows.append(z_C)
            self.ids.append(image)
        elif (index := int(rng.integers(self.seen))) < CAPACITY:
            self.rows[index], self.ids[index] = z_C, image


class FeatureRecorder:
    """Samples the features of predicted batches and writes them regularly. Thread-safe."""

    def __init__(self, storage: Storage, stream: str, seed: int | None = None,
                 flush_seconds: float = FLUSH_SECONDS) -> None:
        self.storage, self.stream = storage, stream
        self.writer = uuid.uuid4().hex[:16]
        self._rng = np.random.default_rng(seed)
        self._trunk = ""
        self._tasks: dict[str, _Reservoir] = {}
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        self._lock = threading.Lock()
        self._error = ""
        self._writing: threading.Thread | None = None

    def add(self, trunk: str, z_BCHW: torch.Tensor, answers: Sequence[Answer],
            name: Callable[[int], str] = lambda _: "") -> None:
        """Adds a batch; images that seemed to belong to no task are recorded as task `none`.

        name: gives the id of the image in a row; it is asked for images of no known task.
        """
        z_BC = pooled(z_BCHW).cpu().half().numpy()
        with self._lock:
            if trunk != self._trunk:  # features of different trunks cannot be compared
                self._trunk, self._tasks = trunk, {}
                self.writer = uuid.uuid4().hex[:16]
            for row, (z_C, answer) in enumerate(zip(z_BC, answers, strict=True)):
                task = NONE if answer.label is None else answer.task
                if task in self._tasks or len(self._tasks) < MAX_TASKS:
                    image = name(row) if task == NONE else ""
                    self._tasks.setdefault(task, _Reservoir()).add(z_C, image, self._rng)
        idle = self._writing is None or not self._writing.is_alive()
        if time.monotonic() - self._flushed > self._flush_seconds and idle:
            self._flushed = time.monotonic()
            self._writing = threading.Thread(target=self._try_flush, daemon=True)
            self._writing.start()

    def close(self) -> None:
        """Writes the sample for the last time."""
        if self._writing is not None:
            self._writing.join()
        self._try_flush()

    def state(self) -> dict[str, Any]:
        """The state for /healthz: number of rows by task, the last error of writing, share and
        example ids of the images of no known task, and whether a new task seems to be here.
        """
        with self._lock:
            rows = {task: len(reservoir.rows) for task, reservoir in self._tasks.items()}
            strange = self._tasks.get(NONE, _Reservoir())
            asked = sum(reservoir.seen for reservoir in self._tasks.values())
            share, examples = strange.seen / max(1, asked), strange.ids[-EXAMPLES:]
        return {"rows": rows, "error": self._error or None, "unknown_share": round(share, 4),
                "unknown_examples": examples, "new_task": seems_new(strange.seen, share)}

    def flush(self) -> str | None:
        """Writes the sample; returns its path, or None if it is empty."""
        with self._lock:
            if not self._tasks:
                return None
            path = self.storage.path("live", self.stream, self._trunk[:32],
                                     f"{self.writer}.parquet")
            table = _table(self._tasks)
        _write(self.storage, path, table)
        _drop_old(self.storage, path.rpartition("/")[0])
        return path

    def _try_flush(self) -> None:
        """Writes the sample; an error (a full disk) only shows in `state`."""
        try:
            self.flush()
            self._error = ""
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"


@dataclasses.dataclass(frozen=True, eq=False)
class Live:
    """The recorded sample of one task."""

    z_BC: np.ndarray
    """Pooled features, float32."""
    seen: int
    """Number of images predicted, from which the sample was drawn."""
    ids: tuple[str, ...] = ()
    """Ids of images of no known task, the newest last."""


def seems_new(strange: int, share: float, limit: float = NEW_TASK_SHARE) -> bool:
    """Whether so many images are strange that a new task seems to be here."""
    return strange >= FEWEST and share > limit


def read_live(storage: Storage, stream: str, trunk: str, hours: float) -> dict[str, Live]:
    """The recorded samples of a trunk in the last hours, by task; joins those of all writers.

    Raises: IntegrityError naming a file that cannot be read.
    """
    by_task: dict[str, list[Live]] = {}
    for info in _files(storage, storage.path("live", stream, trunk[:32])):
        if info.mtime_ns < (time.time() - 3600 * hours) * 1e9:
            continue
        for task, live in _read(storage, info).items():
            by_task.setdefault(task, []).append(live)
    return {task: _join(samples) for task, samples in by_task.items()}


def _join(samples: Sequence[Live]) -> Live:
    """One sample of all images: each writer gives rows in proportion to the images it has seen."""
    total = sum(live.seen for live in samples)
    size = min(min(len(live.z_BC) * total / live.seen for live in samples),
               len(samples) * CAPACITY)
    rng = np.random.default_rng(0)
    kept = [live.z_BC[rng.permutation(len(live.z_BC))[:max(1, round(size * live.seen / total))]]
            for live in samples]
    return Live(np.concatenate(kept), total, tuple(image for live in samples for image in live.ids))


def _table(tasks: dict[str, _Reservoir]) -> pa.Table:
    rows = np.concatenate([np.stack(reservoir.rows) for reservoir in tasks.values()])
    sizes = [len(reservoir.rows) for reservoir in tasks.values()]
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    return pa.table({
        "task": pa.array(np.repeat(list(tasks), sizes)),
        "seen": pa.array(np.repeat([reservoir.seen for reservoir in tasks.values()], sizes)),
        "z": values,
        "id": pa.array([image for reservoir in tasks.values() for image in reservoir.ids])})


def _write(storage: Storage, path: str, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    if storage.is_local:  # readers see either the old file or the new one
        draft = Path(path).with_name(f".{uuid.uuid4().hex}.tmp")
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(sink.getvalue())
        draft.replace(path)
        return
    with storage.filesystem.open_output_stream(path) as stream:
        stream.write(sink.getvalue())


def _files(storage: Storage, folder: str) -> list[Any]:
    return [info for info in folder_entries(storage.filesystem, folder)
            if info.extension == "parquet"]


def _drop_old(storage: Storage, folder: str) -> None:
    newest_first = sorted(_files(storage, folder), key=lambda info: -info.mtime_ns)
    for info in newest_first[KEEP:]:
        storage.filesystem.delete_file(info.path)


def _check_size(metadata: Any, path: str) -> None:
    """Raises IntegrityError for a file whose content would be too large in memory."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if metadata.num_rows > CAPACITY * MAX_TASKS or size > MAX_FILE_BYTES:
        raise IntegrityError(f"recorded features {path} hold {metadata.num_rows} rows of {size} "
                             f"bytes; expected at most {CAPACITY * MAX_TASKS} and "
                             f"{MAX_FILE_BYTES}")


def _read(storage: Storage, info: Any) -> dict[str, Live]:
    if info.size > MAX_FILE_BYTES:
        raise IntegrityError(f"recorded features {info.path} have {info.size} bytes; expected at "
                             f"most {MAX_FILE_BYTES}")
    try:
        with storage.filesystem.open_input_file(info.path) as source:
            file = pq.ParquetFile(source)
            _check_size(file.metadata, info.path)
            known = ["id"] * ("id" in file.schema_arrow.names)  # version 0.1.0 wrote none
            table = file.read(columns=["task", "seen", "z", *known])
        column = table["z"].combine_chunks()
        z_NC = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
        task_N, seen_N = np.array(table["task"].to_pylist()), table["seen"].to_numpy()
        id_N = np.array(table["id"].to_pylist() if known else [""] * len(table), dtype=str)
    except (pa.ArrowException, KeyError, ValueError, AttributeError) as error:
        raise IntegrityError(f"recorded features {info.path} cannot be read: {error}") from error
    if not np.isfinite(z_NC).all():
        raise IntegrityError(f"recorded features {info.path} hold values that are no numbers")
    return {str(task): Live(z_NC[task_N == task].astype(np.float32),
                            int(seen_N[task_N == task][0]),
                            tuple(filter(None, id_N[task_N == task].tolist())))
            for task in np.unique(task_N)}
