"""How a worker tells the driver what happens, while it happens.

Imports nothing heavy: an actor of this class is a process of its own and starts as quickly as Ray.
"""

from typing import Any


class Events:
    """The actor through which workers tell the driver what happens."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, Any]] = []

    def add(self, strategy: str, record: Any) -> None:
        """Queues a record of a strategy."""
        self._waiting.append((strategy, record))

    def take(self) -> list[tuple[str, Any]]:
        """Everything that was queued since the last call, in order."""
        waiting, self._waiting = self._waiting, []
        return waiting
