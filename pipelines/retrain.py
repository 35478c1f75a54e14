"""`partialhn retrain`: one pass over a stream's inbox, that may be started again at any time.

    lease -> repair what was cut short -> what has arrived and is sound -> features -> learn
    -> for each task in order: gate, log, version, aliases -> report

The log is written before the registry, and everything is found again by what it is, so a pass
that was killed anywhere is finished by the next. Several waiting tasks are learned in one run of
Ray Train; behind one that the gate stops, the others are learned again without it.
"""

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from partialhn import chain
from partialhn.backbone import Network, supplied_network
from partialhn.chain import prefixes_of
from partialhn.checkpoint import Model
from partialhn.config import Config, build, load_config
from partialhn.errors import InputError, IntegrityError
from partialhn.featurise import feature_jobs
from partialhn.presets import preset
from partialhn.pretrain import network_key, stored_network
from partialhn.result import Clock, model_sizes, peak_rss_bytes, result_fields
from partialhn.run import Parts, check, cut
from partialhn.slots import Slot, slots_of
from partialhn.stream import task_of
from pipelines.candidate import WORK, Registering, example_of, feature_seconds, gate_facts
from pipelines.features import open_store
from pipelines.gate import Policy, decide, read_policy
from pipelines.inbox import Inbox, Problem
from pipelines.journal import Decided, Journal, chain_to
from pipelines.lease import Lease, LeaseLostError
from pipelines.outcome import Pass
from pipelines.progress import Progress
from pipelines.registry import Registry, connect
from pipelines.report import write_report
from pipelines.settings import RetrainConfig
from pipelines.stages import Stages, our_outcome, start_ray
from pipelines.storage import Storage, open_storage
from pipelines.validate import ArrivalPolicy, Checked, check_arrival, read_hashes, write_hashes
from pipelines.versions import CHAMPION, Version

Say = Callable[[str], None]


def retrain(settings: RetrainConfig, say: Say = print) -> Pass:
    """One pass. Raises: InputError for anything the user can set right."""
    storage = open_storage(settings.storage)
    storage.check()
    values = dict(read_policy(settings.policy)) if settings.policy else {}
    arrivals = build(ArrivalPolicy, values.pop("inbox", None) or {}, "policy.inbox.")
    policy = build(Policy, values, "policy.")
    journal = Journal(storage, settings.name)
    config = _config(settings, journal)
    check(config)
    clock = Clock()
    this = _Pass(settings, storage, config, policy, arrivals, journal,
                 Pass(settings.name, settings.dry_run), Progress(config, say), clock)
    with storage.explained():
        try:
            this.run()
        except LeaseLostError as error:
            this.done.held_by = f"another process ({error})"
    this.done.seconds = {key: round(value, 3) for key, value in clock.laps.items()}
    return this.done


def _config(settings: RetrainConfig, journal: Journal) -> Config:
    """The stream's configuration: what it was founded with, and how new tasks are learned."""
    given = (load_config(settings.config) if settings.config
             else preset(settings.preset) if settings.preset else None)
    if given is not None and given.train.compare:
        given = dataclasses.replace(given, train=dataclasses.replace(given.train, compare=()))
    founded = journal.config()
    if founded is None:
        return given or Config()
    first = Config.from_dict(founded)
    if given is None:
        return first
    fixed = [("data", "input_size"), ("data", "stream_seed"), ("train", "strategy"),
             ("train", "seed")]
    fixed += [(section, field.name) for section in ("backbone", "features", "hypernet")
              for field in dataclasses.fields(getattr(first, section))]
    for section, key in fixed:
        was, now = (getattr(getattr(each, section), key) for each in (first, given))
        if was != now:
            raise InputError(f"{section}.{key} is {now!r}, but stream {settings.name!r} was "
                             f"founded with {was!r}; allowed: the same, or another --name")
    return given


