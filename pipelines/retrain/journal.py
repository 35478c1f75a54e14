"""The append-only log of a retrained stream: the gate's decision on every task, in order.

    <root>/streams/<stream>/log/00000001.json, 00000002.json, ...   one event each, never changed

The log is written before the registry. If a pass is killed between the two, the next one registers
what is only in the log. An event is created with a conditional write at the next free number and
holds the fencing token of the pass that wrote it.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from partialhn.data.experience import task_of
from partialhn.errors import IntegrityError
from partialhn.features.jobs import Split
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from partialhn.training.records import Forgotten
from partialhn.training.slots import Slot
from pipelines.platform.lease import Lease, LeaseLostError
from pipelines.platform.numbered import READERS, NumberedFiles
from pipelines.platform.storage import Storage
from pipelines.registry.versions import Version
from pipelines.settings import check_name

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Decided:
    """A learned task with the gate's decision."""

    slot: str
    classes: tuple[str, ...]
    fingerprint: str
    transform: str
    recipes: Mapping[Split, Mapping[str, Any]]
    """Recipes of the stored features by split; with them the images are no longer needed."""
    signature: str
    """Signature of the arrival's files; an unchanged arrival is not learned again."""
    policy: str
    """Hash of the policy that decided; a changed policy decides again."""
    prefix: str
    """Lineage id of the model after this task (`partialhn.training.lineage`)."""
    parent: str
    """Lineage id of the model before this task; empty for the first task."""
    network: str
    """Key of the stored network from which the trunk was cut; empty for a supplied one."""
    decision: Mapping[str, Any]
    """The gate's decision (`pipelines.gate.Decision.fields`)."""
    seconds: Mapping[str, float]
    """Wall seconds by phase."""
    added_bytes: Mapping[str, int]
    """Bytes stored for this task, by kind."""
    example: str
    """An image of the task, base64, for the input example of its version."""
    adopted: bool = False
    """Whether `partialhn train` learned and registered the task: no gate decided on it, and its
    arrival, policy, fingerprint and example are empty."""
    stands_for: str = ""
    """Where a later task of this model's chain is the newest that it kept when a task was
    forgotten: lineage id of the version in which this task was learned. It has no other version."""
    training: str = ""
    """Hash of the options that it was learned with; changed options learn a stopped task again.
    Empty in entries of older releases, for which no options are changed ones."""
    forgotten: tuple[Mapping[str, Any], ...] = ()
    """For the newest task of a model that has forgotten others: the fields of `Forgotten`."""

    @property
    def passed(self) -> bool:
        return bool(self.decision["passed"])

    def with_features(self, store: FeatureStore) -> Slot:
        """The task's slot, with those of its features that are stored."""
        manifests = {split: store.find(FeatureRecipe(**recipe))
                     for split, recipe in self.recipes.items()}
        return Slot(self.slot, self.classes, self.fingerprint, self.transform,
                    {split: manifest for split, manifest in manifests.items() if manifest})


@dataclasses.dataclass(frozen=True)
class Event:
    """One entry of the log."""

    number: int
    time: str
    """UTC, ISO 8601."""
    token: int
    kind: str
    """One of founded (holds the stream's configuration), pass (a pass starts), decided (a task),
    adopted (a task that `partialhn train` learned), forgot (the tasks that are kept where one was
    forgotten), registered (versions of decided tasks), published (a new report)."""
    fields: Mapping[str, Any]


