"""One of several workers that share a run's tasks, without Ray: what a worker group starts."""

import json
import os
import signal
import sys

import torch

from partialhn.errors import InputError
from partialhn.features.batches import Workers
from pipelines.execution.worker import Assignment, Worker


class Host:
    """No state is kept with the host, nor asked for: all that is learned is in the storage."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int, end: tuple[str, int, int]) -> None:
        self.workers, self._end = Workers(rank, world), end

    def send(self, strategy, record):
        print(strategy, record.task_index, getattr(record, "epoch", "end"), flush=True)
        if (strategy, record.task_index, getattr(record, "epoch", None)) == self._end:
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, line):
        print(line, flush=True)

    def keep(self, state):
        raise AssertionError("workers that share tasks keep nothing together")

    def fetch(self, folder):
        raise AssertionError("what workers left that shared batches is not gone on from")


def share(assignment: Assignment, rank: int, world: int, task: int = -1, epoch: int = -1,
          strategy: str = "partial_hn") -> None:
    """Prints what it sends, and last the accuracies that it returns. With a task and an epoch it
    kills itself, SIGKILL, after that record.
    """
    try:
        done = Worker(assignment, Host(rank, world, (strategy, task, epoch))).run()
    except InputError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({name: outcome.accuracy_TT for name, outcome in done["outcomes"].items()}))
