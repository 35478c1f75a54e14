"""A cache of remote shards on the local disk, limited in size and shared by all processes.

    <folder>/<key>/part-00000-<sha>.arrow    a copy, mapped by its readers under a shared lock
    <folder>/<key>/part-00000-<sha>.ok       marks the copy as verified: holds its size, time and
                                             inode; its own modification time is the last use
    <folder>/<key>/part-00000-<sha>.lock     held during the download, so that it happens once
    <folder>/cache.lock                      held during an eviction

A lock belongs to an open file, so the system releases it when a process dies. A copy that a
process has open is never evicted; an unfinished copy has no reader and is evicted first.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from partialhn.errors import IntegrityError
from partialhn.features.mapping import mapped

CHUNK = 8 << 20
"""Number of bytes that are fetched, hashed and written at a time."""
SETTLED_SECONDS = 2.0
"""A younger file is not marked as verified: a file system may give two writes within one clock
tick the same modification time."""
Open = Callable[[], Any]
"""A function that opens the remote shard: returns a context manager with `read(bytes)`."""


class ShardCache:
    """Copies of shards below one folder; together they take at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def fetch(self, key: str, name: str, size: int, sha256: str, opener: Open) -> pa.Buffer:
        """The verified content of a shard, mapped from its copy; the copy stays while it is used.

        Without room for a copy (the limit, or a full disk) the shard is read into memory, with a
        warning.

        Raises: IntegrityError naming the shard if its size or SHA-256 differs from the expected.
        """
        path = self.folder / key / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                copy = self._open(path, size) or self._copy(path, size, sha256, opener)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            copy = None
        if copy is not None:
            with copy:
                return mapped(copy)
        warnings.warn(f"the cache {self.folder} has no room for shard {name} of {size} bytes, so "
                      "each process reads it into its own memory; give the cache more room "
                      "(--cache-gib, or more free disk)", stacklevel=2)
        with opener() as source:
            content = source.read(size + 1)
        check_content(name, len(content), hashlib.sha256(content).hexdigest(), size, sha256)
        return pa.py_buffer(content)

    def _open(self, path: Path, size: int) -> IO[bytes] | None:
        """The verified copy, locked against eviction; None if there is none."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # the copy may have been evicted between opening and locking, or changed by others
        if path.exists() and os.fstat(file.fileno()).st_size == size and is_verified(path):
            os.utime(marker(path))
            return file
        file.close()
        return None

    def _copy(self, path: Path, size: int, sha256: str, opener: Open) -> IO[bytes] | None:
        """Downloads the copy and opens it; None if there is no room."""
        for spare in (0, size):  # on a full disk the second try evicts twice the size
            try:
                with self._draft(path, size, spare) as draft:
                    if draft is None:
                        return None
                    _download(draft, path.name, size, sha256, opener)
                    os.replace(draft.name, path)  # noqa: PTH105 - both are names already
                    mark_verified(path)  # the draft's lock still protects it from eviction
                return self._open(path, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        return None

    @contextlib.contextmanager
    def _draft(self, path: Path, size: int, spare: int) -> Iterator[IO[bytes] | None]:
        """A locked, empty file of `size` bytes; deleted at the end unless it was moved.

        Yields None if there is no room.
        """
        name = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
        with locked(self.folder / "cache.lock"):
            if not self._make_room(size + spare):
                yield None
                return
            draft = name.open("xb")
            fcntl.flock(draft, fcntl.LOCK_EX)
            draft.truncate(size)  # reserves the room: other processes count this file
        try:
            with draft:
                yield draft
        finally:
            name.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Evicts the least recently used copies until `size` bytes fit; returns whether they do."""
        copies = sorted(self._copies())
        total = sum(length for _, length, _ in copies)
        for _, length, path in copies:
            if total + size <= self.limit:
                break
            if _evict(path):
                total -= length
        return total + size <= self.limit

    def _copies(self) -> Iterator[tuple[float, int, Path]]:
        """Every copy, finished or not, as (time of last use, bytes, path)."""
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
            if done <= size:  # a longer shard is refused below and never exceeds its room
                draft.write(chunk)
    draft.flush()
    check_content(name, done, digest.hexdigest(), size, sha256)


def _evict(path: Path) -> bool:
    """Removes a copy unless a process has it open; returns whether it is gone."""
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
    """Holds an exclusive lock between the processes of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_content(name: str, found_bytes: int, found_sha256: str, size: int, sha256: str) -> None:
    """Raises IntegrityError naming a shard whose size or SHA-256 differs from its manifest."""
    if (found_bytes, found_sha256) != (size, sha256):
        raise IntegrityError(f"shard {name} is damaged: sha256 {found_sha256[:12]}... of "
                             f"{found_bytes} bytes, expected {sha256[:12]}... of {size}")


def marker(path: Path) -> Path:
    """The file that marks a copy as verified."""
    return path.with_suffix(".ok")


def mark_verified(path: Path) -> None:
    """Records that the content has the right hash; the record holds until the file changes."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.ok-draft")
    draft.write_text(json.dumps(_identity(path)), encoding="utf-8")
    draft.replace(marker(path))


def mark_settled(path: Path) -> None:
    """Calls `mark_verified`, unless the file is so young that a change might keep its time."""
    if time.time() - path.stat().st_mtime > SETTLED_SECONDS:
        mark_verified(path)


def is_verified(path: Path) -> bool:
    """Whether this very file was verified and has not changed since."""
    try:
        return bool(json.loads(marker(path).read_text(encoding="utf-8")) == _identity(path))
    except (FileNotFoundError, ValueError):
        return False


def _identity(path: Path) -> list[int]:
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ino]
