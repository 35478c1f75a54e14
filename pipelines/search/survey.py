"""Measurements before the trials of a search: features of every depth, the forecast, plain ridge
regression at every depth, and the cost of training the whole network.

They run as Ray tasks, so that features are read where they are stored; the results are small.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from partialhn.config import Config
from partialhn.data.decode import decode
from partialhn.data.experience import Experience
from partialhn.evaluation.forecast import ProbeTask, forecast, pooled, task_shift
from partialhn.evaluation.linear_probe import ridge_accuracy
from partialhn.features.codec import number_type
from partialhn.features.extract import feature_jobs
from partialhn.features.manifest import Manifest
from partialhn.networks.backbone import Network, build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.device_memory import explained
from partialhn.networks.precision import configure_torch
from partialhn.training.image_batches import Labelled
from partialhn.training.pretrain import network_optimiser, train_network
from partialhn.training.steps import recorder_for
from pipelines.features.in_use import InUse
from pipelines.features.produce import Run, compute_features
from pipelines.platform.cluster import WorkerDevice
from pipelines.platform.storage import Storage
from pipelines.search.trial import Bench, Place, open_features

TIMED_IMAGES = 512
"""Images of the first task that the training of the whole network is timed on."""
ONE_PASS_BYTES = 4 << 30
"""Bytes of features of every depth, up to which all are computed before a search that refines."""


@dataclasses.dataclass(frozen=True)
class Computing:
    """How features are computed, and who is told."""

    run: Run
    progress: Callable[[int, int], None]
    log: Callable[[str], None]
    in_use: InUse
    """Keeps the features from being pruned."""


def depth_features(storage: Storage, network: Network, config: Config,
                   experiences: Sequence[Experience], depths: Sequence[int],
                   on: Computing) -> tuple[dict[Place, Manifest], int]:
    """The stored features of every depth, and the number of images decoded for them.

    An image passes through the trunk once for all depths.
    """
    trunk = CutNetwork.of(network, max(depths)).trunk
    jobs = feature_jobs(config, experiences, trunk, depths)
    manifests, decoded = compute_features(storage, trunk, jobs, on.run, progress=on.progress,
                                          log=on.log, say=on.log, in_use=on.in_use)
    return {(job.depth, job.task, job.split): manifest
            for job, manifest in zip(jobs, manifests, strict=True)}, decoded


def depths_at_once(network: Network, config: Config, experiences: Sequence[Experience],
                   depths: Sequence[int], possible: Sequence[int]) -> Sequence[int]:
    """The depths whose features are computed in one pass: all possible ones if they are small.

    Another pass of the images through the trunk for depths that are added later costs more than to
    store at most `ONE_PASS_BYTES`. Raises: InputError, as `feature_jobs`.
    """
    trunk = CutNetwork.of(network, max(possible)).trunk
    jobs = feature_jobs(config, experiences, trunk, possible)
    size = sum(len(job.table) * job.recipe.views * math.prod(job.shape_CHW)
               * number_type(job.recipe.dtype).tensor.itemsize for job in jobs)
    return possible if size <= ONE_PASS_BYTES else depths


def forecast_depths(bench: Bench, trained_here: bool) -> list[dict[str, Any]]:
    """The forecast from the first two tasks, as plain values; `trained_here` as in `forecast`."""
    configure_torch(bench.threads)
    depths = sorted({depth for depth, _, _ in bench.manifests})
    stages = forecast({depth: (_probe_task(bench, depth, 0), _probe_task(bench, depth, 1))
                       for depth in depths}, trained_here=trained_here)
    return [dataclasses.asdict(stage) for stage in stages]


def _probe_task(bench: Bench, depth: int, index: int) -> ProbeTask:
    name, classes = bench.tasks[index]
    return ProbeTask(open_features(bench, (depth, name, "train")),
                     open_features(bench, (depth, name, "validation")), len(classes))


def task_shifts(bench: Bench) -> dict[str, float]:
    """The shift of each later task from the first, in the features of the deepest depth."""
    configure_torch(bench.threads)
    depth = max(depth for depth, _, _ in bench.manifests)
    features = {name: pooled(open_features(bench, (depth, name, "train")))
                for name, _ in bench.tasks}
    first, *later = [name for name, _ in bench.tasks]
    return {name: task_shift(features[first], features[name]) for name in later}


def ridge_accuracies(bench: Bench, depths: Sequence[int]) -> dict[str, float]:
    """Mean held-out accuracy over all tasks of ridge regression, by depth (as text, for JSON).

    It is the strategy `ridge`: closed form, so no trial and no seed is needed. Depth 0, whose
    features are pixels, is left out.
    """
    configure_torch(bench.threads)
    return {str(depth): sum(_ridge_accuracy(bench, depth, name, len(classes))
                            for name, classes in bench.tasks) / len(bench.tasks)
            for depth in depths if depth}


def _ridge_accuracy(bench: Bench, depth: int, name: str, classes: int) -> float:
    return ridge_accuracy(open_features(bench, (depth, name, "train")),
                          open_features(bench, (depth, name, "validation")), classes)


def whole_network_seconds(config: Config, first: Experience, worker: WorkerDevice,
                          threads: int) -> dict[str, float]:
    """Seconds of an image in an epoch of training the whole network, and its stored bytes.

    Two epochs over some images of the first task; the second is timed. Processor time on a CPU,
    as for trials, and wall-clock time on a GPU.
    """
    configure_torch(threads)
    device = worker.here()
    table = first.train.take(range(min(TIMED_IMAGES, len(first.train))))
    decoded = decode(table, config.data.input_size, first.transform, "skip",
                     config.data.max_image_pixels, config.data.stream_seed)
    y_N = torch.from_numpy(table.label_N[decoded.index_B.numpy()])
    backbone = dataclasses.replace(config.backbone, trunk_epochs=2)
    network = build_network(backbone.backbone, len(first.classes),
                            input_size=config.data.input_size).to(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    recorder = recorder_for(device, config.compute.cuda_graphs)
    with explained(f"timing the training of the whole network at trunk_batch_size "
                   f"{backbone.trunk_batch_size} on device {device}",
                   "a smaller trunk_batch_size or input_size, or a device with more memory"):
        for _ in train_network(network, Labelled(decoded.images_BCHW, y_N), backbone,
                               config.features.augment, network_optimiser(network, backbone),
                               recorder=recorder):
            spent, start = clock() - start, clock()
    return {"seconds_per_image": spent / len(y_N),
            "bytes_per_image": sum(map(len, table.read())) / len(table)}
