"""The lease of a stream: of several schedulers that start at once, exactly one works.

    <root>/streams/<stream>/lease/00000007.json        claim 7: who, when; created conditionally
    <root>/streams/<stream>/lease/00000007.beat.json   rewritten by its holder: until when, or over

The number is the fencing token. A claim is the next free number, created only where nothing is
yet, so two claims never share one; it is allowed when the newest claim was given back, has expired
by the storage's own clock, or was made on this machine by a process that is gone. A holder that
was overtaken finds a higher number at its next check, and the logs refuse its token.
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
from typing import Any

from partialhn.errors import IntegrityError
from partialhn.json_files import parse_object
from pipelines.platform.storage import Storage
from pipelines.settings import check_name

SECONDS = 60.0
"""How long a claim holds without a sign of life."""
_CLAIM = re.compile(r"(\d{8})\.json")


class LeaseLostError(RuntimeError):
    """Another process has taken the stream; what was under way must stop."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    token: int
    host: str
    pid: int
    machine: str
    """Boot and process namespace: equal where a process number means the same process."""
    started: str
    """When the process started, so that a number used again is told apart."""
    since: float
    """Seconds since 1970, by the storage's clock."""
    expires: float

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"{self.host} (process {self.pid}) since {when}, lease {self.token}"

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and does not any more."""
        return (bool(self.machine) and self.machine == machine()
                and start_of(self.pid) != self.started)


class Lease:
    """A claim to a stream, kept alive by a thread until it is given back."""

    def __init__(self, storage: Storage, stream: str, seconds: float = SECONDS) -> None:
        self._storage, self.seconds = storage, seconds
        self._folder = storage.path("streams", check_name(stream), "lease")
        self.token = 0
        self._alive_at = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> Holder | None:
        """Takes the lease: None. Otherwise who holds it."""
        newest = self._newest()
        now = self._storage.now()
        holder = self._holder(newest) if newest else None
        if holder is not None and holder.expires > now and not holder.is_gone:
            return holder
        token, begun = newest + 1, time.monotonic()
        mine = Holder(token, socket.gethostname(), os.getpid(), machine(), start_of(os.getpid()),
                      now, now + self.seconds)
        content = json.dumps(dataclasses.asdict(mine), indent=1).encode()
        if not self._storage.put_if_absent(self._path(token), content):
            return self._holder(token) or mine
        newest = self._newest()
        if newest != token:  # others came and went while this process slept
            return self._holder(newest) or mine
        self.token, self._alive_at = token, begun
        for old in range(max(1, token - 8), token):  # the highest number stays for ever
            self._storage.delete(self._path(old))
            self._storage.delete(self._beat_path(old))
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._thread.start()
        return None

    def check(self) -> int:
        """The token, where the lease is still ours. Raises: LeaseLostError."""
        newest = self._newest()
        if newest != self.token:
            raise LeaseLostError(f"lease {self.token} of {self._folder} was overtaken by {newest}")
        if time.monotonic() - self._alive_at > 0.9 * self.seconds:
            raise LeaseLostError(f"lease {self.token} of {self._folder} could not be kept alive "
                                 f"for {self.seconds:g} s")
        return self.token

    def release(self) -> None:
        """Gives the lease back, so that the next pass need not wait."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._write_beat(0.0)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it expires by itself; what failed inside counts
            self.release()

    def _beat_on(self) -> None:
        while not self._stop.wait(self.seconds / 6):
            begun = time.monotonic()
            with contextlib.suppress(Exception):  # `check` says when too many have failed
                self._write_beat(self._storage.now() + self.seconds)
                self._alive_at = begun

    def _write_beat(self, expires: float) -> None:
        self._storage.write_text(self._beat_path(self.token), json.dumps({"expires": expires}))

    def _newest(self) -> int:
        numbers = (_CLAIM.fullmatch(entry.path.rpartition("/")[2])
                   for entry in self._storage.list(self._folder))
        return max((int(match[1]) for match in numbers if match), default=0)

    def _holder(self, token: int) -> Holder | None:
        """What a claim says, with its newest sign of life; None where it was cleared away."""
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
    """Names boot and process namespace; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def start_of(pid: int) -> str:
    """When a process of this machine started; empty where it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else fields[18]
