"""The queue through which workers send their records to the driver while they learn.

This file imports nothing heavy: the queue is an actor in a process of its own, which should start
quickly.
"""

from typing import Any


class Events:
    """An actor that queues the workers' records for the driver."""

    def __init__(self) -> None:
        self._queue: list[tuple[str, Any]] = []

    def add(self, strategy: str, record: Any) -> None:
        """Queues a record of a strategy, or a line for the user."""
        self._queue.append((strategy, record))

    def drain(self) -> list[tuple[str, Any]]:
        """Empties the queue; returns its (strategy, record) pairs in order."""
        records, self._queue = self._queue, []
        return records
