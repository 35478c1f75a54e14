"""Runs a benchmark: every cell in one process, with one trunk and one feature set for each depth.

network = trained on the first task | features of every depth, one pass over the images |
for each cell: a Learner over stored features | a file for each finished cell

<out>/store/                     trunk and features
<out>/cells/<work>/<cell>.json   measurements; a cell that has its file is not run again
"""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from partialhn.benchmarks.catalogue import Cell
from partialhn.checkpoints.checkpoint import write_whole
from partialhn.config import Config
from partialhn.data.datasets import open_stream
from partialhn.data.experience import Experience
from partialhn.detector.detector import Detector
from partialhn.errors import IntegrityError
from partialhn.evaluation.forecast import ProbeTask, forecast, pooled, task_shift
from partialhn.evaluation.task_inference_metrics import without_task_id
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.json_files import read_object
from partialhn.networks.backbone import Network
from partialhn.networks.precision import choose_device, configure_torch
from partialhn.run import check, cut_network, work_name
from partialhn.task_inference import add_measured
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner, class_names
from partialhn.training.pretrain import fit_network, load_network
from partialhn.training.result import Outcome
from partialhn.training.slots import open_task_features, slots_of
from partialhn.training.steps import recorder_for
from partialhn.training.together import Lanes, Waiting, at_once, needed_bytes

Log = Callable[[str], None]


def run_cells(config: Config, cells: Sequence[Cell], out: Path, log: Log) -> list[dict[str, Any]]:
    """The measurements of every cell, in order; only cells without a file are learned.

    `log` gets a line when a step ends. Raises: InputError for anything the user can set right.
    """
    device = choose_device(config.compute.device)
    for depth in {cell.depth for cell in cells}:
        check(config_of(config, Cell("partial_hn", depth, 0)))
    configure_torch(config.compute.threads)
    experiences = open_stream(config.data, out / "store" / "datasets")
    folder = out / "cells" / work_name(config, experiences)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not (folder / f"{cell.name}.json").exists()]
    if missing:
        bench = _Bench(config, experiences, {cell.depth for cell in missing}, out / "store", device,
                       log)
        numbers = itertools.count(len(cells) - len(missing) + 1)

        def learn(cell: Cell, go_on: Callable[[], None]) -> None:
            fields = bench.learn(cell, go_on)
            write_whole(pafs.LocalFileSystem(), str(folder / f"{cell.name}.json"),
                        json.dumps(fields, indent=1).encode())
            log(f"{next(numbers)}/{len(cells)} {cell.name}: accuracy {fields['acc']:.3f}, "
                f"forgotten {fields['forgetting']:.3f}, {fields['cpu_seconds']:.1f} s")

        needs = [bench.needed_bytes(cell) for cell in missing]
        _for_each(missing, learn, at_once(config.compute.tasks_at_once, needs, device, log),
                  device, log)
    return [_read(folder / f"{cell.name}.json") for cell in cells]


def _for_each(cells: Sequence[Cell], learn: Callable[[Cell, Callable[[], None]], None], count: int,
              device: torch.device, log: Log) -> None:
    """Learns cells, `count` at once in threads; a single one in this thread.

    learn: calls its second argument now and then, which ends a thread where the others end.
    """
    if count == 1:
        for cell in cells:
            learn(cell, lambda: None)
        return
    waiting = Waiting(cells, count, log)
    with Lanes(count, device) as lanes:
        def work(cell: Cell) -> None:
            lanes.go_on()
            learn(cell, lanes.go_on)
        try:
            for _ in range(count):
                lanes.start(lambda: waiting.work_off(work))
            lanes.wait()
        except KeyboardInterrupt:
            log(f"stopping: the {count} cells that are being learned end with their epoch and are "
                "learned again; finished ones are kept")
            raise


