"""A learned task on its way to the registry: what the gate is told, and how a version is made."""

import base64
import dataclasses
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from partialhn import chain, checkpoint
from partialhn.checkpoint import Model
from partialhn.config import Config
from partialhn.datasets import decode_images
from partialhn.errors import IntegrityError
from partialhn.metrics import StreamMetrics, summarise
from partialhn.slots import Slot, open_features
from partialhn.store import FeatureSet, FeatureStore
from partialhn.stream import Experience, refreshed, task_of
from partialhn.train import evaluate
from pipelines.features import open_store
from pipelines.gate import GateFacts, Policy
from pipelines.journal import Decided, chain_to
from pipelines.package import Contents
from pipelines.registry import Placing, Registry
from pipelines.storage import Storage
from pipelines.versions import Registration, Version

WORK = "retrain"
"""The stream's own run in MLflow; every version has a run of its own below it."""
MAX_EXAMPLE = 32 * 1024


def gate_facts(store: FeatureStore, folder: str, slots: Sequence[Slot],
               learned: Sequence[chain.Learned], policy: Policy) -> GateFacts:
    """What was measured of the last of the slots, on every task's test images.

    An earlier task is held against the best it ever reached; one that is refreshed against its
    old slot, on the test images of both.
    """
    names = [slot.name for slot in slots]
    rows = [each.record.accuracy_row for each in learned]
    last, task = len(slots) - 1, task_of(names[-1])
    answering = {task_of(name): index for index, name in enumerate(names)}
    after = {each: rows[last][index] for each, index in answering.items()}
    before = {each: max(row[index] for row in rows[index:last])
              for each, index in answering.items() if each != task}
    with tempfile.TemporaryDirectory() as scratch:
        old = refreshed(names, last)
        if old is not None:
            copy = chain.fetch_model(store.filesystem, folder, learned[last].prefix,
                                     Path(scratch) / "model")
            test = open_features(store, slots, len(slots))[last].test
            before[task] = evaluate(Model.load(copy).strategy, old, test)
        probe = None
        if policy.min_against_linear_probe is not None:
            features = open_features(store, slots, last)[last]
            assert features.train is not None
            probe = linear_probe(features.train, features.test)
    record = learned[last].record
    seconds = feature_seconds(slots[last]) + record.train_seconds + record.evaluate_seconds
    return GateFacts(task, len(slots[last].classes), after, before, probe, round(seconds, 3),
                     learned[last].task_bytes)


def feature_seconds(slot: Slot) -> float:
    """Time that a slot's features took to decode, compute and write."""
    return sum(shard.seconds for manifest in slot.manifests.values() for shard in manifest.shards)


def linear_probe(train: FeatureSet, test: FeatureSet) -> float:
    """Accuracy of a logistic regression on the trunk's pooled features, plain views."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def pooled(features: FeatureSet) -> np.ndarray:
        parts = [features.gather(rows_B, torch.zeros_like(rows_B)).mean((2, 3))
                 for rows_B in torch.split(torch.arange(len(features)), 1024)]
        return np.asarray(torch.cat(parts).numpy())

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(pooled(train), train.y_N.numpy())
    return float(probe.score(pooled(test), test.y_N.numpy()))


def example_of(experience: Experience, config: Config) -> str:
    """A test image of the task, base64: small, because the log keeps it."""
    image = experience.test.take([0]).read()[0]
    if len(image) > MAX_EXAMPLE:
        from PIL import Image

        decoded = decode_images([image], ["example"], config.data.input_size,
                                max_pixels=config.data.max_image_pixels)
        sink = io.BytesIO()
        Image.fromarray(decoded.images_BCHW[0].permute(1, 2, 0).numpy()).save(sink, "PNG")
        image = sink.getvalue()
    return base64.b64encode(image).decode()


def summary_of(learned: Sequence[chain.Learned]) -> StreamMetrics:
    """The metrics of a chain of tasks."""
    rows = [each.record.accuracy_row for each in learned]
    return summarise([[*row, *[None] * (len(rows) - len(row))] for row in rows])


@dataclasses.dataclass(frozen=True)
class Registering:
    """Makes versions of decided tasks; what was made before is found again."""

    storage: Storage
    registry: Registry
    stream: str
    folder: str
    """Where the learned models are."""
    config: Config
    token: int
    """Of the lease that this is done under."""

    def register(self, decided: Sequence[Decided], new: Decided) -> Version:
        """The version of a decided task, promoted where the gate let it pass."""
        tasks = chain_to(decided, new.prefix)
        learned = chain.find(self.storage.filesystem, self.folder,
                             [each.prefix for each in tasks])
        if len(learned) != len(tasks):
            raise IntegrityError(f"the model of {new.slot} is decided and not at {self.folder}: "
                                 f"of {len(tasks)} tasks {len(learned)} are there")
        summary, index = summary_of(learned), len(tasks) - 1
        metrics = {"acc": summary.accuracy, "learning_accuracy": summary.learning_accuracy,
                   "forgetting": summary.forgetting, "bwt": summary.backward_transfer}
        parent = self.registry.stream_run(self.stream, WORK, self.config.to_dict())
        run = self.registry.task_run(parent, new.slot, index, new.prefix)
        self.registry.log_epochs(run, [dataclasses.asdict(each) for each in learned[-1].epochs])
        self.registry.log_metrics(run, metrics)
        with tempfile.TemporaryDirectory() as scratch:
            copy = chain.fetch_model(self.storage.filesystem, self.folder, new.prefix,
                                     Path(scratch) / "model")
            version = self.registry.register_task(
                run, self._registration(new, index, summary, copy),
                Contents(copy, task_of(new.slot), base64.b64decode(new.example)),
                self._placing(new))
        self.registry.end_run(run)
        if new.passed:
            self.registry.log_metrics(parent, metrics, step=index)
        return version

    def _registration(self, new: Decided, index: int, summary: StreamMetrics,
                      copy: Path) -> Registration:
        slot = new.with_features(open_store(self.storage))
        return Registration(
            stream=self.stream, work=new.prefix[:12], task=task_of(new.slot), task_index=index,
            classes=new.classes, trunk_fingerprint=next(iter(new.recipes.values()))["trunk"],
            feature_keys=tuple(manifest.key for manifest in slot.manifests.values()),
            weights_hash=checkpoint.load(copy, "model")[1]["weights_hash"], acc=summary.accuracy,
            learning_accuracy=summary.learning_accuracy, forgetting=summary.forgetting,
            storage=self.storage.uri, prefix=new.prefix, parent=new.parent)

    def _placing(self, new: Decided) -> Placing:
        if not new.passed:
            return Placing(False, "gate-rejected", "; ".join(new.decision["reasons"]), self.token,
                           new.decision)
        kind = "refresh" if "/" in new.slot else "trained"
        why = f"task {new.slot} passed the gate"
        return Placing(True, kind, why, self.token, new.decision)
