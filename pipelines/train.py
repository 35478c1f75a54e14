"""The main job: a stream of tasks becomes a registered model, a report and a result.

    data -> trunk (Ray task) -> features (Ray Data) -> experiences (Ray Train) -> versions (MLflow)

Every stage finds what an earlier run finished, so the same command goes on where it stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from partialhn import checkpoint
from partialhn.backbone import Network
from partialhn.checkpoint import Model
from partialhn.config import Config
from partialhn.datasets import open_stream
from partialhn.errors import InputError
from partialhn.featurise import FeatureJob, feature_jobs
from partialhn.metrics import summarise
from partialhn.pretrain import fit_network, load_network
from partialhn.result import Clock, Outcome, model_sizes, peak_rss_bytes, result_fields
from partialhn.run import Parts, check, cut, work_name
from partialhn.store import Manifest
from partialhn.stream import Experience
from partialhn.train import EpochRecord, TaskRecord
from pipelines.features import compute_features
from pipelines.package import Contents
from pipelines.progress import Progress
from pipelines.registry import Registry, connect
from pipelines.report import write_report
from pipelines.settings import OutputConfig
from pipelines.storage import Storage, open_storage
from pipelines.versions import CHAMPION, Registration
from pipelines.worker import Assignment, Events, learn, model_folder

Say = Callable[[str], None]
MAX_FAILURES = 3
START_ATTEMPTS = 3
"""Ray gives a node 30 s to come up; a machine that is busy with other work may need longer."""


def train(config: Config, output: OutputConfig, say: Say = print) -> dict[str, Any]:
    """Learns a stream and registers a version for each task; returns what `result.json` holds.

    Writes `output.result`. Raises: InputError for anything the user can set right.
    """
    check(config)
    storage = open_storage(output.storage)
    clock = Clock()
    experiences = open_stream(config.data, _dataset_cache(storage))
    work = work_name(config, experiences)
    classes = sum(len(each.classes) for each in experiences)
    say(f"{output.name}: {len(experiences)} tasks, {classes} classes, "
        f"{sum(len(each.train) for each in experiences)} training images (work {work})")
    for note in _notes(config, len(experiences)):
        say(note)
    clock.lap("data")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, storage, output.tracking_uri)
        start_ray(config, storage)
        registry = connecting.result()
    clock.lap("startup")
    job = _Job(config, output, storage, registry, experiences, work, Progress(config, say), clock)
    result = job.run()
    Path(output.result).parent.mkdir(parents=True, exist_ok=True)
    Path(output.result).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _notes(config: Config, tasks: int) -> list[str]:
    """What a user should know before hours are spent."""
    hypernet = config.hypernet
    fresh = hypernet.fresh_columns
    if (config.train.strategy != "partial_hn" or hypernet.generator != "bilinear"
            or not hypernet.residual or not fresh or (tasks - 1) * fresh <= hypernet.code_dim):
        return []
    served = 1 + -(-hypernet.code_dim // fresh)
    return [f"note: {hypernet.code_dim} columns (--code-dim) give columns of their own to the "
            f"first {served} of {tasks} tasks; the others are learned less well. All {tasks} "
            f"would take --code-dim {(tasks - 1) * fresh}"]


def start_ray(config: Config, storage: Storage) -> None:
    """Joins the configured cluster, or starts a local one that ends with this process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.compute.ray_address is None:
        options["include_dashboard"] = False
    try:
        _reach(config.compute.ray_address)
        _init_ray(config.compute.ray_address or "local", **options,
                  runtime_env={"env_vars": storage.environment()})
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(f"ray_address is {config.compute.ray_address!r} and no cluster answers "
                         f"({error}); allowed: auto, ray://host:10001, host:6379, or leave it out "
                         "for a local one") from error


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port; Ray itself would try for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _init_ray(address: str, **options: Any) -> None:
    """Starts or joins Ray; again where a node took longer to come up than Ray waits for it."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address, **options)
            return
        except Exception as error:  # Ray raises no class of its own for this
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise
            ray.shutdown()


def _dataset_cache(storage: Storage) -> Path:
    """Where digits and torchvision data become Parquet: the storage, where that is a folder."""
    if storage.is_local:
        return Path(storage.root) / "datasets"
    return Path.home() / ".cache" / "partialhn" / "datasets"


@dataclasses.dataclass
class _Job:
    """One run of the main job, stage by stage."""

    config: Config
    output: OutputConfig
    storage: Storage
    registry: Registry
    experiences: list[Experience]
    work: str
    progress: Progress
    clock: Clock

    def run(self) -> dict[str, Any]:
        parent = self.registry.stream_run(self.output.name, self.work, self.config.to_dict())
        try:
            return self._run(parent)
        except BaseException:
            self.registry.end_run(parent, failed=True)
            raise

    def _run(self, parent: str) -> dict[str, Any]:
        self._resources()
        parts = cut(self.config, self._network())
        self.clock.lap("trunk")
        jobs = feature_jobs(self.config, self.experiences, parts.trunk)
        manifests, decoded = self._features(jobs, parts)
        self.clock.lap("features")
        registrar = _Registrar(self, parent, parts, jobs, manifests)
        returned = self._experiences(parts, jobs, manifests, registrar)
        self.clock.lap("train")
        model = registrar.newest_model()
        fields = result_fields(self.config, self.experiences, parts.macs,
                               dict(zip(jobs, manifests, strict=True)), decoded,
                               returned["outcomes"], self.clock.laps)
        fields |= model_sizes(model) | {
            "name": self.output.name, "work": self.work, "weights_hash": model.weights_hash(),
            "checkpoint_bytes": registrar.checkpoint_bytes, "device": returned["device"],
            "peak_rss_bytes": max(returned["peak_rss_bytes"], peak_rss_bytes()),
            "storage": self.storage.uri, "tracking_uri": self.registry.tracking_uri,
            "model_uri": f"models:/{self.output.name}@{CHAMPION}",
            "versions": registrar.version_fields()}
        for row, seconds in zip(fields["seconds"]["per_task"], registrar.seconds, strict=True):
            row["register"] = round(seconds, 3)
        self._publish(parent, fields)
        return fields

    def _resources(self) -> None:
        """Decides on devices and threads, and refuses what the cluster can never give."""
        import ray

        compute, there = self.config.compute, ray.cluster_resources()
        self.gpu = compute.device == "gpu" or (compute.device == "auto"
                                               and there.get("GPU", 0) >= compute.workers)
        needed = "GPU" if self.gpu else "CPU"
        if there.get(needed, 0) < compute.workers:
            raise InputError(f"workers is {compute.workers} with one {needed} each, but the "
                             f"cluster has {there.get(needed, 0):g}; allowed: as many workers as "
                             f"there are {needed}s")
        cores = os.cpu_count() or 1
        self.threads = compute.threads or max(1, cores // compute.workers)

    def _network(self) -> Network:
        """The network the trunk is cut from: found, or trained by a Ray task."""
        import ray

        arguments = (self.config, self.experiences[0], self.storage.filesystem, self.storage.root)
        network = load_network(*arguments)
        if network is None:
            remote = ray.remote(num_returns="streaming", num_gpus=1 if self.gpu else 0,
                                max_retries=0)(_train_trunk)
            for reference in remote.remote(arguments, "cuda" if self.gpu else "cpu", self.threads):
                record = ray.get(reference)
                if isinstance(record, str):
                    raise InputError(record)
                self.progress.trunk(record)
            network = load_network(*arguments)
            assert network is not None
        else:
            self.progress.line("trunk: found, not trained again")
        return network

    def _features(self, jobs: list[FeatureJob],
                  parts: Parts) -> tuple[list[Manifest], int]:
        workers = self.config.compute.feature_workers
        manifests, decoded = compute_features(
            self.storage, parts.trunk, jobs, workers=workers, gpu=self.gpu,
            threads=self.config.compute.threads or max(1, (os.cpu_count() or 1) // workers),
            progress=self.progress.features)
        self.progress.features_done(manifests, decoded)
        return manifests, decoded

    def _experiences(self, parts: Parts, jobs: list[FeatureJob], manifests: list[Manifest],
                     registrar: "_Registrar") -> dict[str, Any]:
        """Runs Ray Train in a thread and follows its records in this one."""
        import ray

        events = ray.remote(num_cpus=0)(Events).remote()
        assignment = Assignment(self.config, parts, tuple(self.experiences), tuple(jobs),
                                tuple(manifests), self.storage, registrar.folder, self.threads,
                                events)
        box: dict[str, Any] = {}
        thread = threading.Thread(target=self._fit, args=(assignment, box), daemon=True)
        thread.start()
        while True:
            alive = thread.is_alive()
            for strategy, record in ray.get(events.take.remote()):
                self.progress.record(strategy, record)
                if isinstance(record, TaskRecord) and strategy == self.config.train.strategy:
                    registrar.register(record)
                elif isinstance(record, EpochRecord) and strategy == self.config.train.strategy:
                    registrar.epochs[record.task_index, record.epoch] = record
            if not alive:
                break
            thread.join(0.3)
        if "error" in box:
            raise box["error"]
        returned: dict[str, Any] = box["returned"]
        if "error" in returned:
            raise InputError(returned["error"])
        ours: Outcome = returned["outcomes"][self.config.train.strategy]
        registrar.epochs = {(record.task_index, record.epoch): record for record in ours.epochs}
        for record in ours.finished:  # those of an earlier, interrupted driver too
            registrar.register(record)
        return returned

    def _fit(self, assignment: Assignment, box: dict[str, Any]) -> None:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            learn, train_loop_config={"assignment": assignment},
            scaling_config=ScalingConfig(num_workers=self.config.compute.workers,
                                         use_gpu=self.gpu),
            run_config=RunConfig(name=self.work, storage_filesystem=self.storage.filesystem,
                                 storage_path=self.storage.path("runs", self.output.name),
                                 failure_config=FailureConfig(max_failures=MAX_FAILURES),
                                 checkpoint_config=CheckpointConfig(num_to_keep=2)))
        try:
            with _quiet_logs():
                box["returned"] = trainer.fit().return_value
        except Exception as error:  # carried to the main thread, which raises it
            box["error"] = error

    def _publish(self, parent: str, fields: dict[str, Any]) -> None:
        """Matrix, result and report go to the stream's run."""
        names = [each.name for each in self.experiences]
        self.registry.log_matrix(parent, fields["accuracy_matrix"], names)
        self.clock.lap("register")
        stages = {key: round(value, 3) for key, value in self.clock.laps.items()}
        fields["seconds"] |= {"stages": stages, "total": round(sum(stages.values()), 3)}
        self.registry.log_result(parent, fields)
        with tempfile.TemporaryDirectory() as scratch:
            self.registry.log_file(parent, write_report(fields, Path(scratch) / "report.html"))
        self.registry.end_run(parent)


