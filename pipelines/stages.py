"""The stages that `train` and `retrain` share: trunk, features and experiences, on Ray.

    data -> trunk (Ray task) -> features (Ray Data) -> experiences (Ray Train)

Every stage finds what an earlier run finished, so the same command goes on where it stopped.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from partialhn import chain
from partialhn.backbone import Network
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.featurise import FeatureJob
from partialhn.pretrain import fit_network, load_network
from partialhn.result import Outcome
from partialhn.run import Parts
from partialhn.slots import Slot
from partialhn.store import Manifest
from partialhn.stream import Experience
from partialhn.train import EpochRecord, TaskRecord
from pipelines.events import Events
from pipelines.features import compute_features
from pipelines.in_use import InUse
from pipelines.progress import Progress
from pipelines.storage import Storage
from pipelines.worker import Assignment, learn

Follow = Callable[[str, EpochRecord | TaskRecord], None]
MAX_FAILURES = 3
START_ATTEMPTS = 3
"""Ray gives a node 30 s to come up; a machine that is busy with other work may need longer."""


def start_ray(config: Config) -> None:
    """Joins the configured cluster, or starts a local one that ends with this process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.compute.ray_address is None:
        options["include_dashboard"] = False
        # nobody takes a local machine away with notice, and the actor that watches costs seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        _reach(config.compute.ray_address)
        init_ray(config.compute.ray_address or "local", **options)
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(f"ray_address is {config.compute.ray_address!r} and no cluster answers "
                         f"({error}); allowed: auto, ray://host:10001, host:6379, or leave it out "
                         "for a local one") from error


def _reach(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port; Ray itself would try for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def init_ray(address: str, **options: Any) -> None:
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


class Stages:
    """The stages of one stream's run; Ray must have been started.

    A context: inside it no features that the stages made or found are pruned.
    """

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        """Decides on devices and threads, and refuses what the cluster can never give."""
        import ray

        self.config, self.storage, self.stream, self.progress = config, storage, stream, progress
        self.folder = storage.path("runs", stream, "learned")
        """Where the models after each task are (`partialhn.chain`)."""
        compute, there = config.compute, ray.cluster_resources()
        self.gpu = compute.device == "gpu" or (compute.device == "auto"
                                               and there.get("GPU", 0) >= compute.workers)
        needed = "GPU" if self.gpu else "CPU"
        if there.get(needed, 0) < compute.workers:
            raise InputError(f"workers is {compute.workers} with one {needed} each, but the "
                             f"cluster has {there.get(needed, 0):g}; allowed: as many workers as "
                             f"there are {needed}s")
        self.threads = compute.threads or max(1, (os.cpu_count() or 1) // compute.workers)
        self.in_use = InUse(storage, f"stream {stream}")

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *error: object) -> None:
        self.in_use.__exit__(*error)

    def network(self, first: Experience) -> Network:
        """The network the trunk is cut from: found, or trained on the first task by a Ray task."""
        arguments = (self.config, first, self.storage.filesystem, self.storage.root)
        network = load_network(*arguments)
        if network is not None:
            self.progress.line("trunk: found, not trained again")
            return network
        self._fit_network(arguments)
        network = load_network(*arguments)
        assert network is not None
        return network

    def _fit_network(self, arguments: Any) -> None:
        """Trains the network; a task lost with its node goes on elsewhere, after its last epoch."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(num_returns="streaming", num_gpus=1 if self.gpu else 0,
                            max_retries=0)(_train_trunk)
        for attempt in range(MAX_FAILURES + 1):
            try:
                for reference in remote.remote(arguments, "cuda" if self.gpu else "cpu",
                                               self.threads):
                    record = ray.get(reference)
                    if isinstance(record, str):
                        raise InputError(record)
                    self.progress.trunk(record)
                return
            except RayTaskError:  # our own code raised it, and would again
                raise
            except RayError as error:
                if attempt == MAX_FAILURES:
                    raise
                self.progress.line(f"trunk: lost its worker ({type(error).__name__}), goes on")

    def features(self, jobs: Sequence[FeatureJob], parts: Parts) -> tuple[list[Manifest], int]:
        """The features of all jobs, and how many images had to be decoded."""
        workers = self.config.compute.feature_workers
        manifests, decoded = compute_features(
            self.storage, parts.trunk, jobs, workers=workers, gpu=self.gpu,
            threads=self.config.compute.threads or max(1, (os.cpu_count() or 1) // workers),
            progress=self.progress.features, say=self.progress.line, in_use=self.in_use)
        self.progress.features_done(manifests, decoded)
        return manifests, decoded

    def learned(self, prefixes: Sequence[str]) -> list[chain.Learned]:
        """The tasks that an earlier run learned."""
        return chain.find(self.storage.filesystem, self.folder, prefixes)

    def learn(self, parts: Parts, slots: Sequence[Slot], prefixes: Sequence[str],
              follow: Follow) -> dict[str, Any]:
        """Learns what is not learned yet in one run of Ray Train.

        `follow` gets every record as it comes. Returns `outcomes` by strategy, `device` and
        `peak_rss_bytes`. Raises: InputError for anything the user can set right.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        known = self.learned(prefixes)
        if len(known) == len(slots) and not self.config.train.compare:
            return {"outcomes": {self.config.train.strategy: chain.outcome_of(known)},
                    "peak_rss_bytes": 0, "device": "none: everything was learned before"}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        events = ray.remote(num_cpus=0, scheduling_strategy=here)(Events).remote()
        assignment = Assignment(self.config, parts, tuple(slots), tuple(prefixes), self.storage,
                                self.folder, self.threads, events)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(self._fit, assignment)
            while True:
                ended = running.done()
                for strategy, record in ray.get(events.take.remote()):
                    self.progress.record(strategy, record)
                    follow(strategy, record)
                if ended:
                    break
                time.sleep(0.3)
        returned: dict[str, Any] = running.result()
        if "error" in returned:
            raise InputError(returned["error"])
        return returned

    def forget_run(self, prefixes: Sequence[str]) -> None:
        """Removes Ray Train's own checkpoints of a finished run; what it learned is kept.

        Those of bounds stay: nothing else remembers what they learned.
        """
        if not self.config.train.compare:
            with contextlib.suppress(FileNotFoundError):
                self.storage.filesystem.delete_dir(
                    self.storage.path("runs", self.stream, self._run_name(prefixes)))

    def _run_name(self, prefixes: Sequence[str]) -> str:
        """Same name = Ray Train resumes, so it says all that is learned, bounds too."""
        text = "\n".join([prefixes[-1], *self.config.train.compare])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _fit(self, assignment: Assignment) -> dict[str, Any]:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            learn, train_loop_config={"assignment": assignment},
            scaling_config=ScalingConfig(num_workers=self.config.compute.workers,
                                         use_gpu=self.gpu),
            run_config=RunConfig(name=self._run_name(assignment.prefixes),
                                 storage_filesystem=self.storage.filesystem,
                                 storage_path=self.storage.path("runs", self.stream),
                                 failure_config=FailureConfig(max_failures=MAX_FAILURES),
                                 checkpoint_config=CheckpointConfig(num_to_keep=2)))
        with _quiet_logs():
            returned: dict[str, Any] = trainer.fit().return_value
        return returned


def our_outcome(returned: dict[str, Any], config: Config) -> Outcome:
    """What the configured strategy did, of what `Stages.learn` returned."""
    outcome: Outcome = returned["outcomes"][config.train.strategy]
    return outcome


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
