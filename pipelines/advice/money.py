"""The costs of a stream in money: a retraining, and a year of new tasks.

A year begins with no task and brings N a month, evenly; every task stays. With 12 N = n tasks:

    a new task on features    n (training + features) seconds
    retraining everything     the k-th retraining takes k tasks' time: n (n + 1) / 2 tasks in all
    storage                   N m tasks after m months: 78 N task-months a year
"""

import dataclasses
from typing import Any

GIB = 1 << 30
"""Bytes of the unit that storage is priced in (`--price-gib-month`)."""
TASK_MONTHS = 78
"""1 + 2 + ... + 12."""


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices of rented resources, in one currency."""

    gpu_hour: float
    """An hour of the machine that trains."""
    gib_month: float
    tasks_a_month: float


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to keep up with new tasks."""

    name: str
    task_seconds: float
    """Machine time of one new task."""
    task_bytes: float
    """Bytes stored for each task."""
    everything: bool
    """Whether every retraining trains all tasks again."""
    accuracy: float | None


def yearly(way: Way, prices: Prices) -> dict[str, Any]:
    """The costs of one way: the last retraining of the year, and a year's computing and storage."""
    tasks = 12 * prices.tasks_a_month
    task_price = way.task_seconds / 3600 * prices.gpu_hour
    computing = task_price * (tasks * (tasks + 1) / 2 if way.everything else tasks)
    storage = TASK_MONTHS * prices.tasks_a_month * way.task_bytes / GIB * prices.gib_month
    return {"way": way.name, "accuracy": way.accuracy,
            "retraining": task_price * (tasks if way.everything else 1),
            "retraining_seconds": way.task_seconds * (tasks if way.everything else 1),
            "computing_a_year": computing, "storage_a_year": storage,
            "a_year": computing + storage}