class _Registrar:
    """Registers the model of each finished task, in order and once."""

    def __init__(self, job: _Job, parent: str, parts: Parts, jobs: Sequence[FeatureJob],
                 manifests: Sequence[Manifest]) -> None:
        self.job, self.parent = job, parent
        self.folder = job.storage.path("runs", job.output.name, job.work)
        self.epochs: dict[tuple[int, int], EpochRecord] = {}
        """By task and epoch: a worker that was started again may send one twice."""
        self.seconds: list[float] = []
        self.checkpoint_bytes = 0
        self._trunk = parts.trunk.fingerprint()
        self._keys = {each.name: tuple(m.key for j, m in zip(jobs, manifests, strict=True)
                                       if j.task == each.name) for each in job.experiences}
        self._rows: list[tuple[float, ...]] = []
        self._scratch = tempfile.TemporaryDirectory()

    def register(self, record: TaskRecord) -> None:
        """Registers a task's model; a task that was registered before is left as it is."""
        if record.task_index < len(self._rows):
            return
        clock = Clock()
        job, experience = self.job, self.job.experiences[record.task_index]
        self._rows.append(record.accuracy_row)
        folder = self._fetch(record.task_index)
        total = len(self._rows)
        summary = summarise([[*row, *[None] * (total - len(row))] for row in self._rows])
        run = job.registry.task_run(self.parent, record.task, record.task_index)
        job.registry.log_epochs(run, [dataclasses.asdict(epoch) for epoch in self.epochs.values()
                                      if epoch.task_index == record.task_index])
        version = job.registry.register_task(run, Registration(
            stream=job.output.name, work=job.work, task=record.task,
            task_index=record.task_index, classes=experience.classes,
            trunk_fingerprint=self._trunk, feature_keys=self._keys[record.task],
            weights_hash=checkpoint.load(folder, "model")[1]["weights_hash"],
            acc=summary.accuracy, learning_accuracy=summary.learning_accuracy,
            forgetting=summary.forgetting, storage=job.storage.uri),
            Contents(folder, record.task, experience.test.take([0]).read()[0]))
        metrics = {"acc": summary.accuracy, "learning_accuracy": summary.learning_accuracy,
                   "forgetting": summary.forgetting, "bwt": summary.backward_transfer}
        job.registry.log_metrics(self.parent, metrics, step=record.task_index)
        job.registry.log_metrics(run, metrics)
        job.registry.end_run(run)
        clock.lap("register")
        self.seconds.append(clock.laps["register"])
        job.progress.registered(version.uri, record, summary)

    def newest_model(self) -> Model:
        """The model after the last task."""
        return Model.load(self._folder(len(self._rows) - 1))

    def version_fields(self) -> list[dict[str, Any]]:
        """The versions of this work for `result.json`."""
        versions = self.job.registry.versions(self.job.output.name)
        return [version.fields() for version in versions
                if version.tags.get("work") == self.job.work]

    def _folder(self, task_index: int) -> Path:
        return Path(self._scratch.name) / f"{task_index:04d}"

    def _fetch(self, task_index: int) -> Path:
        folder = self._folder(task_index)
        if not checkpoint.fetch(self.job.storage.filesystem,
                                model_folder(self.folder, task_index), folder):
            raise RuntimeError(f"the model after task {task_index} is not at "
                               f"{model_folder(self.folder, task_index)}")
        self.checkpoint_bytes = sum(file.stat().st_size for file in folder.iterdir())
        return folder


def _train_trunk(arguments: Any, device: str, threads: int) -> Iterator[EpochRecord | str]:
    """The Ray task that trains the trunk; yields records, or last a message for the user."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield from fit_network(*arguments, device)
    except InputError as error:
        yield str(error)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Ray Train's own progress lines give way to ours; its warnings and errors stay."""
    import logging

    logger = logging.getLogger("ray.train")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
