"""The lines that `partialhn serve` prints while it runs: a line for each model that it loads."""

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from partialhn.numbers import percent
from pipelines.platform.text import auto_line

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine's own server, which no proxy of the environment can reach."""


_ALL = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""The addresses that stand for all of a machine, and the one at which it reaches itself."""


def address(host: str, port: int) -> str:
    """The start of a server's URIs; IPv6 addresses stand in brackets there."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def healthz(host: str, port: int) -> str:
    """The URI of a server's /healthz, as this machine reaches it."""
    return f"{address(_ALL.get(host, host), port)}/healthz"


class Watcher:
    """Asks a server's /healthz, and prints a line when it has another model.

    Args:
        uri: address of /healthz.
        version: the version that was loaded first.
        log: called with each line.
    """

    def __init__(self, uri: str, version: str, log: Callable[[str], None]) -> None:
        self.uri = uri
        self._version, self._log, self._failure = version, log, ""
        self._said_new = False

    def say_accuracy(self) -> None:
        """Prints how often the model is right where nobody says the task."""
        health = self._health()
        if health and health["auto"]:
            accuracy = health["auto_accuracy"]
            self._log(auto_line(tuple(accuracy.values()) if accuracy else None))

    def _health(self) -> dict[str, Any] | None:
        """The body of /healthz; None where the server is busy or about to stop."""
        try:
            with _DIRECT.open(self.uri, timeout=5) as response:
                health: dict[str, Any] = json.loads(response.read())
        except (OSError, ValueError):
            return None
        return health

    def look(self) -> None:
        """Prints what has changed since the last call."""
        health = self._health()
        if health is None:  # the next look will tell
            return
        now = time.strftime("%H:%M:%S")
        if health["version"] != self._version:
            self._log(f"{now} now serving version {health['version']} instead of {self._version}")
            self._version = health["version"]
            self.say_accuracy()
        failure = str(health["reload"].get("error", ""))
        if failure and failure != self._failure:
            self._log(f"{now} still serving version {self._version}, because checking for a new "
                      f"one failed: {failure}")
        self._failure = failure
        record = health["recording"] or {}
        if record.get("new_task") and not self._said_new:
            self._log(f"{now} a new task seems to be here: {percent(record['unknown_share'])} of "
                      "the images belong to no known task, for example (SHA-256) "
                      f"{', '.join(record['unknown_examples'])}; `partialhn drift --propose` "
                      "opens a folder for it in the inbox")
        self._said_new = bool(record.get("new_task"))
