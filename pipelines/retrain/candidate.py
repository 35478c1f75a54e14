"""A candidate: a learned task that the gate decides on and that is registered as a version."""

import base64
import dataclasses
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from partialhn.checkpoints import FIELDS, shared
from partialhn.config import Config
from partialhn.data.decode import decode_images
from partialhn.data.experience import Experience, newest_slots, refreshed, task_of
from partialhn.errors import IntegrityError
from partialhn.evaluation.answer_sample import write_sample
from partialhn.evaluation.doubts import doubts
from partialhn.evaluation.linear_probe import linear_probe
from partialhn.evaluation.metrics import StreamMetrics
from partialhn.json_files import read_object
from partialhn.predict import Predictor
from partialhn.training import lineage
from partialhn.training.answers import evaluate
from partialhn.training.result import stream_metrics
from partialhn.training.slots import Slot, images_behind, open_task_features
from pipelines.gate import GateFacts, Policy
from pipelines.registry.client import Placing
from pipelines.registry.history import Move, aliases
from pipelines.registry.package import Contents
from pipelines.registry.versions import Registration, Version, task_alias
from pipelines.retrain.context import PassContext
from pipelines.retrain.journal import Decided, chain_to

WORK = "retrain"
"""Tag `work` of the stream's parent run in MLflow; every version has a child run of its own."""
MAX_EXAMPLE = 32 * 1024
"""Largest example image in bytes; a larger one is reduced."""


def gate_facts(context: PassContext, slots: Sequence[Slot], learned: Sequence[lineage.Learned],
               policy: Policy) -> GateFacts:
    """The gate's facts about the last of the slots, measured on every task's test images.

    An earlier task is compared with the best accuracy that it ever had. A refreshed task is
    compared with its old slot, on the test images of both slots.
    """
    names = [slot.name for slot in slots]
    rows = [model.record.accuracy_row for model in learned]
    last, task = len(slots) - 1, task_of(names[-1])
    newest_slot = newest_slots(names)
    after = {name: rows[last][index] for name, index in newest_slot.items()}
    before = {name: max(row[index] for row in rows[index:last])
              for name, index in newest_slot.items() if name != task}
    old = refreshed(names, last)
    if old is not None:
        test = open_task_features(context.store, slots, ())[last].test
        before[task] = evaluate(context.model(learned[last].prefix)[0].strategy, old, test)
    probe = None
    if policy.min_against_linear_probe is not None:
        features = open_task_features(context.store, slots, (last,))[last]
        assert features.train is not None
        probe = linear_probe(features.train, features.test, len(slots[last].classes))
    record = learned[last].record
    seconds = feature_seconds(slots[last]) + record.train_seconds + record.evaluate_seconds
    return GateFacts(task, len(slots[last].classes), after, before,
                     images_behind(slots, last, "test"), probe, round(seconds, 3),
                     learned[last].task_bytes, _doubts(context.config, slots, learned[last]))


def _doubts(config: Config, slots: Sequence[Slot], learned: lineage.Learned) -> tuple[str, ...]:
    """Doubts about the last of the slots."""
    epoch, last = learned.epochs[-1], len(slots) - 1
    losses = [epoch.cross_entropy for epoch in learned.epochs if epoch.passes]
    return doubts(learned.record.accuracy_row[-1], images_behind(slots, last, "test"),
                  len(slots[last].classes), epoch.validation_accuracy, epoch.ridge_accuracy,
                  images_behind(slots, last, "validation"), losses, config.train.learning_rate)


def feature_seconds(slot: Slot) -> float:
    """Seconds that a slot's features took to decode, compute and write."""
    return sum(shard.seconds for manifest in slot.manifests.values() for shard in manifest.shards)


def example_of(experience: Experience, config: Config) -> str:
    """A test image of the task, base64; reduced if it is large, because the log stores it."""
    image = experience.test.take([0]).read()[0]
    if len(image) > MAX_EXAMPLE:
        from PIL import Image

        decoded = decode_images([image], ["example"], config.data.input_size,
                                max_pixels=config.data.max_image_pixels)
        sink = io.BytesIO()
        Image.fromarray(decoded.images_BCHW[0].permute(1, 2, 0).numpy()).save(sink, "PNG")
        image = sink.getvalue()
    return base64.b64encode(image).decode()


