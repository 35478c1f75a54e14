"""Local copies of remote shards: bounded, and shared by every process of a machine.

    <folder>/<key>/part-00000-<sha>.arrow    a copy, mapped by its readers under a shared lock
    <folder>/<key>/part-00000-<sha>.ok       it was verified: its size, times and inode; its own
                                             time of change is the last use
    <folder>/<key>/part-00000-<sha>.lock     held while the copy is made: one download for all
    <folder>/cache.lock                      held while room is made

A lock belongs to an open file, so the system gives it back when a process dies. A copy that
somebody has open is never evicted; a copy that was not finished is nobody's and goes first.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from partialhn.errors import IntegrityError

CHUNK = 8 << 20
"""Bytes that are fetched, hashed and written at a time."""
SETTLED_SECONDS = 2.0
"""File systems may give two writes within a clock tick the same time."""
Open = Callable[[], Any]
"""Opens the remote shard: a context manager with `read(bytes)`."""


class ShardCache:
    """Copies below one folder that together take at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def fetch(self, key: str, name: str, size: int, sha256: str, opener: Open) -> pa.Buffer:
        """The verified content of a shard, mapped from its copy, which stays as long as it is used.

        Where there is no room for a copy (limit, or a full disk), it is read into memory with a
        warning.

        Raises: IntegrityError naming the shard where the content is not what was expected.
        """
        path = self.folder / key / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                held = self._open(path, size) or self._copy(path, size, sha256, opener)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            held = None
        if held is not None:
            with held:
                return mapped(held)
        warnings.warn(f"the cache {self.folder} has no room for shard {name} of {size} bytes; it "
                      "is read into memory, again by each process: give the cache more room",
                      stacklevel=2)
        with opener() as source:
            content = source.read(size + 1)
        check_content(name, len(content), hashlib.sha256(content).hexdigest(), size, sha256)
        return pa.py_buffer(content)

    def _open(self, path: Path, size: int) -> IO[bytes] | None:
        """The copy, held against eviction; None where there is none that was verified."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # evicted between our opening and our locking it, or changed by somebody else
        if path.exists() and os.fstat(file.fileno()).st_size == size and is_verified(path):
            os.utime(marker(path))
            return file
        file.close()
        return None

    def _copy(self, path: Path, size: int, sha256: str, opener: Open) -> IO[bytes] | None:
        """Makes the copy and opens it; None where there is no room."""
        for spare in (0, size):  # a disk that is full gives room by what else is evicted
            try:
                with self._draft(path, size, spare) as draft:
                    if draft is None:
                        return None
                    _download(draft, path.name, size, sha256, opener)
                    os.replace(draft.name, path)  # noqa: PTH105 - both are names already
                    mark_verified(path)  # still locked: nobody can have evicted it yet
                return self._open(path, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        return None

    @contextlib.contextmanager
    def _draft(self, path: Path, size: int, spare: int) -> Iterator[IO[bytes] | None]:
        """A locked file of `size` bytes to be filled, gone afterwards unless it was moved."""
        name = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
        with locked(self.folder / "cache.lock"):
            if not self._make_room(size + spare):
                yield None
                return
            draft = name.open("xb")
            fcntl.flock(draft, fcntl.LOCK_EX)
            draft.truncate(size)  # the room is taken, for others who look
        try:
            with draft:
                yield draft
        finally:
            name.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Evicts what was not used for longest until `size` bytes fit; says whether they do."""
        copies = sorted(self._copies())
        total = sum(length for _, length, _ in copies)
        for _, length, path in copies:
            if total + size <= self.limit:
                break
            if _evict(path):
                total -= length
        return total + size <= self.limit

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every copy, finished or not."""
        for pattern in ("*/*.arrow", "*/.*.draft"):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    used = marker(path).stat().st_mtime if marker(path).exists() else 0.0
                    yield used, path.stat().st_size, path


def _download(draft: IO[bytes], name: str, size: int, sha256: str, opener: Open) -> None:
    digest, done = hashlib.sha256(), 0
    with opener() as source:
        while done <= size and (chunk := source.read(min(CHUNK, size + 1 - done))):
            digest.update(chunk)
            done += len(chunk)
            if done <= size:  # a longer one is refused below, and takes no more than its room
                draft.write(chunk)
    draft.flush()
    check_content(name, done, digest.hexdigest(), size, sha256)


def _evict(path: Path) -> bool:
    """Removes a copy unless somebody has it open; says whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    marker(path).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock that every process of the machine respects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mapped(file: IO[bytes]) -> pa.Buffer:
    """The content of a file, mapped. A lock of the file lasts until nothing uses the content: the
    mapping has a handle of its own, which stands for the same open file.
    """
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def check_content(name: str, found_bytes: int, found: str, size: int, sha256: str) -> None:
    """Raises IntegrityError naming a shard that is not what its manifest says."""
    if (found_bytes, found) != (size, sha256):
        raise IntegrityError(f"shard {name} is damaged: sha256 {found[:12]}... of {found_bytes} "
                             f"bytes, expected {sha256[:12]}... of {size}")


def marker(path: Path) -> Path:
    """The file that says a copy was verified."""
    return path.with_suffix(".ok")


def mark_verified(path: Path) -> None:
    """Notes that the content was hashed and found right, as long as the file is not touched."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.ok-draft")
    draft.write_text(json.dumps(_identity(path)), encoding="utf-8")
    draft.replace(marker(path))


def mark_settled(path: Path) -> None:
    """`mark_verified`, unless the file is so young that a change might keep its time."""
    if time.time() - path.stat().st_mtime > SETTLED_SECONDS:
        mark_verified(path)


def is_verified(path: Path) -> bool:
    """Whether this very file was verified: no other one, and not changed since."""
    try:
        return bool(json.loads(marker(path).read_text(encoding="utf-8")) == _identity(path))
    except (FileNotFoundError, ValueError):
        return False


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]
