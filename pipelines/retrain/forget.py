"""`partialhn models forget-task`: a new version of the champion without one of its tasks.

    lease -> repair an interrupted pass -> models without the task -> gate
    -> log, version, aliases -> report

The chain of learned models goes on without the task: the models from the task's place on are stored
once more without it, each under a lineage id of its own, so that later tasks and refreshes find
what they start from. The newest of them becomes a version. Older versions stay registered, and a
rollback brings the task back.
"""

import base64
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from partialhn.checkpoints.model import Model
from partialhn.data.experience import newest_slots, task_of
from partialhn.errors import InputError
from partialhn.evaluation.answer_sample import read_sample, sample_again
from partialhn.evaluation.task_inference_metrics import without_task_id
from partialhn.features.feature_set import FeatureSet
from partialhn.predict import Predictor
from partialhn.training import lineage
from partialhn.training.answers import evaluate
from partialhn.training.forgetting import (
    id_without,
    records_without,
    slots_of_task,
    stays,
    without_slots,
)
from partialhn.training.records import Forgotten, TaskRecord
from partialhn.training.result import model_sizes
from partialhn.training.slots import open_task_features
from pipelines.gate import Decision, Policy, decide_without
from pipelines.registry import package
from pipelines.registry.history import this_user
from pipelines.retrain.candidate import register
from pipelines.retrain.context import PassContext
from pipelines.retrain.journal import Decided, forgotten_by
from pipelines.retrain.outcome import PassOutcome
from pipelines.retrain.run import Log, Pass, with_pass
from pipelines.settings import RetrainConfig


def forget_task(settings: RetrainConfig, task: str, why: str, log: Log = print) -> PassOutcome:
    """Makes a version of the stream's champion without a task.

    why: the reason, for the history, the model and messages. Raises: InputError for any error that
    the user can correct, and if another process is working on the stream.
    """
    def work(opened: Pass) -> None:
        if opened.registry is not None and not opened.journal.decided():
            opened.registry.versions(settings.name)  # says so where there is no such stream
        opened.hold(partial(_look, opened, task), partial(_forget, opened, task, why))

    done = with_pass(settings, work, log)
    if done.held_by:
        raise InputError(f"stream {settings.name!r} is in use by another process ({done.held_by}); "
                         "allowed: to try again when it has ended")
    return done


def _look(opened: Pass, task: str) -> None:
    """A dry run."""
    base = opened.look_at_base()
    plan = Plan.of(base, task)
    opened.done.would += [
        f"make a version without task {task!r}, with "
        + ", ".join(dict.fromkeys(task_of(base[place].slot) for place in plan.kept)),
        f"store {len(plan.changed)} models once more without it"]
    opened.done.would += [f"keep {text}" for text in _stays(opened, base, plan)]


def _stays(opened: Pass, base: Sequence[Decided], plan: "Plan") -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = opened.storage.path("runs", opened.settings.name, "learned")
        copy = lineage.fetch_model(opened.storage.filesystem, folder, base[-1].prefix,
                                   Path(scratch) / "model")
        return stays(Model.load(copy), plan.gone)


def _forget(opened: Pass, task: str, why: str, context: PassContext) -> None:
    base = opened.take_base(context)
    forgetting = Forgetting(context, base, task, why)
    chain = forgetting.run(opened.policy)
    context.clock.lap("forget")
    version = register(context, context.journal.decided(), chain[-1])
    context.clock.lap("register")
    opened.done.learned.append({
        "slot": chain[-1].slot, "stream": context.stream, "version": version.version,
        "decision": dict(chain[-1].decision), "seconds": {}, "added_bytes": {},
        "prefix": chain[-1].prefix, "forgotten": task,
        "stays": list(chain[-1].forgotten[-1]["stays"])})
    opened.conclude(context, chain if chain[-1].passed else base)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The places, in the champion's chain, of the slots that go and of those that stay."""

    gone: tuple[int, ...]
    kept: tuple[int, ...]

    @staticmethod
    def of(base: Sequence[Decided], task: str) -> "Plan":
        """Raises: InputError for an unknown task, or the only one."""
        if not base:
            raise InputError(f"task is {task!r}, but the stream has no champion yet; allowed: a "
                             "task that was learned")
        gone = slots_of_task([each.slot for each in base], task)
        return Plan(tuple(gone), tuple(place for place in range(len(base)) if place not in gone))

    @property
    def changed(self) -> list[int]:
        """The places of the chain's models that are stored once more: those that know the task, and
        the newest, which becomes the version.
        """
        return [place for place in self.kept if place > self.gone[0] or place == self.kept[-1]]


