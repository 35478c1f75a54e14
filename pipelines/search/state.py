"""The stored state of a search: plain JSON, each file written once; nothing is ever unpickled.

    <root>/searches/<name>/search.json          the settings of the search; written first
    <root>/searches/<name>/round-1.json         depths that were added around the best one
    <root>/searches/<name>/started/<id>.json    a trial that was started, with its configuration
    <root>/searches/<name>/running/<id>/        its state after the last kept epoch (a checkpoint)
    <root>/searches/<name>/trials/<id>.json     its record; from then on it is never run again
    <root>/searches/<name>/lease/               the claim of the one process that works at it

A trial that was started and has no record was interrupted: it runs again under the same name, from
its last state.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from partialhn.errors import IntegrityError
from partialhn.folders import folder_entries
from partialhn.json_files import parse_object
from pipelines.platform.storage import Storage

FORMAT = 1
READERS = 16
Kind = Literal["search", "final", "bound"]
Status = Literal["finished", "pruned", "failed"]


@dataclasses.dataclass(frozen=True)
class TrialPlan:
    """A trial to run."""

    id: str
    kind: Kind
    """search: chosen by the sampler. final: the best of a depth under another seed. baseline: one
    separate head for each task, beside a final."""
    config: dict[str, Any]
    """The whole configuration."""
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The values chosen by the sampler, by dotted key."""

    @property
    def depth(self) -> int:
        """The freeze depth."""
        return int(self.config["backbone"]["freeze_depth"])

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.config["train"]["seed"])


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of a trial; accuracies are shares of 1."""

    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    """R[i, 0..i] on held-out (validation) images, for each task learned so far."""
    test_row: tuple[float, ...] | None
    """Accuracy on every task's test images at the end; final runs and baselines only."""
    train_seconds: float
    """Wall-clock time in training steps."""
    processor_seconds: float
    """Processor time of the trial's process in training steps."""
    evaluate_seconds: float
    epochs: int
    """Passes over a task's features, all tasks together."""
    feature_bytes: int
    """Stored features of all tasks that this trial reads."""
    feature_seconds: float
    """Time it took to compute them."""
    serving_macs: int
    """Multiply-adds of one answer, generating the head's weights included."""
    head_bytes: int
    """Weights of one task's head, as a server holds them."""
    checkpoint_bytes: int
    bytes_per_task: int
    """Bytes that each task adds to the checkpoint."""
    device: str
    right: tuple[str, ...] | None = None
    """For every task, which held-out images got the right class at the end: `pack_answers`. Final
    runs and baselines only; records of earlier versions lack it."""

    def answers(self, images_T: Sequence[int]) -> list[npt.NDArray[np.bool_]] | None:
        """`right` as one array for each task, of so many images; None where it was not kept."""
        if self.right is None:
            return None
        return [unpack_answers(text, count)
                for text, count in zip(self.right, images_T, strict=True)]

    @property
    def accuracy(self) -> float:
        """Mean held-out accuracy over the tasks learned so far."""
        return sum(self.rows[-1]) / len(self.rows[-1])

    @property
    def test_accuracy(self) -> float | None:
        """Mean accuracy on test images; None where it was not measured."""
        return None if self.test_row is None else sum(self.test_row) / len(self.test_row)

    @property
    def seconds(self) -> float:
        """Training time: processor time on a CPU, where trials disturb each other's wall-clock
        time, and wall-clock time on a GPU.
        """
        return self.processor_seconds if self.device == "cpu" else self.train_seconds


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """The record of a trial that ended."""

    plan: TrialPlan
    status: Status
    reason: str
    """Why it failed or was stopped; empty for a finished one."""
    measured: Measured | None
    """None where it failed before its first task."""
    search_seconds: float
    """Seconds of search time when it ended."""

    @property
    def finished(self) -> bool:
        """Whether it learned every task."""
        return self.status == "finished"

    def to_json(self) -> bytes:
        """The record's file."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1).encode()


def pack_answers(right_N: npt.NDArray[np.bool_]) -> str:
    """Right and wrong answers as text: 8 images in two hexadecimal digits."""
    return np.packbits(right_N).tobytes().hex()


def unpack_answers(text: str, images: int) -> npt.NDArray[np.bool_]:
    """The answers to so many images that `pack_answers` made into text."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=images).astype(np.bool_)


