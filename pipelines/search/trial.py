"""A trial: a whole stream, learned from stored features in the process of its Ray actor.

No image is decoded, no worker group is started. The trial reports after each task, so that a bad
trial can be stopped early, and it stores its state every few seconds, so that a killed trial goes
on. Its accuracy is measured on held-out images; only final runs use test images.
"""

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints import checkpoint
from partialhn.config import ComputeConfig, Config
from partialhn.detector.detector import Detector
from partialhn.errors import InputError
from partialhn.evaluation.task_inference_metrics import right_without_task
from partialhn.features.feature_set import FeatureSet
from partialhn.features.manifest import Manifest
from partialhn.networks.backbone import Network
from partialhn.networks.device_memory import DeviceMemoryError, release
from partialhn.networks.draws import ALONE
from partialhn.networks.precision import configure_torch, device_name
from partialhn.run import TrunkAndHead, cut_network
from partialhn.strategies.base import Strategy
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.training.answers import answer
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import TaskRecord
from partialhn.training.result import Outcome
from partialhn.training.steps import recorder_for
from partialhn.training.together import Stopped
from pipelines.features.produce import open_store
from pipelines.platform.cluster import WorkerDevice
from pipelines.platform.storage import Storage
from pipelines.search.state import Measured, TrialPlan, pack_answers

STATE_SECONDS = 10.0
"""Seconds between two stored states; a killed trial loses at most this time or one epoch."""
Place = tuple[int, str, str]
"""Freeze depth, task, split."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The data that all trials of a search share."""

    storage: Storage
    network: Network
    tasks: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and classes of each task."""
    manifests: Mapping[Place, Manifest]
    """The stored features, with as many views as any trial uses."""
    folder: str
    """Where running trials keep their states, as a path in the storage's filesystem."""
    device: WorkerDevice
    threads: int
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    """Where a node keeps copies of remote features."""
    unknown_task: bool = False
    """Whether trials are judged by their answers where nobody says the task."""
    in_threads: bool = False
    """Whether several trials share a process, each in a thread."""


def run_trial(choice: dict[str, Any], bench: Bench) -> None:
    """The Ray Tune trainable: reports after each task, or the reason of a failure."""
    from ray import tune

    for result in trial_results(choice, bench):
        tune.report(result)


def trial_results(choice: dict[str, Any], bench: Bench, *, explain_memory: bool = True,
                  go_on: Callable[[], None] = lambda: None) -> Iterator[dict[str, Any]]:
    """A result after each task, or the reason of a failure.

    go_on: is called after each epoch, and raises `Stopped` where the trial is to end.

    Raises: DeviceMemoryError without `explain_memory`, if the device's memory does not suffice.
    """
    plan = TrialPlan(**choice["plan"])
    tasks_done = 0
    try:
        for measured in learn(plan, bench, go_on):
            tasks_done = len(measured.rows)
            yield {"tasks_done": tasks_done, "accuracy": measured.accuracy, "failed": "",
                   "measured": json.dumps(dataclasses.asdict(measured))}
    except Stopped:
        raise
    except Exception as error:  # a second attempt would fail in the same way
        if isinstance(error, DeviceMemoryError) and not explain_memory:
            raise
        yield {"tasks_done": tasks_done, "accuracy": 0.0, "measured": "",
               "failed": _reason(error, bench)}


def _reason(error: Exception, bench: Bench) -> str:
    """Why a trial failed, in words."""
    if not isinstance(error, InputError):
        return f"{type(error).__name__}: {error}"
    share = bench.device.gpus
    if isinstance(error, DeviceMemoryError) and 0 < share < 1:
        return f"{error}, or more than {share:g} of a GPU for a trial (gpus_per_trial)"
    return str(error)


def learn(plan: TrialPlan, bench: Bench,
          go_on: Callable[[], None] = lambda: None) -> Iterator[Measured]:
    """Learns the stream as planned; yields the measurements after each task. go_on: as in
    `trial_results`.
    """
    configure_torch(bench.threads)
    config = Config.from_dict(plan.config)
    with ALONE:  # all trials of a process cut the same network
        cut = cut_network(config, bench.network)
    tasks = [_task(bench, config, name, classes) for name, classes in bench.tasks]
    detector = Detector(config.train.detector_features) if bench.unknown_task else None
    device = bench.device.here()
    if not bench.in_threads:  # where it would stop the others
        release(device)  # what an earlier trial of this process left
    learner = Learner(cut.strategy(config), config.train, device, inference=detector,
                      recorder=recorder_for(device, config.compute.cuda_graphs))
    meter = _Meter(time.thread_time if bench.in_threads else time.process_time)
    folder = f"{bench.folder}/{plan.id}"
    _restore(bench, folder, learner, meter)
    if learner.finished:
        yield _measured(plan, bench, config, cut, learner, meter)
    kept = time.monotonic()
    for record in learner.learn(tasks):
        if isinstance(record, TaskRecord):
            meter.rows.append(_row(learner, bench, tasks))
        meter.lap(isinstance(record, TaskRecord))
        if isinstance(record, TaskRecord) or time.monotonic() - kept > STATE_SECONDS:
            _keep(bench, folder, learner, meter)
            kept = time.monotonic()
        if isinstance(record, TaskRecord):
            yield _measured(plan, bench, config, cut, learner, meter)
        go_on()
        meter.start()