class Forgetting:
    """The models without a task, and the log's entry about it."""

    def __init__(self, context: PassContext, base: Sequence[Decided], task: str,
                 why: str) -> None:
        self.context, self.base, self.task, self.why = context, base, task, why
        self.plan = Plan.of(base, task)
        context.cut(base)
        self.slots = context.slots(base)

    def run(self, policy: Policy) -> list[Decided]:
        """Stores the models and lets the gate decide; returns the tasks of the new chain."""
        changed = self.plan.changed
        chain = [self.base[place] for place in self.plan.kept if place not in changed]
        for place in changed[:-1]:
            chain.append(self._kept(place, chain))
        chain.append(self._newest(changed[-1], chain, policy))
        self.context.journal.append(self.context.lease, "forgot", {
            "task": self.task, "why": self.why, "from": self.base[-1].prefix,
            "kept": [dataclasses.asdict(each) for each in chain[-len(changed):]]})
        return chain

    def _kept(self, place: int, chain: Sequence[Decided]) -> Decided:
        """A task between the forgotten one and the newest; its model is stored once more."""
        old = self.base[place]
        model, _ = self._without(old.prefix, place)
        done = self._store(model, old.prefix, place, chain)
        return dataclasses.replace(old, prefix=done.prefix, parent=done.parent,
                                   stands_for=old.stands_for or old.prefix)

    def _newest(self, place: int, chain: Sequence[Decided], policy: Policy) -> Decided:
        """The newest task that stays; its model is the champion's without the forgotten task."""
        old, champion = self.base[place], self.base[-1].prefix
        model, left = self._without(champion, len(self.base) - 1)
        forgotten = Forgotten(self.task, self.base[self.plan.gone[-1]].classes, self.why,
                              this_user(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                              left)
        known = {**forgotten_by(self.base), self.task: forgotten}
        facts = tuple(map(dataclasses.asdict, known.values()))
        model.facts[lineage.FORGOTTEN] = list(facts)
        done = self._store(model, champion, place, chain)
        example = self._keep_sample(old, done.prefix, model)
        return dataclasses.replace(
            old, prefix=done.prefix, parent=done.parent, forgotten=facts, adopted=False,
            stands_for="", example=old.example or example,
            decision=self._decision(policy, done.record.accuracy_row).fields())

    def _without(self, lineage_id: str, place: int) -> tuple[Model, tuple[str, ...]]:
        """The model with this id, of the slots up to a place, without the task; and what stays."""
        context = self.context
        with tempfile.TemporaryDirectory() as scratch:
            copy = lineage.fetch_model(context.storage.filesystem, context.folder, lineage_id,
                                       Path(scratch) / "model")
            model = Model.load(copy)
        gone = [slot for slot in self.plan.gone if slot <= place]
        return without_slots(model, gone, self._train(gone)), stays(model, gone)

    def _train(self, gone: Sequence[int]) -> FeatureSet | None:
        """Training features of the forgotten task, from these slots; None if some are missing."""
        if any("train" not in self.slots[slot].manifests for slot in gone):
            return None
        last = gone[-1]
        return open_task_features(self.context.store, self.slots[:last + 1], (last,))[last].train

    def _store(self, model: Model, source: str, place: int,
               chain: Sequence[Decided]) -> lineage.Learned:
        """Keeps a model without the task, with the records of how the task at a place was learned.

        source: lineage id of the model that it was made of. The newest is measured again.
        """
        context = self.context
        (old,) = context.learned([self.base[place]])
        done = records_without(old, self.plan.gone, id_without(source, self.task),
                               chain[-1].prefix if chain else "")
        if lineage.FORGOTTEN in model.facts:
            done = dataclasses.replace(done, record=self._measured(model, done.record))
        model.facts |= model_sizes(model)
        context.lease.check()
        lineage.keep(model, done, context.storage.filesystem, context.folder)
        return done

    def _measured(self, model: Model, record: TaskRecord) -> TaskRecord:
        """The record with the model's accuracies on the test images of every task that stays."""
        slots = [self.slots[place] for place in self.plan.kept]
        tests = [task.test for task in open_task_features(self.context.store, slots, ())]
        row = tuple(evaluate(model.strategy, index, test) for index, test in enumerate(tests))
        without_id = None
        if model.inference is not None:
            newest = newest_slots([slot.name for slot in slots])
            without_id = without_task_id(model.strategy, model.inference, tests,
                                         list(newest.values()),
                                         classes=[slot.classes for slot in slots])
        return dataclasses.replace(record, accuracy_row=row, without_id=without_id, measured=None)

    def _decision(self, policy: Policy, row: Sequence[float]) -> Decision:
        """The gate's decision: each task that stays against the best that it ever had.

        row: accuracies of the slots that stay.
        """
        learned = self.context.learned(self.base)
        newest = {task_of(self.base[place].slot): place for place in self.plan.kept}
        before = {task: max(each.record.accuracy_row[place] for each in learned[place:])
                  for task, place in newest.items()}
        after = {task: row[self.plan.kept.index(place)] for task, place in newest.items()}
        return decide_without(policy, self.task, after, before)

    def _keep_sample(self, old: Decided, lineage_id: str, model: Model) -> str:
        """Stores the test images of the version of the newest task that stays, with the new model's
        answers. Returns the first of them, base64.
        """
        context = self.context
        version = context.registry.version_of(context.stream, old.stands_for or old.prefix)
        if version is None:
            raise InputError(f"the version of task {old.slot!r} is not in the registry, from which "
                             "test images are taken; allowed: a stream with all its versions")
        with tempfile.TemporaryDirectory() as scratch:
            folder, path = Path(scratch) / "version", Path(scratch) / "sample.parquet"
            folder.mkdir()
            sample = read_sample(package.artifact(context.registry.download_sound(version, folder),
                                                  "sample"))
            first = sample_again(path, Predictor(model), sample)
            context.storage.put_if_absent(context.sample(lineage_id), path.read_bytes())
        return base64.b64encode(first).decode()
