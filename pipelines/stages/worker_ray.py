"""A worker of Ray Train, which learns tasks of its own or a part of every batch.

One run of Ray Train learns all tasks that are waiting, because starting a group of workers takes
far longer than learning a small task.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from partialhn import checkpoint
from partialhn.batches import Workers
from partialhn.errors import InputError
from partialhn.train import EpochRecord, TaskRecord
from pipelines.stages.worker import Worker


def learn(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The Ray Train worker function: an `assignment`, and the handle of the driver's `events`.

    Returns what `Worker.run` does, or an `error` for the user.
    """
    try:
        return Worker(loop_config["assignment"], RayHost(loop_config["events"])).run()
    except InputError as error:  # trying again would fail again
        return {"error": str(error)}


class RayHost:
    """Ray Train, as one of its workers sees it."""

    def __init__(self, events: Any) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self.workers = Workers(rank, world, _data_parallel, _sum) if world > 1 else Workers()
        self._events = events

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        self._events.add.remote(strategy, record)

    def keep(self, state: Path | None) -> None:
        import ray.train

        made = None if state is None else ray.train.Checkpoint.from_directory(str(state))
        ray.train.report({}, checkpoint=made)

    def fetch(self, folder: Path) -> bool:
        import ray.train

        found = ray.train.get_checkpoint()
        # not `as_directory`: a process that is killed in it leaves the copy on the node's disk
        return found is not None and checkpoint.fetch(found.filesystem, found.path, folder)


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    # unused: the first task trains the base of the generated weights, and its code has no part
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def _sum(total: Tensor) -> Tensor:
    torch.distributed.all_reduce(total)
    return total