class _Meter:
    """Accuracies, and processor time, split into training and evaluation."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds of this process, or of this thread alone."""
        self._clock = clock
        self.training, self.evaluating = 0.0, 0.0
        self.rows: list[tuple[float, ...]] = []
        """Held-out accuracies of every task so far, after each task."""
        self.start()

    def start(self) -> None:
        """Starts the clock."""
        self._at = self._clock()

    def lap(self, evaluating: bool) -> None:
        """Adds the time since `start` to evaluation or to training."""
        spent = self._clock() - self._at
        if evaluating:
            self.evaluating += spent
        else:
            self.training += spent


def _task(bench: Bench, config: Config, name: str, classes: tuple[str, ...]) -> TaskFeatures:
    """A task's features, with the held-out images instead of the test images."""
    depth = config.backbone.depth
    train = open_features(bench, (depth, name, "train"))
    held_out = open_features(bench, (depth, name, "validation"))
    return TaskFeatures(name, len(classes), train.first_views(config.features.views), None,
                        held_out)


def open_features(bench: Bench, place: Place) -> FeatureSet:
    """One set of features, verified once in this process."""
    manifest = bench.manifests[place]
    opened = _opened()
    if manifest.key not in opened:
        opened[manifest.key] = open_store(bench.storage, bench.compute).open(manifest)
    return opened[manifest.key]


@functools.cache
def _opened() -> dict[str, FeatureSet]:
    """Memory-mapped features by key: an actor runs many trials, one after the other."""
    return {}


def _keep(bench: Bench, folder: str, learner: Learner, meter: _Meter) -> None:
    tensors, fields = learner.state()
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "state"
        checkpoint.save(local, "trial", tensors, {
            "learner": fields, "training": meter.training, "evaluating": meter.evaluating,
            "rows": meter.rows})
        checkpoint.upload(local, bench.storage.filesystem, folder)


def _restore(bench: Bench, folder: str, learner: Learner, meter: _Meter) -> None:
    """Restores the state of an interrupted run of this trial, if there is one."""
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "state"
        if not checkpoint.fetch(bench.storage.filesystem, folder, local):
            return
        tensors, fields = checkpoint.load(local, "trial")
        learner.restore(tensors, fields["learner"])
        meter.training, meter.evaluating = fields["training"], fields["evaluating"]
        meter.rows = [tuple(row) for row in fields["rows"]]


def _measured(plan: TrialPlan, bench: Bench, config: Config, cut: TrunkAndHead, learner: Learner,
              meter: _Meter) -> Measured:
    depth, views = config.backbone.depth, config.features.views
    done = len(learner.finished)
    test_row = right = None
    if plan.kind != "search" and done == len(bench.tasks):
        tests = [open_features(bench, (depth, name, "test")) for name, _ in bench.tasks]
        test_row = tuple(_mean(right_N) for right_N in _right(learner, bench, tests))
        held_out = [open_features(bench, (depth, name, "validation")) for name, _ in bench.tasks]
        right = tuple(pack_answers(right_N.numpy()) for right_N in _right(learner, bench, held_out))
    strategy = learner.strategy
    own = Outcome.of(learner).task_bytes
    state = sum(value.numel() * value.element_size()
                for part in (strategy, cut.trunk) for value in part.state_dict().values())
    used = [(place, bench.manifests[place]) for place in bench.manifests if place[0] == depth]
    return Measured(
        tasks=tuple(name for name, _ in bench.tasks),
        rows=tuple(meter.rows), test_row=test_row,
        train_seconds=sum(record.train_seconds for record in learner.finished),
        processor_seconds=meter.training,
        evaluate_seconds=sum(record.evaluate_seconds for record in learner.finished),
        epochs=len(learner.epochs),
        feature_bytes=sum(_share(place, each, views) for place, each in used),
        feature_seconds=sum(shard.seconds for _, each in used for shard in each.shards),
        serving_macs=int(cut.macs["trunk"] + cut.macs["head"]) + _generating(strategy),
        head_bytes=4 * (strategy.head.weight_count + strategy.head.norm_length),
        checkpoint_bytes=state, bytes_per_task=round(sum(own) / len(own)),
        device=device_name(learner.device), right=right)


def _row(learner: Learner, bench: Bench, tasks: Sequence[TaskFeatures]) -> tuple[float, ...]:
    """Held-out accuracies of every task so far, after the task that was just learned."""
    if learner.inference is None:
        return learner.finished[-1].accuracy_row
    held_out = [task.test for task in tasks[:len(learner.finished)]]
    return tuple(map(_mean, _right(learner, bench, held_out)))


def _right(learner: Learner, bench: Bench, tests: Sequence[FeatureSet]) -> list[Tensor]:
    """For every task, which images get the right class: without the task if it is inferred."""
    if learner.inference is not None:
        return right_without_task(learner.strategy, learner.inference, tests,
                                  [classes for _, classes in bench.tasks])
    found = []
    for index, test in enumerate(tests):
        logits_NK, y_N = answer(learner.strategy, index, test)
        found.append(logits_NK.argmax(1) == y_N)
    return found


def _mean(right_N: Tensor) -> float:
    return right_N.float().mean().item()


def _share(place: Place, manifest: Manifest, views: int) -> int:
    """Bytes of a set of features if it held only `views` views."""
    return round(manifest.bytes * views / manifest.shape_VCHW[0]) if place[2] == "train" else (
        manifest.bytes)


def _generating(strategy: Strategy) -> int:
    """Multiply-adds to generate the last task's head; 0 for strategies that store their heads."""
    if not isinstance(strategy, PartialHypernet):
        return 0
    return strategy.hypernet.generating_macs(len(strategy.classes) - 1)
