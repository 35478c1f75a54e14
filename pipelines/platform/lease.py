"""The lease of a stream or of a search: if several processes start at once, exactly one works.

    <root>/streams/<stream>/lease/00000007.json        claim 7: who holds it, since when
    <root>/streams/<stream>/lease/00000007.beat.json   its expiry, renewed by the holder; 0 once
                                                       released
    <root>/searches/<name>/lease/                      the same for a search

The number is the fencing token. A claim takes the next free number, with a write that fails if the
file exists, so two claims never have the same number. A process may claim the lease if the newest
claim was released, has expired by the storage's clock, or belongs to a process of this machine
that has ended. A holder whose lease was taken over finds a higher number at its next check, and
the logs refuse its token.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

from partialhn.errors import IntegrityError
from partialhn.json_files import parse_object
from pipelines.platform.storage import Storage
from pipelines.settings import check_name

SECONDS = 60.0
"""Seconds that a claim stays valid after its holder last renewed it."""
_CLAIM = re.compile(r"(\d{8})\.json")


class LeaseLostError(RuntimeError):
    """Another process has taken over the lease, so this one must stop."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    token: int
    host: str
    pid: int
    machine: str
    """Boot and process namespace; if equal, a process number means the same process."""
    started: str
    """Start time of the process, which distinguishes it from a later one with the same number."""
    since: float
    """Seconds since 1970, by the storage's clock."""
    expires: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"{self.host} (process {self.pid}) since {when}, lease {self.token}"

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this machine and has ended."""
        return (bool(self.machine) and self.machine == machine()
                and start_of(self.pid) != self.started)


class Lease:
    """A claim to a stream, renewed by a thread until `release`. of: what has the name."""

    def __init__(self, storage: Storage, name: str, seconds: float = SECONDS,
                 of: Literal["streams", "searches"] = "streams") -> None:
        self._storage, self.seconds = storage, seconds
        self._folder = storage.path(of, check_name(name), "lease")
        self.token = 0
        self._renewed_at = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def holder(self) -> Holder | None:
        """The process that holds the lease now, or None."""
        return self._live_holder(self._newest(), self._storage.now())

    def acquire(self) -> Holder | None:
        """Takes the lease and returns None; if another process holds it, returns that holder."""
        newest = self._newest()
        now = self._storage.now()
        holder = self._live_holder(newest, now)
        if holder is not None:
            return holder
        token, now_here = newest + 1, time.monotonic()
        mine = Holder(token, socket.gethostname(), os.getpid(), machine(), start_of(os.getpid()),
                      now, now + self.seconds)
        content = json.dumps(dataclasses.asdict(mine), indent=1).encode()
        if not self._storage.put_if_absent(self._path(token), content):
            return self._holder(token) or mine
        newest = self._newest()
        if newest != token:  # other processes took the lease while this one slept
            return self._holder(newest) or mine
        self.token, self._renewed_at = token, now_here
        for old in range(max(1, token - 8), token):  # the highest number is never deleted
            self._storage.delete(self._path(old))
            self._storage.delete(self._beat_path(old))
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)
        self._thread.start()
        return None

    def check(self) -> int:
        """Returns the token. Raises: LeaseLostError if this process no longer holds the lease."""
        newest = self._newest()
        if newest != self.token:
            raise LeaseLostError(f"another process has taken over the work in {self._folder} (its "
                                 f"lease is number {newest}, ours was {self.token}); it goes on "
                                 "from what is finished")
        if time.monotonic() - self._renewed_at > 0.9 * self.seconds:
            raise LeaseLostError(f"this process could not show for {self.seconds:g} s that it "
                                 f"still works in {self._folder} (lease {self.token}), so another "
                                 "one may begin; start the same command again")
        return self.token

    def release(self) -> None:
        """Releases the lease, so that the next pass need not wait for its expiry."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._write_beat(0.0)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it expires anyway, and must not hide another error
            self.release()

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self.seconds / 6):
            now_here = time.monotonic()
            with contextlib.suppress(Exception):  # `check` fails if too many renewals have failed
                self._write_beat(self._storage.now() + self.seconds)
                self._renewed_at = now_here

    def _write_beat(self, expires: float) -> None:
        self._storage.write_text(self._beat_path(self.token), json.dumps({"expires": expires}))

    def _newest(self) -> int:
        """The highest number of a claim; 0 if there is none."""
        numbers = (_CLAIM.fullmatch(file.path.rpartition("/")[2])
                   for file in self._storage.list(self._folder))
        return max((int(match[1]) for match in numbers if match), default=0)

    def _live_holder(self, token: int, now: float) -> Holder | None:
        holder = self._holder(token) if token else None
        live = holder is not None and holder.expires > now and not holder.is_gone
        return holder if live else None

    def _holder(self, token: int) -> Holder | None:
        """The holder of a claim, with its newest expiry; None if the claim was deleted."""
        claim = self._read(self._path(token))
        if claim is None:
            return None
        claim |= self._read(self._beat_path(token)) or {}
        try:
            return Holder(**claim)
        except TypeError as error:
            raise IntegrityError(f"lease {self._path(token)} cannot be read: {error}") from error

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            content = self._storage.read_bytes(path)
        except FileNotFoundError:
            return None
        return parse_object(content, f"lease {path}")

    def _path(self, token: int) -> str:
        return f"{self._folder}/{token:08d}.json"

    def _beat_path(self, token: int) -> str:
        return f"{self._folder}/{token:08d}.beat.json"


def machine() -> str:
    """Identifies this boot and process namespace; empty if the system does not provide it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """Start time of a process of this machine; empty if it has ended or is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else fields[18]
