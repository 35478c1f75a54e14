"""The append-only log of a stream: what was decided of every task that arrived, in order.

    <root>/streams/<stream>/log/00000001.json, 00000002.json, ...   one event each, never changed

It is written before the registry is: what it says and the registry does not show was cut short,
and is done at the next pass. An event is created conditionally at the next free number and carries
the fencing token of the pass that wrote it.
"""

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.errors import IntegrityError
from partialhn.features.extract import Split
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from partialhn.training.slots import Slot
from pipelines.platform.lease import Lease, LeaseLostError
from pipelines.platform.storage import Storage
from pipelines.settings import check_name

FORMAT = 1
_FILE = re.compile(r"(\d{8})\.json")


@dataclasses.dataclass(frozen=True)
class Decided:
    """A task that was learned, and what the gate said."""

    slot: str
    classes: tuple[str, ...]
    fingerprint: str
    transform: str
    recipes: Mapping[Split, Mapping[str, Any]]
    """Recipes of the stored features by split: with them the images may go."""
    signature: str
    """Of the arrival's files: an unchanged arrival is not tried again."""
    policy: str
    """Of the policy that decided: a changed one decides anew."""
    prefix: str
    """Names the model after this task (`partialhn.training.lineage`)."""
    parent: str
    network: str
    """Name of the stored network that the trunk was cut from; empty for a supplied one."""
    decision: Mapping[str, Any]
    """As `pipelines.retrain.gate.Decision.fields` gives it."""
    seconds: Mapping[str, float]
    """Wall seconds by stage."""
    added_bytes: Mapping[str, int]
    """Bytes stored for this task, by what they are."""
    example: str
    """An image of the task, base64: what a version's input example is made of."""

    @property
    def passed(self) -> bool:
        return bool(self.decision["passed"])

    def with_features(self, store: FeatureStore) -> Slot:
        """The slot with what is stored of its features."""
        found = {split: store.find(FeatureRecipe(**recipe))
                 for split, recipe in self.recipes.items()}
        return Slot(self.slot, self.classes, self.fingerprint, self.transform,
                    {split: manifest for split, manifest in found.items() if manifest})


@dataclasses.dataclass(frozen=True)
class Event:
    """One entry of the log."""

    number: int
    time: str
    """UTC, ISO 8601."""
    token: int
    kind: str
    """founded: the stream's configuration. pass: a pass begins to work. decided: a task."""
    fields: Mapping[str, Any]


class Journal:
    """The log of one stream. Events never change, so each is read once."""

    def __init__(self, storage: Storage, stream: str) -> None:
        self._storage = storage
        self._folder = storage.path("streams", check_name(stream), "log")
        self._events: list[Event] = []

    def events(self) -> list[Event]:
        """All events so far, oldest first. Raises: IntegrityError for a damaged or missing one."""
        for number in range(len(self._events) + 1, self._last() + 1):
            self._events.append(self._read(number))
        return list(self._events)

    def append(self, lease: Lease, kind: str, fields: Mapping[str, Any]) -> Event:
        """Writes an event. Raises: LeaseLostError for a holder that another one has overtaken."""
        token = lease.check()
        there = self.events()
        newest = max((event.token for event in there), default=0)
        event = Event(len(there) + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), token,
                      kind, fields)
        content = json.dumps({"format": FORMAT, **dataclasses.asdict(event)}, indent=1).encode()
        if newest > token or not self._storage.put_if_absent(self._path(event.number), content):
            raise LeaseLostError(f"{self._folder} is written by another process, with a lease "
                                 f"newer than {token}")
        self._events.append(event)
        return event

    def decided(self) -> list[Decided]:
        """Every task that was decided, in order; the newest decision of a model counts."""
        found: dict[str, Decided] = {}
        for event in self.events():
            if event.kind == "decided":
                decided = _parse_decided(event)
                found.pop(decided.prefix, None)
                found[decided.prefix] = decided
        return list(found.values())

    def config(self) -> dict[str, Any] | None:
        """The configuration the stream was founded with; None before that."""
        return next((dict(event.fields["config"]) for event in self.events()
                     if event.kind == "founded"), None)

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _last(self) -> int:
        numbers = (_FILE.fullmatch(entry.path.rpartition("/")[2])
                   for entry in self._storage.list(self._folder))
        return max((int(match[1]) for match in numbers if match), default=0)

    def _read(self, number: int) -> Event:
        path = self._path(number)
        try:
            values = json.loads(self._storage.read_text(path))
            if values.pop("format") != FORMAT or values["number"] != number:
                raise IntegrityError(f"event {path} is of another format or number")
            return Event(**values)
        except FileNotFoundError as error:
            raise IntegrityError(f"event {path} is missing, but later ones are there") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"event {path} cannot be read: {error!r}") from error


def chain_to(decided: Sequence[Decided], lineage_id: str) -> list[Decided]:
    """The tasks of the model with this lineage_id, from the first on.

    Raises: IntegrityError where one of them is not in the log.
    """
    by_lineage_id = {each.prefix: each for each in decided}
    found: list[Decided] = []
    while lineage_id:
        if lineage_id not in by_lineage_id:
            raise IntegrityError(f"the log knows no model {lineage_id}, which the champion is or "
                                 "was learned from")
        found.append(by_lineage_id[lineage_id])
        lineage_id = found[-1].parent
    return found[::-1]


def _parse_decided(event: Event) -> Decided:
    try:
        values = dict(event.fields)
        return Decided(**values | {"classes": tuple(values["classes"])})
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"event {event.number} of the log cannot be read: {error!r}"
                             ) from error