class _Bench:
    """The network and the features of each depth, which all cells share."""

    def __init__(self, config: Config, experiences: Sequence[Experience], depths: set[int],
                 root: Path, device: torch.device, log: Log) -> None:
        self.config, self.experiences, self.device = config, experiences, device
        self.store = FeatureStore(pafs.LocalFileSystem(), str(root))
        start = time.process_time()
        self.network = self._network(root)
        trained = time.process_time()
        deepest = cut_network(config_of(config, Cell("partial_hn", max(depths), 0)),
                      self.network).trunk.to(self.device)
        self.jobs = {depth: feature_jobs(config, experiences, deepest, [depth])
                     for depth in sorted(depths)}
        _, decoded = precompute(self.store, deepest, [job for depth in sorted(depths)
                                                      for job in self.jobs[depth]], say=log)
        log(f"processor time: trunk {trained - start:.1f} s, features "
            f"{time.process_time() - trained:.1f} s; {decoded} images decoded for depths "
            + ", ".join(map(str, sorted(depths))))
        self._lock = threading.RLock()
        self._opened: dict[int, list[TaskFeatures]] = {}
        self._measured_similarity: dict[int, dict[str, Any]] = {}

    def learn(self, cell: Cell, go_on: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Learns one cell; returns the fields of its file. Several threads may do so at once.

        go_on: is called after each epoch, and raises where this thread is to end.
        """
        config = config_of(self.config, cell)
        with self._lock:
            cut, tasks = cut_network(config, self.network), self._tasks(cell.depth)
        learner = Learner(cut.strategy(config), config.train, self.device,
                          recorder=recorder_for(self.device, config.compute.cuda_graphs))
        # in a thread beside others only its own time; PyTorch's threads are then not counted
        alone = threading.current_thread() is threading.main_thread()
        clock = time.process_time if alone else time.thread_time
        start = clock()
        for _ in learner.learn(tasks):
            go_on()
        seconds = clock() - start
        fields = Outcome.of(learner).fields()
        jobs = self.jobs[cell.depth]
        bytes_ = sum(manifest.bytes for manifest in map(self.store.find, (
            job.recipe for job in jobs)) if manifest is not None)
        return {"label": cell.label, "strategy": cell.strategy, "depth": cell.depth,
                "seed": cell.seed, **fields, "cpu_seconds": round(seconds, 3),
                "feature_bytes": bytes_, "macs": cut.macs, "config": config.to_dict(),
                "class_incremental": {"last": class_incremental_accuracy(learner, tasks)},
                **self._similarity(cell.depth),
                "tasks": [{"name": each.name, "classes": list(each.classes),
                           "transform": each.transform} for each in self.experiences]}

    def needed_bytes(self, cell: Cell) -> int:
        """Bytes that a cell takes on the device at most."""
        return max(map(needed_bytes, self._tasks(cell.depth)))

    def _similarity(self, depth: int) -> dict[str, Any]:
        """The shift of each task from the first in this depth's features, and the forecast."""
        with self._lock:
            return self._similarity_of(depth)

    def _similarity_of(self, depth: int) -> dict[str, Any]:
        if depth not in self._measured_similarity:
            tasks = self._tasks(depth)
            views = [pooled(task.train) for task in tasks if task.train is not None]
            kept = None
            probed = tasks[:2] if depth and self.config.backbone.trunk == "train" else []
            first_two = [ProbeTask(task.train, task.validation, task.classes) for task in probed
                         if task.train is not None and task.validation is not None]
            if len(first_two) == 2 and all(len(each.held_out) for each in first_two):
                kept = forecast({depth: (first_two[0], first_two[1])})[0].kept
            self._measured_similarity[depth] = {"task_shift": [0.0, *(task_shift(views[0], each)
                                                        for each in views[1:])],
                                  "forecast_kept": kept}
        return self._measured_similarity[depth]

    def _network(self, root: Path) -> Network:
        filesystem = pafs.LocalFileSystem()
        network = load_network(self.config, self.experiences[0], filesystem, str(root))
        if network is None:
            for _ in fit_network(self.config, self.experiences[0], filesystem, str(root),
                                 self.device):
                pass
            network = load_network(self.config, self.experiences[0], filesystem, str(root))
        assert network is not None
        return network

    def _tasks(self, depth: int) -> list[TaskFeatures]:
        """The features of a depth, opened once, so that later cells find the pages in memory."""
        if depth not in self._opened:
            manifests = [self.store.find(job.recipe) for job in self.jobs[depth]]
            slots = slots_of(self.experiences, self.jobs[depth], manifests)
            self._opened[depth] = open_task_features(self.store, slots)
        return self._opened[depth]


def class_incremental_accuracy(learner: Learner, tasks: Sequence[TaskFeatures]) -> float:
    """Accuracy over the classes of all learned tasks where nobody says the task: a detector on the
    same features with the learned heads.
    """
    detector = Detector(learner.config.detector_features)
    for index in range(len(tasks)):
        add_measured(detector, learner.measure_task(tasks, index, detector), None)
    return without_task_id(learner.strategy, detector, [task.test for task in tasks],
                           range(len(tasks)), heads_alone=False,
                           classes=class_names(tasks))["acc"]


def config_of(config: Config, cell: Cell) -> Config:
    """The configuration of a cell.

    The full hypernetwork (depth 0) starts each task from the previous one, which is the better of
    the two options at that depth.
    """
    start = config.hypernet.starts_from if cell.depth else "previous"
    return dataclasses.replace(
        config, hypernet=dataclasses.replace(config.hypernet, starts_from=start),
        backbone=dataclasses.replace(config.backbone, freeze_depth=cell.depth),
        train=dataclasses.replace(config.train, strategy=cell.strategy, seed=cell.seed))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, f"the measured cell {path}")
    except IntegrityError as error:
        raise IntegrityError(f"{error}; delete it and it is learned again") from error