def keep_sample(context: PassContext, lineage_id: str, experience: Experience,
                later: str = "") -> None:
    """Stores test images of a task with its model's predictions, for `models verify`.

    later: lineage id of a later model, which is asked instead if it answers for the task with the
    same weights; of the tasks that are learned together, only the newest model is then loaded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = context.model(later or lineage_id)[0]
        slots = [slot.name for slot in model.tasks]
        place = slots.index(experience.name)
        is_last = task_of(experience.name) not in map(task_of, slots[place + 1:])
        if later and not (is_last and model.strategy.answers_by(place)):
            model = context.model(lineage_id)[0]
        sample = Path(scratch) / "sample.parquet"
        write_sample(sample, Predictor(model), [experience])
        context.storage.put_if_absent(context.sample(lineage_id), sample.read_bytes())


def register(context: PassContext, decided: Sequence[Decided], new: Decided) -> Version:
    """Registers the version of a decided task, and promotes it if it passed the gate.

    A version that is registered already is not registered again. Raises: IntegrityError if a model
    of the chain is missing.
    """
    tasks = chain_to(decided, new.prefix)
    learned = context.learned(tasks)
    if len(learned) != len(tasks):
        raise IntegrityError(f"the log has a decision on {new.slot}, but only {len(learned)} of "
                             f"the {len(tasks)} models up to it are stored in {context.folder}")
    summary, metrics = stream_metrics([each.record for each in learned])
    index, registry = len(tasks) - 1, context.registry
    parent = registry.stream_run(context.stream, WORK, context.config.to_dict())
    run = registry.task_run(parent, new.slot, index, new.prefix)
    registry.log_task(run, [dataclasses.asdict(each) for each in learned[-1].epochs], metrics)
    with tempfile.TemporaryDirectory() as scratch:
        copy = lineage.fetch_model(context.storage.filesystem, context.folder, new.prefix,
                                   Path(scratch) / "model", shared_apart=True)
        sample = Path(scratch) / "sample.parquet"
        sample.write_bytes(context.storage.read_bytes(context.sample(new.prefix)))
        contents = Contents(copy, task_of(new.slot), base64.b64decode(new.example), sample,
                            shared.reader(context.storage.filesystem, context.folder))
        version = registry.register_task(run, _registration(context, tasks, summary, copy),
                                         contents, _placing(context, new))
    registry.end_run(run)
    if new.passed:
        _release_aliases(context, new, version)
        registry.log_metrics(parent, metrics, step=index)
    return version


def _release_aliases(context: PassContext, new: Decided, version: Version) -> None:
    """Takes the alias of a task that the version has just forgotten away from the old version."""
    for fields in new.forgotten:
        alias = task_alias(str(fields["task"]))
        if alias in aliases(context.registry.aliases.history(context.stream).entries()):
            context.registry.aliases.move(context.stream, Move(
                alias, None, "forgot", f"{version.uri} has forgotten the task",
                token=context.lease.token))


def _registration(context: PassContext, tasks: Sequence[Decided], summary: StreamMetrics,
                  copy: Path) -> Registration:
    new, index = tasks[-1], len(tasks) - 1
    manifests = new.with_features(context.store).manifests.values()
    fields = read_object(copy / FIELDS, "checkpoint")
    return Registration(
        stream=context.stream, work=new.prefix[:12], task=task_of(new.slot), task_index=index,
        classes=new.classes, trunk_fingerprint=next(iter(new.recipes.values()))["trunk"],
        feature_keys=tuple(manifest.key for manifest in manifests),
        weights_hash=fields["weights_hash"], acc=summary.accuracy,
        learning_accuracy=summary.learning_accuracy, forgetting=summary.forgetting,
        storage=context.storage.uri, prefix=new.prefix, parent=new.parent,
        stands_on=tuple(task.stands_for or task.prefix for task in tasks[:-1]
                        ) if new.forgotten else (),
        forgotten=tuple(fields["facts"].get(lineage.FORGOTTEN, ())),
        without_task_id=fields["facts"]["chain"]["record"].get("without_id"))


def _placing(context: PassContext, new: Decided) -> Placing:
    if not new.passed:
        return Placing(False, "gate-rejected", "; ".join(new.decision["reasons"]),
                       context.lease.token, new.decision)
    if new.forgotten:
        *_, gone = new.forgotten
        return Placing(True, "forgot", f"task {gone['task']} is forgotten"
                       + (f": {gone['why']}" if gone["why"] else ""), context.lease.token,
                       new.decision)
    return Placing(True, "refresh" if "/" in new.slot else "trained",
                   f"task {new.slot} passed the gate", context.lease.token, new.decision)
