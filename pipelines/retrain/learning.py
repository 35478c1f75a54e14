"""Learns what waits, on top of the champion's tasks, and lets the gate decide, task by task."""

import dataclasses
from collections.abc import Sequence

from partialhn.data.experience import task_of
from partialhn.errors import InputError
from partialhn.features.extract import feature_jobs
from partialhn.run import Parts, cut
from partialhn.training import lineage
from partialhn.training.lineage import prefixes_of
from partialhn.training.pretrain import network_key
from partialhn.training.slots import Slot, slots_of
from pipelines.execution.choose import open_stages
from pipelines.retrain.candidate import (
    example_of,
    feature_seconds,
    gate_facts,
    keep_sample,
    register,
)
from pipelines.retrain.gate import Policy, decide
from pipelines.retrain.held import Held
from pipelines.retrain.inbox import Inbox
from pipelines.retrain.journal import Decided
from pipelines.retrain.outcome import Pass
from pipelines.retrain.validate import Checked, write_hashes


class Learning:
    """One pass's learning."""

    def __init__(self, held: Held, base: Sequence[Decided], policy: Policy, policy_id: str,
                 done: Pass) -> None:
        """base: the champion's tasks, which new ones are learned on top of."""
        self.held, self.base, self.done = held, list(base), done
        self.policy, self.policy_id = policy, policy_id
        self.stages = open_stages(held.config, held.storage, held.stream, held.progress)

    def run(self, waiting: list[Checked]) -> list[Decided]:
        """Returns the tasks of the champion afterwards."""
        held = self.held
        held.journal.append(held.lease, "pass", {"arrivals": [e.arrival.slot for e in waiting]})
        if held.journal.config() is None:
            held.journal.append(held.lease, "founded", {"config": held.config.to_dict()})
        held.clock.lap("startup")
        with self.stages:
            while waiting:
                key, parts = self._parts(waiting[0])
                slots = self._slots(waiting, parts)
                prefixes = prefixes_of(held.config, parts.network, slots,
                                       [each.prefix for each in self.base])
                self.held.lease.check()
                self.stages.learn(parts, slots, prefixes, lambda *_: None)
                held.clock.lap("learn")
                learned = self.stages.learned(prefixes)
                waiting = self._decide_all(waiting, slots, learned, key)
                self.stages.forget_run(prefixes)
                held.clock.lap("register")
        return self.base

    def _parts(self, first: Checked) -> tuple[str, Parts]:
        """The stream's network, which the first task of all founds, and its name."""
        held, supplied = self.held, self.held.config.backbone.trunk != "train"
        assert first.experience is not None
        if self.base:
            key = self.base[0].network
            network = held.network(key)
        else:
            key = "" if supplied else network_key(held.config, first.experience)
            network = held.network("") if supplied else self.stages.network(first.experience)
        parts = cut(held.config, network)
        held.clock.lap("trunk")
        return key, parts

    def _slots(self, waiting: Sequence[Checked], parts: Parts) -> list[Slot]:
        """The champion's slots with their stored features, and the new ones with theirs made."""
        experiences = [each.experience for each in waiting if each.experience is not None]
        jobs = feature_jobs(self.held.config, experiences, parts.trunk)
        manifests, _ = self.stages.features(jobs, parts)
        self.held.clock.lap("features")
        slots = [each.with_features(self.held.store) for each in self.base]
        for slot in slots:
            if "test" not in slot.manifests:
                raise InputError(f"the stored test features of task {slot.name!r} are gone from "
                                 f"{self.held.storage.uri}/features; every pass measures every "
                                 "task, so they must be kept")
        return slots + slots_of(experiences, jobs, manifests)

    def _decide_all(self, waiting: list[Checked], slots: Sequence[Slot],
                    learned: Sequence[lineage.Learned], network: str) -> list[Checked]:
        """Gates the learned tasks in order; returns those behind one that was stopped."""
        first = len(slots) - len(waiting)
        for offset, each in enumerate(waiting):
            index = first + offset
            new = self._decide(each, slots[:index + 1], learned[:index + 1], network)
            self.held.journal.append(self.held.lease, "decided", dataclasses.asdict(new))
            self.held.lease.check()
            version = register(self.held, self.held.journal.decided(), new)
            Inbox(self.held.storage).accept(each.arrival)
            self.done.learned.append({
                "slot": new.slot, "stream": self.held.stream, "version": version.version,
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
                learned: Sequence[lineage.Learned], network: str) -> Decided:
        held, experience, slot = self.held, checked.experience, slots[-1]
        assert experience is not None
        write_hashes(held.storage, held.hashes(experience.fingerprint), checked.hashes)
        record, done = learned[-1].record, learned[-1]
        keep_sample(held, done.prefix, experience)
        facts = gate_facts(held, slots, learned, self.policy)
        model = sum(entry.size for entry in held.storage.list(f"{held.folder}/{done.prefix}"))
        return Decided(
            slot.name, slot.classes, slot.fingerprint, slot.transform,
            {split: dataclasses.asdict(manifest.recipe)
             for split, manifest in slot.manifests.items()},
            checked.arrival.signature, self.policy_id, done.prefix, done.parent, network,
            decide(self.policy, facts).fields(),
            {"features": round(feature_seconds(slot), 3), "train": round(record.train_seconds, 3),
             "evaluate": round(record.evaluate_seconds, 3)},
            {"features": sum(manifest.bytes for manifest in slot.manifests.values()),
             "model": model, "task": done.task_bytes},
            example_of(experience, held.config))
