"""Learns the waiting tasks on top of the champion's tasks; the gate decides on each of them."""

import dataclasses
from collections.abc import Callable, Sequence

from partialhn.checkpoints import shared
from partialhn.data.experience import task_of
from partialhn.errors import DivergedError
from partialhn.features.extract import feature_jobs
from partialhn.run import TrunkAndHead, cut_network
from partialhn.training import lineage
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import network_key
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.slots import Slot, slots_of
from pipelines.execution.choose import open_execution
from pipelines.gate import GateFacts, Policy, decide
from pipelines.registry.versions import Version
from pipelines.retrain.candidate import (
    example_of,
    feature_seconds,
    gate_facts,
    keep_sample,
    register,
)
from pipelines.retrain.context import PassContext
from pipelines.retrain.inbox import Arrival, Inbox
from pipelines.retrain.journal import Decided
from pipelines.retrain.outcome import PassOutcome
from pipelines.retrain.validate import CheckedArrival, write_hashes


class GateStopError(Exception):
    """The gate stops a task: those behind it must be learned without it, so learning ends here."""


class Learning:
    """The learning phase of one pass."""

    def __init__(self, context: PassContext, base: Sequence[Decided], policy: Policy,
                 policy_id: str, training_id: str, done: PassOutcome,
                 reject: Callable[[Arrival, DivergedError], None],
                 registry_answers: Callable[[], None]) -> None:
        """base: the champion's tasks, on top of which new tasks are learned. policy_id,
        training_id: hashes of the policy and of the options of training. reject: rejects an
        arrival whose training diverged. registry_answers: waits until the registry can be written
        to, and raises its error.
        """
        self.reject, self.registry_answers = reject, registry_answers
        self.context, self.base, self.done = context, list(base), done
        self.policy, self.policy_id, self.training_id = policy, policy_id, training_id
        self.execution = open_execution(context.config, context.storage, context.stream,
                                        context.progress)
        self.execution.known = context.seen.learned
        self.facts: dict[str, GateFacts] = {}
        """The gate's facts about the tasks that were learned, by lineage id."""

    def run(self, waiting: list[CheckedArrival]) -> list[Decided]:
        """Learns and registers the waiting tasks; returns the tasks of the champion afterwards."""
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
                                       [task.prefix for task in self.base])
                self.registry_answers()
                self.context.lease.check()
                learned, diverged = self._learn(cut, slots, lineage_ids)
                context.clock.lap("learn")
                waiting = self._decide_all(waiting, slots, learned, key)
                if diverged:
                    waiting = self._without(diverged, waiting)
                self.execution.forget_run(lineage_ids)
                context.clock.lap("register")
        self.done.notes += self.execution.notes
        return self.base

    def _parts(self, first: CheckedArrival) -> tuple[str, TrunkAndHead]:
        """Key of the stream's network, and the network cut; a new stream trains it on `first`."""
        context, trained = self.context, self.context.config.backbone.trains_trunk
        assert first.experience is not None
        if self.base:
            key, cut = self.base[0].network, context.cut(self.base)
        else:
            key = network_key(context.config, first.experience) if trained else ""
            cut = cut_network(context.config, self.execution.network(first.experience))
        context.clock.lap("trunk")
        return key, cut

    def _slots(self, waiting: Sequence[CheckedArrival], cut: TrunkAndHead) -> list[Slot]:
        """The champion's slots and the new ones; computes the features of the new ones."""
        experiences = [task.experience for task in waiting if task.experience is not None]
        jobs = feature_jobs(self.context.config, experiences, cut.trunk)
        manifests, decoded = self.execution.features(jobs, cut)
        self.done.images_decoded += decoded
        self.context.clock.lap("features")
        return self.context.slots(self.base) + slots_of(experiences, jobs, manifests)

    def _learn(self, cut: TrunkAndHead, slots: Sequence[Slot],
               lineage_ids: Sequence[str]) -> tuple[list[lineage.Learned], DivergedError | None]:
        """Learns the slots, up to the first that the gate stops if they are learned in this
        process: there each is judged while the next ones are learned. Those that were learned at
        the same time and lie behind it are learned again without it, as are those behind a task
        that diverged, whose error is returned.
        """
        diverged = None
        def judge(_: str, record: EpochRecord | TaskRecord) -> None:
            end = record.task_index + 1
            if isinstance(record, TaskRecord) and end > len(self.base):
                learned = self.execution.learned(lineage_ids[:end])
                if not decide(self.policy, self._facts(slots[:end], learned)).passed:
                    raise GateStopError

        try:
            self.execution.learn(cut, slots, lineage_ids,
                                 judge if self.execution.ends_at_errors else lambda *_: None)
        except GateStopError:
            pass
        except DivergedError as error:
            if error.task not in [slot.name for slot in slots[len(self.base):]]:
                raise
            diverged = error.with_traceback(None)  # which holds the model that was trained
        if (newest := self.execution.newest) is not None:
            newest[1].strategy.requires_grad_(False).eval()
            self.context.seen.model = newest
        return self.execution.learned(lineage_ids), diverged

    def _without(self, diverged: DivergedError,
                 waiting: Sequence[CheckedArrival]) -> list[CheckedArrival]:
        """Rejects the task that diverged; returns those that can be learned without it."""
        rest = []
        for task in waiting:
            if task.experience is not None and task.experience.name == diverged.task:
                self.reject(task.arrival, diverged)
            else:
                rest.append(task)
        return self._learnable(rest)

    def _learnable(self, waiting: Sequence[CheckedArrival]) -> list[CheckedArrival]:
        """Those of the waiting tasks that are new, or refresh one that is learned or new: a refresh
        of a stopped task must wait.
        """
        known, found = {task_of(task.slot) for task in self.base}, []
        for other in waiting:
            if not other.arrival.part or other.arrival.task in known:
                found.append(other)
                known.add(other.arrival.task)
        return found

    def _facts(self, slots: Sequence[Slot], learned: Sequence[lineage.Learned]) -> GateFacts:
        """The gate's facts about the last of the slots, measured once."""
        lineage_id = learned[-1].prefix
        if lineage_id not in self.facts:
            self.facts[lineage_id] = gate_facts(self.context, slots, learned, self.policy)
        return self.facts[lineage_id]

    def _decide_all(self, waiting: list[CheckedArrival], slots: Sequence[Slot],
                    learned: Sequence[lineage.Learned], network: str) -> list[CheckedArrival]:
        """Lets the gate decide on the learned tasks in order, and registers them.

        If one is stopped, returns the tasks after it, which must be learned again without it.
        """
        first, registered = len(slots) - len(waiting), list[Version]()
        still_waiting = waiting[len(learned) - first:]
        for offset, checked in enumerate(waiting[:len(learned) - first]):
            index = first + offset
            new = self._decide(checked, slots[:index + 1], learned[:index + 1], network,
                               learned[-1].prefix)
            self.context.journal.append(self.context.lease, "decided", dataclasses.asdict(new))
            self.context.lease.check()
            version = register(self.context, self.context.journal.decided(), new)
            registered.append(version)
            Inbox(self.context.storage).accept(checked.arrival)
            self.done.learned.append({
                "slot": new.slot, "stream": self.context.stream, "version": version.version,
                "decision": dict(new.decision), "seconds": dict(new.seconds),
                "added_bytes": dict(new.added_bytes), "prefix": new.prefix})
            if not new.passed:
                still_waiting = self._learnable(waiting[offset + 1:])
                break
            self.base.append(new)
        self.context.journal.note_versions(self.context.lease, registered)
        return still_waiting

    def _decide(self, checked: CheckedArrival, slots: Sequence[Slot],
                learned: Sequence[lineage.Learned], network: str, newest: str) -> Decided:
        """Asks the gate. newest: lineage id of the newest model that was learned in this run."""
        context, experience, slot = self.context, checked.experience, slots[-1]
        assert experience is not None
        write_hashes(context.storage, context.hashes(experience.fingerprint), checked.hashes)
        context.seen.hashes[experience.fingerprint] = checked.hashes
        record, done = learned[-1].record, learned[-1]
        keep_sample(context, done.prefix, experience, newest)
        facts = self._facts(slots, learned)
        model_bytes = shared.added_bytes(context.storage.filesystem, context.folder, done.prefix,
                                         done.parent)
        return Decided(
            slot.name, slot.classes, slot.fingerprint, slot.transform,
            {split: dataclasses.asdict(manifest.recipe)
             for split, manifest in slot.manifests.items()},
            checked.arrival.signature, self.policy_id, done.prefix, done.parent, network,
            decide(self.policy, facts).fields(),
            {"features": round(feature_seconds(slot), 3), "train": round(record.train_seconds, 3),
             "evaluate": round(record.evaluate_seconds, 3)},
            {"features": sum(manifest.bytes for manifest in slot.manifests.values()),
             "model": model_bytes, "task": done.task_bytes},
            example_of(experience, context.config), training=self.training_id)
