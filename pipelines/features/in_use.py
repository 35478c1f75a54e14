"""Records of the stored features that running jobs use, so that a prune does not delete them.

    <root>/in-use/<id>.json    who, which keys, until when; its holder rewrites it regularly

A job writes its keys down *before* it looks for the features; a prune writes its own record
*before* it looks for jobs. So if both run at once, at least one sees the other: the prune keeps
the job's features, or the job waits for the prune to end. A record is over when it was released,
when it has expired by the storage's clock, or when its process, on this machine, has ended.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from partialhn.errors import InputError, IntegrityError
from pipelines.platform.lease import machine, start_of
from pipelines.platform.storage import Storage

SECONDS = 120.0
"""Seconds that a record stays valid after its holder last renewed it."""
_FOLDER = "in-use"


@dataclasses.dataclass(frozen=True)
class Use:
    """One record: a job, the keys it uses, and when the record expires."""

    what: str
    keys: tuple[str, ...]
    prunes: bool
    host: str
    pid: int
    machine: str
    started: str
    expires: float
    """Seconds since 1970, by the storage's clock."""

    def __str__(self) -> str:
        return f"{self.what} on {self.host} (process {self.pid})"

    def is_over(self, now: float) -> bool:
        """Whether it has expired, or its process on this machine has ended."""
        gone = bool(self.machine) and self.machine == machine() and (
            start_of(self.pid) != self.started)
        return gone or self.expires <= now


class InUse:
    """This process's record, written with the first keys; a thread renews it until `release`."""

    def __init__(self, storage: Storage, what: str, *, prunes: bool = False,
                 seconds: float = SECONDS) -> None:
        self._storage, self._seconds = storage, seconds
        self._path = storage.path(_FOLDER, f"{uuid.uuid4().hex}.json")
        self._mine = Use(what, (), prunes, socket.gethostname(), os.getpid(), machine(),
                         start_of(os.getpid()), 0.0)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, keys: Iterable[str]) -> None:
        """Adds keys to the record; returns as soon as no prune is running.

        Raises: InputError if this is a prune and another one is running.
        """
        with self._lock:
            both = dict.fromkeys([*self._mine.keys, *keys])
            self._mine = dataclasses.replace(self._mine, keys=tuple(both))
        self._write()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
            self._thread.start()
        while other := self._prune():
            if self._mine.prunes:
                self.release()
                raise InputError(f"{self._storage.uri} is being pruned by {other}; allowed: one "
                                 "prune at a time")
            time.sleep(0.2)

    def release(self) -> None:
        """Ends the record and deletes it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._storage.delete(self._path)

    def __enter__(self) -> "InUse":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it expires anyway, and must not hide another error
            self.release()

    def _prune(self) -> Use | None:
        return next((use for path, use in records(self._storage)
                     if use.prunes and path != self._path), None)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._seconds / 6):
            with contextlib.suppress(Exception):  # the next renewal may succeed
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._mine = dataclasses.replace(self._mine,
                                             expires=self._storage.now() + self._seconds)
            self._storage.write_text(self._path, json.dumps(dataclasses.asdict(self._mine)))


def records(storage: Storage) -> Iterator[tuple[str, Use]]:
    """Path and content of every record that is not over.

    Raises: IntegrityError for a file that cannot be read as a record.
    """
    now = storage.now() if storage.exists(storage.path(_FOLDER)) else 0.0
    for file in storage.list(storage.path(_FOLDER)):
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            use = _parse(file.path, storage.read_text(file.path))
            if not use.is_over(now):
                yield file.path, use


def clear(storage: Storage) -> None:
    """Deletes the records that are over."""
    valid = {path for path, _ in records(storage)}
    for file in storage.list(storage.path(_FOLDER)):
        if file.path not in valid and file.modified < storage.now() - SECONDS:
            storage.delete(file.path)


def _parse(path: str, text: str) -> Use:
    try:
        fields: dict[str, Any] = json.loads(text)
        use = Use(**fields | {"keys": tuple(fields["keys"])})
        if not isinstance(use.expires, int | float) or type(use.pid) is not int:
            raise ValueError(f"expires is {use.expires!r}, pid {use.pid!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read as a record of features in use: {error!r}; "
                             "delete it while no job runs") from error
    return use