@dataclasses.dataclass
class _Pass:
    """One pass, step by step."""

    settings: RetrainConfig
    storage: Storage
    config: Config
    policy: Policy
    arrival_policy: ArrivalPolicy
    journal: Journal
    done: Pass
    progress: Progress
    clock: Clock

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.storage)
        self.folder = self.storage.path("runs", self.settings.name, "learned")
        both = [dataclasses.asdict(self.policy), dataclasses.asdict(self.arrival_policy)]
        self.policy_id = hashlib.sha256(json.dumps(both).encode()).hexdigest()[:12]

    def run(self) -> None:
        if self.settings.dry_run:
            registry = self._registry(create=False) if self.journal.events() else None
            for each in self._arrivals(self._base(registry)):
                self.done.would.append(f"learn {each.arrival.slot} "
                                       f"({len(each.experience.train)} training images)"
                                       if each.experience else "")
            return
        lease = Lease(self.storage, self.settings.name)
        holder = lease.acquire()
        if holder is not None:
            self.done.held_by = str(holder)
            return
        with lease:
            registry = self._registry()
            base = self._repair(registry, lease)
            self.clock.lap("startup")
            waiting = self._arrivals(base)
            self.clock.lap("look")
            if waiting:
                base = _Learning(self, registry, lease, base).run(waiting)
            if base and self._published() != base[-1].prefix:
                self._publish(registry, lease, base)
                self.clock.lap("report")
            champion = self._champion(registry)
            self.done.champion = champion.version if champion else None

    def _registry(self, *, create: bool = True) -> Registry:
        return connect(self.storage, self.settings.tracking_uri, create)

    def _champion(self, registry: Registry | None) -> Version | None:
        if registry is None:
            return None
        with contextlib.suppress(InputError):  # nothing of the stream is registered yet
            return next((version for version in registry.versions(self.settings.name)
                         if CHAMPION in version.aliases), None)
        return None

    def _base(self, registry: Registry | None) -> list[Decided]:
        """The tasks of the champion: what new tasks are learned on top of."""
        champion = self._champion(registry)
        if champion is None:
            return []
        try:
            return chain_to(self.journal.decided(), champion.tags["prefix"])
        except IntegrityError as error:
            raise InputError(f"stream {self.settings.name!r} was not learned by retrain ({error}); "
                             "allowed: a --name of its own") from error

    def _repair(self, registry: Registry, lease: Lease) -> list[Decided]:
        """Finishes what an earlier pass left: aliases, and versions that are only in the log."""
        name = self.settings.name
        for repair in registry.aliases.reconcile(name):
            self.done.repaired.append(str(repair))
        decided = self.journal.decided()
        promoted: set[int | None] = set()
        if decided and registry.aliases.keeps_history(name):
            promoted = {entry.move.to for entry in registry.aliases.history(name).entries()
                        if entry.move.alias == CHAMPION}
        for each in decided:
            version = registry.version_of(name, each.prefix)
            if version is None or (each.passed and version.version not in promoted):
                lease.check()
                made = self._registering(registry, lease).register(decided, each)
                self.done.repaired.append(f"{each.slot} was learned, now {made.uri}")
        return self._base(registry)

    def _registering(self, registry: Registry, lease: Lease) -> Registering:
        return Registering(self.storage, registry, self.settings.name, self.folder, self.config,
                           lease.token)

    def _arrivals(self, base: Sequence[Decided]) -> list[Checked]:
        """What has arrived, is ready, was not decided before and is sound, in order."""
        slots = {each.slot for each in base}
        found, self.done.waiting = self.inbox.scan(lambda slot: slot in slots,
                                                   self.settings.quiet_minutes)
        decided = self.journal.decided()
        classes = {task_of(each.slot): each.classes for each in base}
        hashes: dict[str, Any] = {}
        ready: list[Checked] = []
        for arrival in found:
            if any(each.slot == arrival.slot and each.signature == arrival.signature
                   and (each.passed or each.policy == self.policy_id) for each in decided):
                self.done.skipped.append(f"{arrival.slot} (decided)")
                continue
            if self.inbox.rejected(arrival, self.policy_id):
                self.done.skipped.append(f"{arrival.slot} (rejected)")
                continue
            if arrival.part and arrival.task not in classes:
                self.done.waiting.append(f"{arrival.slot}: its task is not learned")
                continue
            if not hashes:
                hashes = {each.slot: read_hashes(self.storage, self._hashes(each.fingerprint))
                          for each in base}
            problems: Sequence[Problem] = self.inbox.name_problems(arrival, list(classes))
            if not problems:
                checked = check_arrival(self.storage, arrival, self.config.data,
                                        self.arrival_policy, hashes,
                                        classes[arrival.task] if arrival.part else None)
                problems = checked.problems
            if problems:
                self.done.rejected.append({"task": arrival.slot,
                                           "reasons": [each.text for each in problems],
                                           "codes": [each.code for each in problems]})
                if not self.settings.dry_run:
                    self.inbox.reject(arrival, self.policy_id, problems)
                continue
            assert checked.experience is not None
            ready.append(checked)
            hashes[arrival.slot] = checked.hashes
            classes.setdefault(arrival.task, checked.experience.classes)
        return ready

    def _hashes(self, fingerprint: str) -> str:
        return self.storage.path("streams", self.settings.name, "images",
                                 f"{fingerprint[:32]}.parquet")

    def network(self, key: str) -> Network:
        """The network that the stream was founded with."""
        backbone = self.config.backbone
        network = (stored_network(self.config, key, self.storage.filesystem, self.storage.root)
                   if key else supplied_network(backbone.trunk, backbone.backbone, 2))
        if network is None:
            raise InputError(f"the stream's trunk {key} is not at {self.storage.uri}/trunks; "
                             "allowed: the --storage that the stream was founded in")
        return network

    def _published(self) -> str:
        """The model that the newest report is about."""
        return next((str(event.fields["prefix"]) for event in reversed(self.journal.events())
                     if event.kind == "published"), "")

    def _publish(self, registry: Registry, lease: Lease, base: Sequence[Decided]) -> None:
        """Matrix, result and report of the champion go to the stream's run."""
        store, name = open_store(self.storage), self.settings.name
        parts = cut(self.config, self.network(base[0].network))
        slots = [each.with_features(store) for each in base]
        prefixes = [each.prefix for each in base]
        learned = chain.find(self.storage.filesystem, self.folder, prefixes)
        outcome = chain.outcome_of(learned)
        with tempfile.TemporaryDirectory() as scratch:
            copy = chain.fetch_model(self.storage.filesystem, self.folder, prefixes[-1],
                                     Path(scratch) / "model")
            model = Model.load(copy)
            size = sum(file.stat().st_size for file in copy.iterdir())
        fields = result_fields(self.config, slots, parts.macs, 0,
                               {self.config.train.strategy: outcome}, self.clock.laps)
        versions = [version.fields() for version in registry.versions(name)
                    if version.tags.get("prefix") in prefixes]
        fields |= model_sizes(model) | {
            "name": name, "work": prefixes[-1][:12], "weights_hash": model.weights_hash(),
            "checkpoint_bytes": size, "device": "see the tasks' runs",
            "peak_rss_bytes": peak_rss_bytes(), "storage": self.storage.uri,
            "tracking_uri": registry.tracking_uri, "model_uri": f"models:/{name}@{CHAMPION}",
            "versions": versions}
        lease.check()
        parent = registry.stream_run(name, WORK, self.config.to_dict())
        registry.log_matrix(parent, fields["accuracy_matrix"], [slot.name for slot in slots])
        registry.log_result(parent, fields)
        with tempfile.TemporaryDirectory() as scratch:
            registry.log_file(parent, write_report(fields, Path(scratch) / "report.html"))
        registry.end_run(parent)
        self.journal.append(lease, "published", {"prefix": prefixes[-1]})


