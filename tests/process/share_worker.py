"""One of several workers that share a run's tasks, without Ray: what a worker group starts.

    python share_worker.py ASSIGNMENT.pickle RANK WORLD [TASK EPOCH]

Prints what it sends. With a task and an epoch it kills itself, SIGKILL, after that record.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

import torch

from partialhn.batches import Workers
from partialhn.errors import InputError
from pipelines.stages.worker import Worker


class Host:
    """No state is kept with the host: tasks keep theirs in the storage."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int, end: tuple[int, ...]) -> None:
        self.workers, self._end = Workers(rank, world), end

    def send(self, strategy, record):
        print(strategy, record.task_index, getattr(record, "epoch", "end"), flush=True)
        if (record.task_index, getattr(record, "epoch", None)) == self._end:
            os.kill(os.getpid(), signal.SIGKILL)

    def keep(self, state):
        raise AssertionError("workers that share tasks keep nothing together")

    def fetch(self, folder):
        return False


if __name__ == "__main__":
    assignment = pickle.loads(Path(sys.argv[1]).read_bytes())
    rank, world, *end = map(int, sys.argv[2:])
    try:
        Worker(assignment, Host(rank, world, tuple(end))).run()
    except InputError as error:
        sys.exit(f"error: {error}")
