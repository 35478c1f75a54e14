"""Publishes the champion of a retrained stream: its accuracy matrix, result.json and report."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.model import Model
from partialhn.data.experience import task_of
from partialhn.evaluation.answer_sample import read_sample
from partialhn.numbers import now
from partialhn.training import lineage
from partialhn.training.result import SIZES, Outcome, model_sizes, peak_rss_bytes, result_fields
from partialhn.training.review import review, sample_examples
from partialhn.training.slots import Slot
from pipelines.registry.versions import CHAMPION, Version
from pipelines.report.page import write_report
from pipelines.retrain.candidate import WORK
from pipelines.retrain.context import PassContext
from pipelines.retrain.journal import Decided, Journal, forgotten_by


def published(journal: Journal) -> str:
    """Lineage id of the model in the newest report; empty before the first report."""
    return next((str(event.fields["prefix"]) for event in reversed(journal.events())
                 if event.kind == "published"), "")


def _versions(context: PassContext, base: Sequence[Decided]) -> list[dict[str, Any]]:
    """The entries `versions` of result.json. The registry is asked only for what the log lacks."""
    noted = context.journal.versions()
    wanted = {task.prefix for task in base if not task.stands_for}  # others have no version
    if wanted - noted.keys():
        context.journal.note_versions(context.lease, [
            version for version in context.registry.versions(context.stream)
            if version.tags["prefix"] in wanted])
        noted = context.journal.versions()
    aliases_of = context.registry.aliases_of(context.stream)
    return [Version(context.stream, number, run_id, aliases_of.get(number, ()),
                    {"task": task_of(task.slot)}).fields()
            for task in base if task.prefix in noted
            for number, run_id in [noted[task.prefix]]]


def publish(context: PassContext, base: Sequence[Decided], notes: Sequence[str] = (),
            decoded: int = 0) -> None:
    """Logs the champion's matrix, result and report to the stream's run in MLflow.

    notes: what the user should know about this pass. decoded: number of images that it decoded for
    features.
    """
    registry, name = context.registry, context.stream
    cut = context.cut(base)
    slots = context.slots(base)
    lineage_ids = [task.prefix for task in base]
    outcome = lineage.outcome_of(context.learned(base))
    model, size = context.model(lineage_ids[-1])
    fields = result_fields(context.config, slots, cut.macs, decoded,
                           {context.config.train.strategy: outcome}, context.clock.laps,
                           [*notes, *model.strategy.notes])
    stored = checkpoint.read_fields(context.storage.filesystem,
                                    f"{context.folder}/{lineage_ids[-1]}")
    weights_hash = stored["weights_hash"] if stored else model.weights_hash()
    versions = _versions(context, base)
    sizes = model.facts if model.facts.keys() >= set(SIZES) else model_sizes(model)
    fields |= {key: sizes[key] for key in SIZES} | {
        "name": name, "work": lineage_ids[-1][:12], "weights_hash": weights_hash,
        "checkpoint_bytes": size, "of_pass": True,  # stages and memory
        "device": "learned on the devices that the tasks' runs name",
        "peak_rss_bytes": peak_rss_bytes(), "storage": context.storage.uri,
        "tracking_uri": registry.tracking_uri, "model_uri": f"models:/{name}@{CHAMPION}",
        "versions": versions, "finished": now()}
    if not any(task.adopted for task in base):
        fields["config"]["data"]["data"] = "inbox"  # whatever the option says
    fields["review"] = _review(context, base, model, slots, outcome)
    policies = [task.decision["policy"] for task in base if task.decision.get("policy")]
    if policies:
        fields["policy"] = policies[-1]
    if gone := forgotten_by(base):
        fields["forgotten"] = [dataclasses.asdict(task) for task in gone.values()]
    for note in model.strategy.notes:
        context.progress.line(f"NOTE {note}")
    context.lease.check()
    parent = registry.stream_run(name, WORK, context.config.to_dict())
    registry.log_matrix(parent, fields["accuracy_matrix"], [slot.name for slot in slots])
    registry.log_result(parent, fields)
    with tempfile.TemporaryDirectory() as scratch:
        registry.log_file(parent, write_report(fields, Path(scratch) / "report.html"))
    registry.end_run(parent)
    context.journal.append(context.lease, "published", {"prefix": lineage_ids[-1]})


def _review(context: PassContext, base: Sequence[Decided], model: Model, slots: Sequence[Slot],
            outcome: Outcome) -> list[dict[str, Any]]:
    """A closer look at the tasks, for the report; example images are those of the stored samples,
    which a task that was taken over does not have.
    """
    if len(model.tasks) != len(slots):
        return []
    reviews = review(model, slots, context.store, outcome.finished[-1].accuracy_row,
                     outcome.epochs, {})
    for each in reviews:
        path = context.sample(base[each["index"]].prefix)
        if context.storage.exists(path):
            with tempfile.TemporaryDirectory() as scratch:
                sample = Path(scratch) / "sample.parquet"
                sample.write_bytes(context.storage.read_bytes(path))
                each["examples"] = sample_examples(read_sample(sample).to_pylist())
    return reviews
