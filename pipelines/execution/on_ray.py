"""Executes the phases of a run on Ray, which must be started already.

A Ray task trains the trunk, Ray Data computes features, and Ray Train learns experiences. One run
of Ray Train learns all waiting tasks, because starting a group of workers takes far longer than
learning a small task.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from partialhn.checkpoints import checkpoint
from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError
from partialhn.features.batches import Workers
from partialhn.networks.precision import configure_torch
from partialhn.training.pretrain import fit_network
from partialhn.training.records import EpochRecord, TaskRecord
from pipelines.execution.base import Execution
from pipelines.execution.events import Events
from pipelines.execution.task_share import error_fields, error_of
from pipelines.execution.worker import Assignment, OnRecord, Worker
from pipelines.features.on_ray import decoding_actors, on_ray
from pipelines.features.produce import Run
from pipelines.platform.cluster import WorkerDevice, cluster_nodes, worker_device
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


def learn(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The Ray Train worker function; the config holds an `assignment`, the `events` actor, and the
    `device` that the worker is to have.

    Returns the result of `Worker.run`, or the fields of an error for the user.
    """
    try:
        host = RayHost(loop_config["events"], loop_config["device"])
        return Worker(loop_config["assignment"], host).run()
    except InputError as error:  # trying again would fail again
        return error_fields(error)


class RayHost:
    """The worker's host in a worker process of Ray Train."""

    def __init__(self, events: Any, device: WorkerDevice) -> None:
        """Raises: InputError if PyTorch finds no GPU where Ray counts one."""
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        kind = device.here()
        self.device: torch.device = get_device() if kind.type == "cuda" else kind
        self.workers = Workers(rank, world, _data_parallel, _sum) if world > 1 else Workers()
        self._events = events

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        self._events.add.remote(strategy, record)

    def say(self, line: str) -> None:
        self._events.add.remote("", line)

    def keep(self, state: Path | None) -> None:
        import ray.train

        saved = None if state is None else ray.train.Checkpoint.from_directory(str(state))
        ray.train.report({}, checkpoint=saved)

    def fetch(self, folder: Path) -> bool:
        import ray.train

        saved = ray.train.get_checkpoint()
        # not `as_directory`: a process that is killed in it leaves the copy on the node's disk
        return saved is not None and checkpoint.fetch(saved.filesystem, saved.path, folder)


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    # some parameters are unused: the first task trains the base only, and its code is empty
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def _sum(total: Tensor) -> Tensor:
    torch.distributed.all_reduce(total)
    return total


MAX_FAILURES = 3
"""How often a phase is started again after the death of a worker or a node."""


class RayExecution(Execution):
    """Executes every phase on Ray; each survives the death of a worker or a node."""

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        """Chooses devices. Raises: InputError if the cluster has no room for the workers."""
        super().__init__(config, storage, stream, progress)
        self.device = worker_device(config.compute, cluster_nodes())

    def _learns_on(self) -> torch.device:
        return torch.device(self.device.kind)

    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        """Trains in a Ray task; if its node dies, another resumes after the last kept epoch."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote: Any = ray.remote(num_returns="streaming", num_gpus=self.device.gpus,
                                 max_retries=0)(_train_trunk)
        threads = self._threads(self.config.compute.workers)
        for attempt in range(MAX_FAILURES + 1):
            try:
                for reference in remote.remote(self.config, first, self.storage, self.device,
                                               threads):
                    record = ray.get(reference)
                    if isinstance(record, str):
                        raise InputError(record)
                    yield record
                return
            except RayTaskError:  # our own code raised it and would raise it again
                raise
            except RayError as error:
                if attempt == MAX_FAILURES:
                    raise
                self.progress.line(f"trunk: the worker died ({type(error).__name__}); another one "
                                   "resumes after the last epoch that was kept")

    def _featurise(self) -> Run:
        workers = self.config.compute.feature_workers
        return on_ray(workers, self.device, self._threads(workers),
                      decoding_actors(self.device, workers))

    def _learn(self, assignment: Assignment, on_record: OnRecord) -> dict[str, Any]:
        """Starts one run of Ray Train; its records come through an actor on the driver's node.

        Nobody waits for the thread that runs it: a command that is interrupted, or whose
        `on_record` fails, ends at once, and with it Ray ends the run.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Events)
        events = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        running = concurrent.futures.Future[dict[str, Any]]()

        def fit() -> None:
            try:
                running.set_result(self._fit(assignment, events))
            except BaseException as error:
                running.set_exception(error)

        threading.Thread(target=fit, daemon=True).start()
        while True:
            ended = running.done()
            for strategy, record in ray.get(events.drain.remote()):
                if isinstance(record, str):
                    self.progress.line(record)
                else:
                    on_record(strategy, record)
            if ended:
                break
            time.sleep(0.3)
        returned = running.result()
        if "error" in returned:
            raise error_of(returned)
        return returned

    def _fit(self, assignment: Assignment, events: Any) -> dict[str, Any]:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        folder, _, name = assignment.run.rpartition("/")
        # NCCL, which Ray takes for a GPU, needs time and memory of it; one worker sends nothing
        alone = self.config.compute.workers == 1 or self.device.kind == "cpu"
        train: Any = TorchTrainer  # its type annotations do not allow a return value
        trainer = train(
            learn, train_loop_config={"assignment": assignment, "events": events,
                                      "device": self.device},
            torch_config=TorchConfig(backend="gloo" if alone else None),
            scaling_config=ScalingConfig(num_workers=self.config.compute.workers,
                                         use_gpu=self.device.gpus > 0),
            run_config=RunConfig(name=name, storage_path=folder,
                                 storage_filesystem=self.storage.filesystem,
                                 failure_config=FailureConfig(max_failures=MAX_FAILURES),
                                 checkpoint_config=CheckpointConfig(num_to_keep=2)))
        with _quiet_logs():
            returned: dict[str, Any] = trainer.fit().return_value
        return returned


def _train_trunk(config: Config, first: Experience, storage: Storage, device: WorkerDevice,
                 threads: int) -> Iterator[EpochRecord | str]:
    """The Ray task that trains the trunk; yields records, or at last an error message."""
    configure_torch(threads)
    try:
        yield from fit_network(config, first, storage.filesystem, storage.root, device.here())
    except InputError as error:
        yield str(error)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Hides Ray Train's own progress lines; its warnings and errors are still shown."""
    import logging

    logger = logging.getLogger("ray.train")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