class Journal:
    """The log of one stream. Events never change, so each is read only once."""

    def __init__(self, storage: Storage, stream: str) -> None:
        self._storage = storage
        folder = storage.path("streams", check_name(stream), "log")
        self._files = NumberedFiles(storage, folder, self._read)

    def events(self) -> list[Event]:
        """All events so far, oldest first. Raises: IntegrityError for a damaged or missing one."""
        return self._files.items()

    def append(self, lease: Lease, kind: str, fields: Mapping[str, Any]) -> Event:
        """Writes an event. Raises: LeaseLostError if another process has taken over the lease."""
        token = lease.check()
        events = self.events()
        newest = max((event.token for event in events), default=0)
        event = Event(len(events) + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), token,
                      kind, fields)
        content = json.dumps({"format": FORMAT, **dataclasses.asdict(event)}, indent=1).encode()
        if newest > token or not self._files.put(event.number, event, content):
            raise LeaseLostError(f"another process, with a lease newer than {token}, has written "
                                 f"to {self._files.folder}")
        return event

    def decided(self) -> list[Decided]:
        """Every decided task, in order; for a model decided several times, the newest decision."""
        newest: dict[str, Decided] = {}
        for event in self.events():
            for fields in _decided_fields(event):
                decided = _parse_decided(event.number, fields)
                newest.pop(decided.prefix, None)
                newest[decided.prefix] = decided
        return list(newest.values())

    def versions(self) -> dict[str, tuple[int, str]]:
        """Number and run of the registered version of each model, by lineage id.

        A model that is missing here may be registered: the pass may have been killed.
        """
        return {lineage_id: (int(number), str(run_id)) for event in self.events()
                if event.kind == "registered"
                for lineage_id, number, run_id in event.fields["versions"]}

    def note_versions(self, lease: Lease, versions: Sequence[Version]) -> None:
        """Notes that models are registered, so that no later pass asks the registry for them."""
        known = self.versions()
        new = [[version.tags["prefix"], version.version, version.run_id] for version in versions
               if version.tags["prefix"] not in known]
        if new:
            self.append(lease, "registered", {"versions": new})

    def config(self) -> dict[str, Any] | None:
        """The configuration with which the stream was started; None before its first pass."""
        return next((dict(event.fields["config"]) for event in self.events()
                     if event.kind == "founded"), None)

    def _read(self, number: int) -> Event:
        path = self._files.path(number)
        try:
            values = json.loads(self._storage.read_text(path))
            if values.pop("format") != FORMAT or values["number"] != number:
                raise IntegrityError(f"event {path} has another format or number than expected")
            return Event(**values)
        except FileNotFoundError as error:
            raise IntegrityError(f"event {path} is missing, but later ones exist") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"event {path} cannot be read: {error!r}") from error


def slots_of(tasks: Sequence[Decided], store: FeatureStore) -> list[Slot]:
    """The slots of decided tasks, with those of their features that are stored."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda task: task.with_features(store), tasks))


def chain_to(decided: Sequence[Decided], lineage_id: str) -> list[Decided]:
    """The tasks of the model with this lineage id, from its first task to its last.

    Raises: IntegrityError if one of them is not in the log.
    """
    by_lineage_id = {task.prefix: task for task in decided}
    chain: list[Decided] = []
    while lineage_id:
        if lineage_id not in by_lineage_id:
            raise IntegrityError(f"the stream's log has no entry for model {lineage_id}, which the "
                                 "champion is or was learned from")
        chain.append(by_lineage_id[lineage_id])
        lineage_id = chain[-1].parent
    return chain[::-1]


def forgotten_by(base: Sequence[Decided]) -> dict[str, Forgotten]:
    """The tasks that a model has forgotten and not learned again, by name. base: its tasks."""
    gone: dict[str, Forgotten] = {}
    for task in base:
        gone.pop(task_of(task.slot), None)
        gone |= {fields["task"]: Forgotten.from_fields(fields) for fields in task.forgotten}
    return gone


def _decided_fields(event: Event) -> Sequence[Mapping[str, Any]]:
    """The decided tasks of an event."""
    if event.kind == "forgot":
        kept: Sequence[Mapping[str, Any]] = event.fields["kept"]
        return kept
    return [event.fields] if event.kind in ("decided", "adopted") else []


def _parse_decided(number: int, fields: Mapping[str, Any]) -> Decided:
    try:
        return Decided(**{**fields, "classes": tuple(fields["classes"]),
                          "forgotten": tuple(fields.get("forgotten", ()))})
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"event {number} of the log cannot be read: {error!r}"
                             ) from error
