"""The measurements of a run: those fields of `result.json` that need no registry."""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

import partialhn
from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data.experience import newest_slots
from partialhn.evaluation.metrics import StreamMetrics, summarise
from partialhn.features.jobs import SPLITS
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord, class_incremental, fields_of
from partialhn.training.slots import Slot

LIBRARIES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy")
SIZES = ("trunk_bytes", "shared_bytes", "detector_bytes_per_task", "weights")
"""Keys of `model_sizes`, which a learned model has among its facts."""


class Clock:
    """Wall seconds of a run, by phase."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap to a phase."""
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one strategy on a stream."""

    epochs: tuple[EpochRecord, ...]
    finished: tuple[TaskRecord, ...]
    task_bytes: tuple[int, ...]
    """Bytes that each task added to the checkpoint."""

    @staticmethod
    def of(learner: Learner) -> "Outcome":
        """The outcome of a learner's tasks so far."""
        tasks = range(len(learner.finished))
        inference = learner.inference
        return Outcome(tuple(learner.epochs), tuple(learner.finished),
                       tuple(learner.strategy.task_bytes(task)
                             + (inference.task_bytes(task) if inference else 0)
                             for task in tasks))

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "Outcome":
        """Rebuilds an outcome from the fields that `dataclasses.asdict` and JSON gave."""
        return Outcome(tuple(EpochRecord(**record) for record in fields["epochs"]),
                       tuple(map(TaskRecord.from_fields, fields["finished"])),
                       tuple(fields["task_bytes"]))

    @property
    def accuracy_TT(self) -> list[list[float | None]]:
        """The accuracy matrix R as rows, with None above the diagonal."""
        total = len(self.finished)
        return [[*record.accuracy_row, *[None] * (total - len(record.accuracy_row))]
                for record in self.finished]

    def without_task_id(self) -> dict[str, float]:
        """The last task's metrics of task inference, with rejection_auroc averaged over all tasks.

        Empty if task inference was not learned.
        """
        metrics = [record.without_id for record in self.finished if record.without_id]
        if not metrics:
            return {}
        aurocs = [values["rejection_auroc"] for values in metrics if "rejection_auroc" in values]
        return metrics[-1] | ({"rejection_auroc": sum(aurocs) / len(aurocs)} if aurocs else {})

    @property
    def summary(self) -> StreamMetrics:
        """The metrics of the tasks, each of which counts once."""
        return summarise_records(self.finished)

    def fields(self) -> dict[str, Any]:
        """Metrics, seconds and bytes of this strategy."""
        summary = self.summary
        return {"acc": summary.accuracy, "learning_accuracy": summary.learning_accuracy,
                "forgetting": summary.forgetting, "bwt": summary.backward_transfer,
                "accuracy_matrix": self.accuracy_TT,
                "bytes_per_task": round(sum(self.task_bytes) / len(self.task_bytes)),
                "train_seconds": round(sum(r.train_seconds for r in self.finished), 3)}


def _table(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """The accuracy matrix of T rows R[i, 0..i], NaN above the diagonal."""
    table_TT = np.full((len(rows), len(rows)), np.nan)
    for place, row in enumerate(rows):
        table_TT[place, :len(row)] = row
    return table_TT


def summarise_records(records: Sequence[TaskRecord]) -> StreamMetrics:
    """The metrics of the tasks so far. A task that was learned again counts once, by its newest
    slot.
    """
    newest = newest_slots([record.task for record in records])
    return summarise(_table([record.accuracy_row for record in records]), sorted(newest.values()))


def stream_metrics(records: Sequence[TaskRecord]) -> tuple[StreamMetrics, dict[str, float]]:
    """The metrics of the tasks so far, and those of them that are logged, by name."""
    summary = summarise_records(records)
    logged = {"acc": summary.accuracy, "learning_accuracy": summary.learning_accuracy,
              "forgetting": summary.forgetting, "bwt": summary.backward_transfer}
    return summary, logged | {f"class_incremental_{key}": value
                              for key, value in class_incremental(records).items()}


def result_fields(config: Config, slots: Sequence[Slot], macs: Mapping[str, float], decoded: int,
                  outcomes: Mapping[str, Outcome], phases: Mapping[str, float],
                  notes: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of `result.json`, except names, versions and sizes of registered models.

    `decoded`: number of images decoded for features in this run. `phases`: seconds by phase.
    `notes`: what the user should know about the run.
    """
    ours = outcomes[config.train.strategy]
    features = [manifest for slot in slots for manifest in slot.manifests.values()]
    baselines = {name: outcome.fields() for name, outcome in outcomes.items()
                 if name != config.train.strategy}
    for fields in baselines.values():
        fields["seconds"] = fields.pop("train_seconds")
    own = ours.fields()
    del own["train_seconds"]
    return own | {
        "without_task_id": ours.without_task_id(),
        "class_incremental": class_incremental(ours.finished) | {
            "after_task": [(record.without_id or {}).get("acc") for record in ours.finished]},
        "config": config.to_dict(),
        "seed": config.train.seed, "strategy": config.train.strategy,
        "tasks": [_task_fields(slot) for slot in slots],
        "seconds": {"total": round(sum(phases.values()), 3),
                    "stages": {key: round(value, 3) for key, value in phases.items()},
                    "per_task": [{"name": record.task, "train": round(record.train_seconds, 3),
                                  "evaluate": round(record.evaluate_seconds, 3)}
                                 for record in ours.finished]},
        "feature_bytes": sum(manifest.bytes for manifest in features),
        "feature_keys": [manifest.key for manifest in features],
        "images_decoded": decoded, "notes": list(notes), "peak_rss_bytes": peak_rss_bytes(),
        "macs": dict(macs),
        "bounds": baselines, "epochs": list(map(fields_of, ours.epochs)),
        "partialhn_version": partialhn.__version__,
        "versions_of_libraries": _versions(LIBRARIES)}


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those libraries that are installed: this package alone needs neither Ray nor
    MLflow.
    """
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def model_sizes(model: Model) -> dict[str, Any]:
    """Weight counts and bytes of a model's trunk, shared parameters and generated weights, and the
    bytes that a task adds to what finds the task of an image where nobody says it.
    """
    def size(tensors: Mapping[str, Any]) -> int:
        return int(sum(value.numel() * value.element_size() for value in tensors.values()))

    strategy = model.strategy
    own = sum(strategy.task_bytes(task) for task in range(len(strategy.classes)))
    trunk, inference = model.trunk.state_dict(), model.inference
    found = [inference.task_bytes(task) for task in range(len(strategy.classes))
             ] if inference is not None else []
    return {"trunk_bytes": size(trunk), "shared_bytes": size(strategy.state_dict()) - own,
            "detector_bytes_per_task": round(sum(found) / max(1, len(found))),
            "weights": {"generated": strategy.head.weight_count,
                        "trunk": sum(value.numel() for value in trunk.values())}}


def _task_fields(slot: Slot) -> dict[str, Any]:
    images = {f"{split}_images": slot.manifests[split].rows if split in slot.manifests else 0
              for split in SPLITS}
    return {"name": slot.name, "classes": list(slot.classes), **images,
            "bad_images": [{"id": name, "reason": reason} for manifest in slot.manifests.values()
                           for name, reason in manifest.bad],
            "transform": slot.transform}


def peak_rss_bytes() -> int:
    """Peak resident memory of this process or of a child process that has ended, in bytes."""
    # Linux gives kibibytes
    return 1024 * max(resource.getrusage(who).ru_maxrss
                      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
