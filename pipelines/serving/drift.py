"""Drift detection: compares the features of images from live traffic with held-out ones.

For each task it takes principal components of the held-out features (at most COMPONENTS), tests the
live features on each of them with a Kolmogorov-Smirnov test (`scipy.stats.ks_2samp`), and applies
Bonferroni's correction over components and tasks. In Rabanser et al. 2019 ("Failing Loudly")
univariate tests on reduced dimensions detected shifts at least as well as kernel tests. Their
p-values need no permutations, and they show the direction of the shift.

The reference is the held-out features (validation and test), not those of training: the trunk was
trained on images of the first task, so their features differ from those of new images.

Legend: N held-out images, M live images, B images of a batch, C channels of pooled features,
D components.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from partialhn.config import ComputeConfig
from partialhn.data.experience import task_of
from partialhn.errors import InputError
from partialhn.features.manifest import Manifest
from partialhn.features.store import FeatureStore
from partialhn.numbers import counted, percent
from partialhn.task_inference import NONE, pooled
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage, open_storage
from pipelines.platform.text import padded, shown_width
from pipelines.registry.client import Registry, connect
from pipelines.registry.versions import Version, chain_of
from pipelines.serving.live import (
    EXAMPLES,
    FEWEST,
    NEW_TASK_SHARE,
    Live,
    read_live,
    seems_new,
)

COMPONENTS = 16
"""Largest number of principal components that are tested."""
REFERENCE_ROWS = 2048
"""Largest number of held-out images in each split of a task that are used as reference."""


@dataclasses.dataclass(frozen=True)
class TaskDrift:
    """The comparison of one task's live images with its held-out images."""

    task: str
    asked: int
    """Number of images predicted."""
    compared: int
    """Number of recorded images, which are a sample of those predicted."""
    reference: int
    """Number of held-out images used as reference."""
    p_value: float | None
    """Smallest p-value of all components, corrected for components and tasks; None if there were
    too few images."""
    effect: float | None
    """Largest Kolmogorov-Smirnov distance of a component: 0 (the same) to 1 (no overlap)."""
    drifts: bool

    def fields(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class DriftReport:
    """The comparison of every recorded task of a version."""

    model_uri: str
    hours: float
    alpha: float
    tasks: tuple[TaskDrift, ...]
    unknown: int
    """Number of images sent with task auto that seemed to belong to no known task."""
    new_task_share: float = NEW_TASK_SHARE
    """Share of such images above which a new task seems to be here."""
    examples: tuple[str, ...] = ()
    """Ids of some of these images: the path below the input of `predict`, or the first 16 digits
    of the SHA-256 of what `serve` was sent."""
    not_compared: tuple[tuple[str, int], ...] = ()
    """Tasks that images were recorded for and that this version does not know, such as after a
    rollback, with the number of images predicted."""

    @property
    def drifts(self) -> bool:
        """Whether any task drifts."""
        return any(task.drifts for task in self.tasks)

    @property
    def unknown_share(self) -> float:
        """Share of all images that seemed to belong to no known task."""
        known = sum([*(task.asked for task in self.tasks),
                     *(asked for _, asked in self.not_compared)])
        return self.unknown / max(1, self.unknown + known)

    @property
    def new_task(self) -> bool:
        """Whether so many images are strange that a new task seems to be here."""
        return seems_new(self.unknown, self.unknown_share, self.new_task_share)

    def fields(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return {"model_uri": self.model_uri, "hours": self.hours, "alpha": self.alpha,
                "drift": self.drifts, "unknown_images": self.unknown,
                "unknown_share": self.unknown_share, "new_task": self.new_task,
                "unknown_examples": list(self.examples), "not_compared": dict(self.not_compared),
                "tasks": [task.fields() for task in self.tasks]}


def find_drift(name: str, storage: str, tracking_uri: str | None = None, *,
               alpha: float = 0.01, hours: float = 168.0,
               new_task_share: float = NEW_TASK_SHARE) -> DriftReport:
    """Compares the champion's live images of the last hours with its held-out images.

    alpha: probability of a false alarm for the whole report. new_task_share: share of images of no
    known task above which a new task seems to be here.

    Raises: InputError for an unknown stream, or if nothing was recorded.
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha}; allowed: between 0 and 1")
    if hours <= 0:
        raise InputError(f"hours is {hours}; allowed: more than 0")
    if not 0 <= new_task_share <= 1:
        raise InputError(f"new_task_share is {new_task_share}; allowed: 0 to 1")
    store = open_storage(storage)
    registry = connect(store, tracking_uri, create=False)
    champion = registry.resolve(f"models:/{name}@champion")
    live = read_live(store, name, champion.tags["trunk_fingerprint"], hours)
    unknown = live.pop(NONE, None)
    if not live and unknown is None:
        raise InputError(f"no images were recorded for {champion.uri} in the last {hours:g} hours "
                         f"in {store.uri_of('live', name)}; allowed: a stream used with "
                         "`partialhn serve` or `partialhn predict --record`")
    versions = _task_versions(registry, champion)
    comparisons = [_compare(task, version, live[task], store)
                   for task, version in versions.items() if task in live]
    others = tuple((task, sample.seen) for task, sample in live.items() if task not in versions)
    tested = max(1, sum(task.p_value is not None for task in comparisons))
    tasks = tuple(_corrected(task, tested, alpha) for task in comparisons)
    return DriftReport(champion.uri, hours, alpha, tasks, unknown.seen if unknown else 0,
                       new_task_share, unknown.ids[-EXAMPLES:] if unknown else (), others)


def _task_versions(registry: Registry, champion: Version) -> dict[str, Version]:
    """The version that learned each task of the champion last, in the order of the tasks."""
    return {task_of(version.task): version
            for version in chain_of(registry.versions(champion.stream), champion)}


def _compare(task: str, version: Version, live: Live, storage: Storage) -> TaskDrift:
    """Compares one task; its p-value is corrected for its components only."""
    reference_NC = _held_out(version, storage)
    compared = len(live.z_BC)
    if compared < FEWEST:
        return TaskDrift(task, live.seen, compared, len(reference_NC), None, None, False)
    p_value, effect = shift(reference_NC, live.z_BC)
    return TaskDrift(task, live.seen, compared, len(reference_NC), p_value, effect, False)


def _corrected(task: TaskDrift, tested: int, alpha: float) -> TaskDrift:
    if task.p_value is None:
        return task
    p_value = min(1.0, task.p_value * tested)
    return dataclasses.replace(task, p_value=p_value, drifts=p_value < alpha)


def shift(reference_NC: np.ndarray, live_MC: np.ndarray) -> tuple[float, float]:
    """The smallest p-value of all components, times their number, and the largest KS distance."""
    from scipy.stats import ks_2samp

    mean_C = reference_NC.mean(0)
    _, spread_D, basis_DC = torch.linalg.svd(torch.from_numpy(reference_NC - mean_C),
                                             full_matrices=False)
    usable = int((spread_D > 1e-6 * spread_D[0].clamp_min(1e-12)).sum())
    axes_DC = basis_DC[:max(1, min(COMPONENTS, usable))].numpy()
    # the exact p-value takes fifty times as long and differs little for FEWEST images or more
    tests = [ks_2samp((reference_NC - mean_C) @ axis_C, (live_MC - mean_C) @ axis_C,
                      method="asymp") for axis_C in axes_DC]
    return (min(1.0, len(tests) * min(float(test.pvalue) for test in tests)),
            max(float(test.statistic) for test in tests))


def _held_out(version: Version, storage: Storage) -> np.ndarray:
    """Pooled features of a task's held-out images, (N, C)."""
    store = open_store(storage, ComputeConfig())
    keys = json.loads(version.tags["feature_keys"])
    # the first key is the training split; a very small task may have no other split
    return np.concatenate([_pooled(store, _manifest(store, key, version))
                           for key in keys[1:] or keys])


def _manifest(store: FeatureStore, key: str, version: Version) -> Manifest:
    manifest = store.manifest(key)
    if manifest is None:
        raise InputError(f"features {key} of {version.uri} are not in {store.root}; allowed: the "
                         "--storage that `partialhn train` was given, with its features")
    return manifest


def _pooled(store: FeatureStore, manifest: Manifest) -> np.ndarray:
    features = store.open(manifest)
    step = max(1, -(-len(features) // REFERENCE_ROWS))
    rows_N = torch.arange(0, len(features), step)
    z_NC = torch.cat([pooled(features.gather(rows_B, torch.zeros_like(rows_B)))
                      for rows_B in torch.split(rows_N, 256)])
    return z_NC.numpy()


def table(report: DriftReport) -> Sequence[str]:
    """The report as lines for a terminal."""
    width = max([23, *(shown_width(task.task) for task in report.tasks)]) + 1
    lines = [f"{report.model_uri}, images of the last {report.hours:g} hours against held-out ones",
             f"{'task':{width}}{'images':>9}{'compared':>10}{'with':>7}{'p-value':>11}{'distance':>10}"]
    for task in report.tasks:
        numbers = f"{'-':>11}{'-':>10}  too few (at least {FEWEST})"
        if task.p_value is not None:
            numbers = (f"{task.p_value:>11.2g}{task.effect:>10.2f}  "
                       f"{'DRIFTS' if task.drifts else 'same'}")
        lines.append(f"{padded(task.task, width)}{task.asked:>9}{task.compared:>10}"
                     f"{task.reference:>7}{numbers}")
    lines += [f"{counted(asked, 'image')} of task {task!r} not compared: {report.model_uri} does "
              "not know this task" for task, asked in report.not_compared]
    if report.unknown:
        lines.append(f"{counted(report.unknown, 'image')} sent with task auto "
                     f"({percent(report.unknown_share)} of all) seemed to belong to no known task"
                     + (f", for example {', '.join(report.examples)}" if report.examples else ""))
    if report.new_task:
        lines.append(f"they are more than {percent(report.new_task_share)}, so they may be images "
                     "of a new task; put labelled images of it into the inbox")
    return lines