class SearchState:
    """The files of one search."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self.name = name
        self.folder = storage.path("searches", name)

    def create(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Writes search.json unless it exists; returns its content."""
        self._storage.put_if_absent(f"{self.folder}/search.json",
                                    json.dumps(dict(settings), indent=1).encode())
        stored = self.settings()
        assert stored is not None
        return stored

    def settings(self) -> dict[str, Any] | None:
        """The content of search.json; None when the search does not exist.

        Raises: IntegrityError where it cannot be read.
        """
        path = f"{self.folder}/search.json"
        try:
            settings = parse_object(self._storage.read_bytes(path), path)
        except FileNotFoundError:
            return None
        if settings.get("format") != FORMAT:
            raise IntegrityError(f"{path} has another format than {FORMAT}")
        return settings

    def keep(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The fields that `make` gave the first time, kept as JSON under this name."""
        kept = self.kept(name)
        if kept is None:
            path = f"{self.folder}/{name}.json"
            self._storage.put_if_absent(path, json.dumps(make(), indent=1).encode())
            return self._read(path)
        return kept

    def kept(self, name: str) -> dict[str, Any] | None:
        """The fields that are kept under this name; None where there are none."""
        path = f"{self.folder}/{name}.json"
        return self._read(path) if self._storage.exists(path) else None

    def start(self, plan: TrialPlan) -> None:
        """Keeps a trial's configuration before it runs."""
        self._storage.put_if_absent(f"{self.folder}/started/{plan.id}.json",
                                    json.dumps(dataclasses.asdict(plan), indent=1).encode())

    def finish(self, record: TrialRecord) -> TrialRecord:
        """Stores a trial's record once and deletes its running state; returns the stored record,
        which is another one where a session that lost its claim ended the trial as well.
        """
        path = f"{self.folder}/trials/{record.plan.id}.json"
        first = self._storage.put_if_absent(path, record.to_json())
        if self._storage.exists(self.running(record.plan.id)):
            self._storage.filesystem.delete_dir(self.running(record.plan.id))
        return record if first else parse_record(path, self._read(path))

    def running(self, trial: str) -> str:
        """Where a running trial keeps its state, as a path in the storage's filesystem."""
        return f"{self.folder}/running/{trial}"

    def records(self) -> list[TrialRecord]:
        """Every trial that ended, in order of ending. Raises: IntegrityError."""
        records = [parse_record(path, fields) for path, fields in self._read_all("trials")]
        return sorted(records, key=lambda record: (record.search_seconds, record.plan.id))

    def interrupted(self) -> list[TrialPlan]:
        """Trials that were started and have no record, in order. Raises: IntegrityError."""
        done = {record.plan.id for record in self.records()}
        plans = [parse_plan(path, fields) for path, fields in self._read_all("started")]
        return [plan for plan in sorted(plans, key=lambda plan: plan.id) if plan.id not in done]

    def _read_all(self, folder: str) -> list[tuple[str, Any]]:
        entries = folder_entries(self._storage.filesystem, f"{self.folder}/{folder}")
        paths = [info.path for info in entries
                 if info.path.endswith(".json") and not info.base_name.startswith(".")]
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            return list(zip(paths, pool.map(self._read, paths), strict=True))

    def _read(self, path: str) -> dict[str, Any]:
        return parse_object(self._storage.read_bytes(path), path)


def parse_plan(where: str, fields: Mapping[str, Any]) -> TrialPlan:
    """The plan from the fields that `dataclasses.asdict` gives. Raises: IntegrityError."""
    try:
        return TrialPlan(**fields)
    except TypeError as error:
        raise IntegrityError(f"{where} cannot be read as a trial: {error}") from error


def parse_record(where: str, fields: Mapping[str, Any]) -> TrialRecord:
    """The record that `TrialRecord.to_json` wrote. Raises: IntegrityError."""
    try:
        values = dict(fields)
        if values.pop("format") != FORMAT:
            raise IntegrityError(f"{where} has another format than {FORMAT}")
        plan = parse_plan(where, values.pop("plan"))
        measured = values.pop("measured")
        return TrialRecord(plan=plan, **values,
                           measured=None if measured is None else parse_measured(measured))
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where} cannot be read as a trial's record: {error!r}") from error


def parse_measured(fields: Mapping[str, Any]) -> Measured:
    """The measurements from plain values."""
    values = dict(fields)
    test_row, right = values.pop("test_row"), values.pop("right", None)
    return Measured(tasks=tuple(values.pop("tasks")),
                    rows=tuple(tuple(row) for row in values.pop("rows")),
                    test_row=None if test_row is None else tuple(test_row),
                    right=None if right is None else tuple(right), **values)
