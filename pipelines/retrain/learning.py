"""Learns what waits, on top of the champion's tasks, and lets the gate decide, task by task."""

import dataclasses
from collections.abc import Sequence

from partialhn.data.experience import task_of
from partialhn.errors import InputError
from partialhn.features.extract import feature_jobs
from partialhn.run import CutNetwork, cut_network
from partialhn.training import lineage
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import network_key
from partialhn.training.slots import Slot, slots_of
from pipelines.execution.choose import open_execution
from pipelines.retrain.candidate import (
    example_of,
    feature_seconds,
    gate_facts,
    keep_sample,
    register,
)
from pipelines.retrain.context import PassContext
from pipelines.retrain.gate import Policy, decide
from pipelines.retrain.inbox import Inbox
from pipelines.retrain.journal import Decided
from pipelines.retrain.outcome import Pass
from pipelines.retrain.validate import Checked, write_hashes


class Learning:
    """One pass's learning."""

    def __init__(self, context: PassContext, base: Sequence[Decided], policy: Policy,
                 policy_id: str, done: Pass) -> None:
        """base: the champion's tasks, which new ones are learned on top of."""
        self.context, self.base, self.done = context, list(base), done
        self.policy, self.policy_id = policy, policy_id
        self.execution = open_execution(context.config, context.storage, context.stream,
                                        context.progress)

    def run(self, waiting: list[Checked]) -> list[Decided]:
        """Returns the tasks of the champion afterwards."""
        context = self.context
        context.journal.append(context.lease, "pass",
                               {"arrivals": [task.arrival.slot for task in waiting]})
        if context.journal.config() is None:
            context.journal.append(context.lease, "founded", {"config": context.config.to_dict()})
        context.clock.lap("startup")
        with self.execution:
            while waiting:
                key, cut = self._parts(waiting[0])
                slots = self._slots(waiting, cut)
                lineage_ids = lineage_ids_of(context.config, cut.network, slots,
                                       [each.prefix for each in self.base])
                self.context.lease.check()
                self.execution.learn(cut, slots, lineage_ids, lambda *_: None)
                context.clock.lap("learn")
                learned = self.execution.learned(lineage_ids)
                waiting = self._decide_all(waiting, slots, learned, key)
                self.execution.forget_run(lineage_ids)
                context.clock.lap("register")
        return self.base

    def _parts(self, first: Checked) -> tuple[str, CutNetwork]:
        """The stream's network, which the first task of all founds, and its name."""
        context, supplied = self.context, self.context.config.backbone.trunk != "train"
        assert first.experience is not None
        if self.base:
            key = self.base[0].network
            network = context.network(key)
        else:
            key = "" if supplied else network_key(context.config, first.experience)
            network = context.network("") if supplied else self.execution.network(first.experience)
        cut = cut_network(context.config, network)
        context.clock.lap("trunk")
        return key, cut

    def _slots(self, waiting: Sequence[Checked], cut: CutNetwork) -> list[Slot]:
        """The champion's slots with their stored features, and the new ones with theirs made."""
        experiences = [each.experience for each in waiting if each.experience is not None]
        jobs = feature_jobs(self.context.config, experiences, cut.trunk)
        manifests, _ = self.execution.features(jobs, cut)
        self.context.clock.lap("features")
        slots = [each.with_features(self.context.store) for each in self.base]
        for slot in slots:
            if "test" not in slot.manifests:
                raise InputError(f"the stored test features of task {slot.name!r} are gone from "
                                 f"{self.context.storage.uri}/features; every pass measures every "
                                 "task, so they must be kept")
        return slots + slots_of(experiences, jobs, manifests)

    def _decide_all(self, waiting: list[Checked], slots: Sequence[Slot],
                    learned: Sequence[lineage.Learned], network: str) -> list[Checked]:
        """Gates the learned tasks in order; returns those behind one that was stopped."""
        first = len(slots) - len(waiting)
        for offset, each in enumerate(waiting):
            index = first + offset
            new = self._decide(each, slots[:index + 1], learned[:index + 1], network)
            self.context.journal.append(self.context.lease, "decided", dataclasses.asdict(new))
            self.context.lease.check()
            version = register(self.context, self.context.journal.decided(), new)
            Inbox(self.context.storage).accept(each.arrival)
            self.done.learned.append({
                "slot": new.slot, "stream": self.context.stream, "version": version.version,
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
        context, experience, slot = self.context, checked.experience, slots[-1]
        assert experience is not None
        write_hashes(context.storage, context.hashes(experience.fingerprint), checked.hashes)
        record, done = learned[-1].record, learned[-1]
        keep_sample(context, done.prefix, experience)
        facts = gate_facts(context, slots, learned, self.policy)
        model = sum(entry.size for entry in context.storage.list(f"{context.folder}/{done.prefix}"))
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
            example_of(experience, context.config))