class _Learning:
    """Learns what waits, on top of the champion's tasks, and lets the gate decide."""

    def __init__(self, this: _Pass, registry: Registry, lease: Lease,
                 base: list[Decided]) -> None:
        self.this, self.registry, self.lease, self.base = this, registry, lease, base
        start_ray(this.config)
        self.stages = Stages(this.config, this.storage, this.settings.name, this.progress)
        self.store = open_store(this.storage, this.config.compute)

    def run(self, waiting: list[Checked]) -> list[Decided]:
        """Returns the tasks of the champion afterwards."""
        this = self.this
        this.journal.append(self.lease, "pass", {"arrivals": [e.arrival.slot for e in waiting]})
        if this.journal.config() is None:
            this.journal.append(self.lease, "founded", {"config": this.config.to_dict()})
        this.clock.lap("startup")
        while waiting:
            key, parts = self._parts(waiting[0])
            slots = self._slots(waiting, parts)
            prefixes = prefixes_of(this.config, parts.network, slots,
                                   [each.prefix for each in self.base])
            self.lease.check()
            returned = self.stages.learn(parts, slots, prefixes, lambda *_: None)
            assert len(our_outcome(returned, this.config).finished) == len(slots)
            this.clock.lap("learn")
            learned = self.stages.learned(prefixes)
            waiting = self._decide_all(waiting, slots, learned, key)
            self.stages.forget_run(prefixes)
            this.clock.lap("register")
        return self.base

    def _parts(self, first: Checked) -> tuple[str, Parts]:
        """The stream's network, which the first task of all founds, and its name."""
        this, supplied = self.this, self.this.config.backbone.trunk != "train"
        assert first.experience is not None
        if self.base:
            key = self.base[0].network
            network = this.network(key)
        else:
            key = "" if supplied else network_key(this.config, first.experience)
            network = this.network("") if supplied else self.stages.network(first.experience)
        parts = cut(this.config, network)
        this.clock.lap("trunk")
        return key, parts

    def _slots(self, waiting: Sequence[Checked], parts: Parts) -> list[Slot]:
        """The champion's slots with their stored features, and the new ones with theirs made."""
        experiences = [each.experience for each in waiting if each.experience is not None]
        jobs = feature_jobs(self.this.config, experiences, parts.trunk)
        manifests, _ = self.stages.features(jobs, parts)
        self.this.clock.lap("features")
        slots = [each.with_features(self.store) for each in self.base]
        for slot in slots:
            if "test" not in slot.manifests:
                raise InputError(f"the stored test features of task {slot.name!r} are gone from "
                                 f"{self.this.storage.uri}/features; every pass measures every "
                                 "task, so they must be kept")
        return slots + slots_of(experiences, jobs, manifests)

    def _decide_all(self, waiting: list[Checked], slots: Sequence[Slot],
                    learned: Sequence[chain.Learned], network: str) -> list[Checked]:
        """Gates the learned tasks in order; returns those behind one that was stopped."""
        first = len(slots) - len(waiting)
        for offset, each in enumerate(waiting):
            index = first + offset
            new = self._decide(each, slots[:index + 1], learned[:index + 1], network)
            self.this.journal.append(self.lease, "decided", dataclasses.asdict(new))
            self.lease.check()
            registering = self.this._registering(self.registry, self.lease)
            version = registering.register(self.this.journal.decided(), new)
            self.this.inbox.accept(each.arrival)
            self.this.done.learned.append({
                "slot": new.slot, "stream": self.this.settings.name, "version": version.version,
                "decision": dict(new.decision), "seconds": dict(new.seconds),
                "added_bytes": dict(new.added_bytes), "prefix": new.prefix})
            if not new.passed:
                there = {task_of(done.slot) for done in self.base}
                behind = []
                for other in waiting[offset + 1:]:  # a refresh of what was stopped must wait
                    if not other.arrival.part or other.arrival.task in there:
                        behind.append(other)
                        there.add(other.arrival.task)
                return behind
            self.base.append(new)
        return []

    def _decide(self, checked: Checked, slots: Sequence[Slot],
                learned: Sequence[chain.Learned], network: str) -> Decided:
        this, experience, slot = self.this, checked.experience, slots[-1]
        assert experience is not None
        write_hashes(this.storage, this._hashes(experience.fingerprint), checked.hashes)
        facts = gate_facts(self.store, this.folder, slots, learned, this.policy)
        record, done = learned[-1].record, learned[-1]
        model = sum(entry.size for entry in this.storage.list(f"{this.folder}/{done.prefix}"))
        return Decided(
            slot.name, slot.classes, slot.fingerprint, slot.transform,
            {split: dataclasses.asdict(manifest.recipe)
             for split, manifest in slot.manifests.items()},
            checked.arrival.signature, this.policy_id, done.prefix, done.parent, network,
            decide(this.policy, facts).fields(),
            {"features": round(feature_seconds(slot), 3), "train": round(record.train_seconds, 3),
             "evaluate": round(record.evaluate_seconds, 3)},
            {"features": sum(manifest.bytes for manifest in slot.manifests.values()),
             "model": model, "task": done.task_bytes},
            example_of(experience, this.config))



