"""`partialhn retrain`: one pass over a stream's inbox; it may be started again at any time.

    lease -> repair an interrupted pass -> check arrivals -> features -> learn
    -> for each task in order: gate, log, version, aliases -> report

The log is written before the registry, and finished results are found again by their names, so the
next pass completes one that was killed at any point. Several waiting tasks are learned in one run
of Ray Train. If the gate stops one of them, those after it are learned again without it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from partialhn.config import Config, build, load_config
from partialhn.data.experience import task_of
from partialhn.errors import InputError, IntegrityError
from partialhn.naming import digest_text
from partialhn.presets import preset
from partialhn.run import check, with_depth_number
from partialhn.training.result import Clock
from pipelines.platform.lease import Lease, LeaseLostError
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage, open_storage
from pipelines.registry.client import Registry, connect
from pipelines.registry.versions import CHAMPION, Version
from pipelines.retrain.candidate import register
from pipelines.retrain.context import PassContext, hashes_path
from pipelines.retrain.gate import Policy, read_policy
from pipelines.retrain.inbox import Inbox, Problem
from pipelines.retrain.journal import Decided, Journal, chain_to
from pipelines.retrain.learning import Learning
from pipelines.retrain.outcome import PassOutcome
from pipelines.retrain.publish import publish, published
from pipelines.retrain.validate import ArrivalPolicy, CheckedArrival, check_arrival, read_hashes
from pipelines.settings import RetrainConfig

Log = Callable[[str], None]


def retrain(settings: RetrainConfig, log: Log = print) -> PassOutcome:
    """Runs one pass. Raises: InputError for any error that the user can correct."""
    storage = open_storage(settings.storage)
    storage.check()
    values = dict(read_policy(settings.policy)) if settings.policy else {}
    arrivals = build(ArrivalPolicy, values.pop("inbox", None) or {}, "policy.inbox.")
    policy = build(Policy, values, "policy.")
    journal = Journal(storage, settings.name)
    config = _config(settings, journal)
    check(config)
    clock = Clock()
    outcome = PassOutcome(settings.name, settings.dry_run)
    with storage.explained():
        try:
            _Pass(settings, storage, config, policy, arrivals, journal, outcome,
                  Progress(config, log), clock).run()
        except LeaseLostError as error:
            outcome.held_by = f"another process ({error})"
    outcome.seconds = {key: round(value, 3) for key, value in clock.laps.items()}
    return outcome


def _config(settings: RetrainConfig, journal: Journal) -> Config:
    """The stream's configuration: the one it was started with, or a given one that fits it.

    Raises: InputError for a given value that would change the stream.
    """
    given = (load_config(settings.config) if settings.config
             else preset(settings.preset) if settings.preset else None)
    given = with_depth_number(given) if given else None
    if given is not None and given.train.compare:
        given = dataclasses.replace(given, train=dataclasses.replace(given.train, compare=()))
    founded = journal.config()
    if founded is None:
        return given or with_depth_number(Config())
    first = Config.from_dict(founded)
    if given is None:
        return first
    fixed = [("data", "input_size"), ("data", "stream_seed"), ("train", "strategy"),
             ("train", "seed")]
    fixed += [(section, field.name) for section in ("backbone", "features", "hypernet")
              for field in dataclasses.fields(getattr(first, section))]
    for section, key in fixed:
        was, now = (getattr(getattr(config, section), key) for config in (first, given))
        if was != now:
            raise InputError(f"{section}.{key} is {now!r}, but stream {settings.name!r} was "
                             f"started with {was!r}; allowed: the same, or another --name")
    return given


@dataclasses.dataclass
class _Pass:
    """The steps of one pass."""

    settings: RetrainConfig
    storage: Storage
    config: Config
    policy: Policy
    arrival_policy: ArrivalPolicy
    journal: Journal
    done: PassOutcome
    progress: Progress
    clock: Clock

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.storage)
        both = [dataclasses.asdict(self.policy), dataclasses.asdict(self.arrival_policy)]
        self.policy_id = digest_text(json.dumps(both), 12)

    def run(self) -> None:
        if self.settings.dry_run:
            registry = self._registry(create=False) if self.journal.events() else None
            for checked in self._arrivals(self._base(registry)):
                self.done.would.append(f"learn {checked.arrival.slot} "
                                       f"({len(checked.experience.train)} training images)"
                                       if checked.experience else "")
            return
        lease = Lease(self.storage, self.settings.name)
        holder = lease.acquire()
        if holder is not None:
            self.done.held_by = str(holder)
            return
        with lease:
            self._work(PassContext(self.storage, self.settings.name, self.config, self._registry(),
                            self.journal, lease, self.progress, self.clock))

    def _work(self, context: PassContext) -> None:
        """The steps that need the lease."""
        base = self._repair(context)
        self.clock.lap("startup")
        waiting = self._arrivals(base)
        self.clock.lap("look")
        if waiting:
            base = Learning(context, base, self.policy, self.policy_id, self.done).run(waiting)
        if base and published(self.journal) != base[-1].prefix:
            publish(context, base)
            self.clock.lap("report")
        champion = self._champion(context.registry)
        self.done.champion = champion.version if champion else None

    def _registry(self, *, create: bool = True) -> Registry:
        return connect(self.storage, self.settings.tracking_uri, create)

    def _versions(self, registry: Registry | None) -> list[Version]:
        """All versions of the stream; none before the first pass."""
        if registry is not None:
            with contextlib.suppress(InputError):  # nothing of the stream is registered yet
                return registry.versions(self.settings.name)
        return []

    def _champion(self, registry: Registry | None) -> Version | None:
        return next((version for version in self._versions(registry)
                     if CHAMPION in version.aliases), None)

    def _base(self, registry: Registry | None) -> list[Decided]:
        """The tasks of the champion, on top of which new tasks are learned."""
        champion = self._champion(registry)
        if champion is None:
            return []
        try:
            return chain_to(self.journal.decided(), champion.tags["prefix"])
        except IntegrityError as error:
            raise InputError(f"stream {self.settings.name!r} was not started by retrain ({error}); "
                             "allowed: another --name") from error

    def _repair(self, context: PassContext) -> list[Decided]:
        """Completes an interrupted pass: sets aliases, registers versions that only the log has."""
        name, aliases = self.settings.name, context.registry.aliases
        self.done.repaired += [str(repair) for repair in aliases.reconcile(name)]
        decided = self.journal.decided()
        promoted: set[int | None] = set()
        if decided and aliases.keeps_history(name):
            promoted = {entry.move.to for entry in aliases.history(name).entries()
                        if entry.move.alias == CHAMPION}
        versions = {version.tags.get("prefix", ""): version
                    for version in self._versions(context.registry)}
        for task in decided:
            version = versions.get(task.prefix)
            if version is None or (task.passed and version.version not in promoted):
                context.lease.check()
                registered = register(context, decided, task)
                self.done.repaired.append(f"{task.slot} was learned, now {registered.uri}")
        return self._base(context.registry)

    def _arrivals(self, base: Sequence[Decided]) -> list[CheckedArrival]:
        """The arrivals to learn, in order: ready, not decided before, and without problems."""
        slots = {task.slot for task in base}
        arrivals, self.done.waiting = self.inbox.scan(lambda slot: slot in slots,
                                                      self.settings.quiet_minutes)
        decided = self.journal.decided()
        classes = {task_of(task.slot): task.classes for task in base}
        hashes: dict[str, Any] = {}
        ready: list[CheckedArrival] = []
        for arrival in arrivals:
            if any(task.slot == arrival.slot and task.signature == arrival.signature
                   and (task.passed or task.policy == self.policy_id) for task in decided):
                self.done.skipped.append(f"{arrival.slot} (decided)")
                continue
            if self.inbox.rejected(arrival, self.policy_id):
                self.done.skipped.append(f"{arrival.slot} (rejected)")
                continue
            if arrival.part and arrival.task not in classes:
                self.done.waiting.append(f"{arrival.slot}: its task is not learned yet")
                continue
            if not hashes:
                hashes = {task.slot: read_hashes(self.storage, hashes_path(
                    self.storage, self.settings.name, task.fingerprint))
                          for task in base}
            problems: Sequence[Problem] = self.inbox.name_problems(arrival, list(classes))
            if not problems:
                checked = check_arrival(self.storage, arrival, self.config.data,
                                        self.arrival_policy, hashes,
                                        classes[arrival.task] if arrival.part else None)
                problems = checked.problems
            if problems:
                self.done.rejected.append({"task": arrival.slot,
                                           "reasons": [problem.text for problem in problems],
                                           "codes": [problem.code for problem in problems]})
                if not self.settings.dry_run:
                    self.inbox.reject(arrival, self.policy_id, problems)
                continue
            assert checked.experience is not None
            ready.append(checked)
            hashes[arrival.slot] = checked.hashes
            classes.setdefault(arrival.task, checked.experience.classes)
        return ready
