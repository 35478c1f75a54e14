"""Ray: decides whether a run needs it, starts or joins it from this process, and says what its
nodes have.

Ray counts GPUs, and PyTorch calculates on them. Only a worker asks PyTorch whether it has one: the
driver may be a machine without.
"""

import dataclasses
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from partialhn.config import ComputeConfig
from partialhn.errors import InputError
from pipelines.platform.packing import Room, described, workers_that_fit

if TYPE_CHECKING:
    import torch

LOCAL = "local"
"""The address that stands for a local Ray which only this process uses."""
START_ATTEMPTS = 3
"""How often Ray is started: it gives a node 30 s to come up, but a busy machine may need longer."""
TOKEN = ("; a cluster that wants a token (as one that `ray start` began where ~/.ray/auth_token "
         "exists) answers with RAY_AUTH_MODE=token here and the same token in RAY_AUTH_TOKEN or "
         "~/.ray/auth_token")
"""Said where something listens at the address and does not let this process in."""


GPU = "cuda"
"""PyTorch's kind of device on which a worker calculates that has one of Ray's GPUs."""


@dataclasses.dataclass(frozen=True)
class WorkerDevice:
    """The device of each worker of a run."""

    kind: str = "cpu"
    """PyTorch's kind of device."""
    gpus: float = 0.0
    """Ray's GPUs that a worker reserves, 0 to 1."""

    @staticmethod
    def with_share(gpus: float) -> "WorkerDevice":
        """The device of a worker with that share of a GPU; 0: a CPU."""
        return WorkerDevice(GPU, gpus) if gpus else WorkerDevice()

    def here(self) -> "torch.device":
        """The device, asked for in the worker's own process, which gets its share of the memory.

        Raises: InputError if PyTorch finds no GPU where Ray counts one.
        """
        import torch

        from partialhn.networks.device_memory import limit_share

        if self.kind == "cuda" and not torch.cuda.is_available():
            raise InputError(f"Ray counts a GPU on {socket.gethostname()}, but PyTorch "
                             f"{torch.__version__} finds none there; allowed: PyTorch with CUDA "
                             "and a driver on every machine with a GPU, or device cpu")
        device = torch.device(self.kind)
        limit_share(device, self.gpus)
        return device


def worker_device(compute: ComputeConfig, nodes: Sequence[Room]) -> WorkerDevice:
    """The device of each worker, from what the cluster's nodes have; this process may have another.

    Raises: InputError for more workers than the cluster has room for, which Ray would wait for.
    """
    gpu = workers_that_fit(Room(1, 1, 0), nodes)
    on_gpu = compute.device == "gpu" or (compute.device == "auto" and gpu >= compute.workers)
    kind = "GPU" if on_gpu else "CPU"
    room = gpu if on_gpu else workers_that_fit(Room(1, 0, 0), nodes)
    feature_workers = compute.feature_workers if on_gpu else 1
    for key, count in (("workers", compute.workers), ("feature_workers", feature_workers)):
        if room < count:
            raise InputError(f"{key} is {count} with one {kind}{' and one CPU' * on_gpu} each, but "
                             f"the cluster has room for {room} ({described(nodes)}); allowed: as "
                             f"many as there are {kind}s")
    return WorkerDevice.with_share(1.0 if on_gpu else 0.0)


def cluster_nodes() -> list[Room]:
    """What each node of the cluster has."""
    import ray

    return [Room(each["Resources"].get("CPU", 0), each["Resources"].get("GPU", 0),
                 each["Resources"].get("memory", 0)) for each in ray.nodes() if each["Alive"]]


def needs_ray(compute: ComputeConfig) -> bool:
    """Whether a run needs Ray: it has an address, several workers, or Ray is started already."""
    several_workers = compute.workers > 1 or compute.feature_workers > 1
    return compute.ray_address is not None or several_workers or _is_started()


def start_ray(address: str | None) -> None:
    """Joins the cluster at an address, or starts a local one that ends with this process.

    Raises: InputError if no cluster answers.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in (None, LOCAL):
        options["include_dashboard"] = False
        # a local machine gets no notice of preemption, and the actor that watches costs seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    listens = False
    try:
        _reach(address)
        listens = address not in (None, LOCAL)
        init_ray(address or LOCAL, **options)
    except (OSError, OverflowError, ValueError, ray.exceptions.RayError) as error:
        token = TOKEN if listens and not isinstance(error, ValueError) else ""
        raise InputError(f"ray_address is {address!r}, but no cluster answers ({error}); allowed: "
                         "auto, ray://host:10001, host:6379, local for a local one, or leave it "
                         f"out{token}") from error


def init_ray(address: str, **options: Any) -> None:
    """Starts or joins Ray; tries again if a node did not come up in time."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address, **options)
            return
        except Exception as error:  # Ray has no exception class of its own for this
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError if nothing listens at host:port; Ray itself would try for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _is_started() -> bool:
    """Whether this process has started or joined Ray; does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
