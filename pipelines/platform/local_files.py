"""Files on a local or shared disk, with what the product needs beyond reading and writing."""

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file that is there."""

    path: str
    """Where, as a path in the storage's filesystem."""
    size: int
    """Bytes."""
    modified: float
    """When its content was written, in seconds since 1970 by the storage's own clock."""
    etag: str
    """Changes whenever the content does."""


class LocalFiles:
    """The disk as a place that several processes write to."""

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces a file; readers see the old or the new, never a part."""
        with _complete_file(path, content) as complete:
            complete.replace(path)

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes a file unless one is there; of several writers exactly one gets True."""
        with _complete_file(path, content) as complete:
            try:
                os.link(complete, path)
            except FileExistsError:
                return False
            return True

    def stat(self, path: str) -> Entry | None:
        """One file, or None."""
        file = Path(path)
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not file.is_file():
            return None
        return Entry(path, found.st_size, found.st_mtime,
                     f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}")

    def list(self, path: str) -> Iterator[Entry]:
        """Every file below a folder but unfinished ones; a file that goes meanwhile is left out."""
        for folder, _, names in os.walk(path):
            for name in names:
                entry = None if _is_draft(name) else self.stat(f"{folder}/{name}")
                if entry is not None:
                    yield entry

    def folders(self, path: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder."""
        try:
            return tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with all that is in it; nothing there is no error."""
        target = Path(path)
        while target.is_dir() and not target.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # somebody else deletes here too
                shutil.rmtree(target)
                return
        target.unlink(missing_ok=True)

    def now(self, path: str) -> float:  # noqa: ARG002
        """The clock of `Entry.modified`, in seconds since 1970."""
        return time.time()

    def check(self, path: str, write: bool) -> None:
        """Makes nothing. Raises: InputError where the folder cannot be used, naming it and why."""
        place = Path(path)
        while not place.exists() and place != place.parent:
            place = place.parent
        why = ("is no folder" if not place.is_dir()
               else "may not be read" if not os.access(place, os.R_OK | os.X_OK)
               else "may not be written" if write and not os.access(place, os.W_OK) else "")
        if why:
            raise InputError(f"storage {path!r}: {place} {why}; allowed: a folder that you may "
                             "write to, or s3://bucket/prefix")


def _is_draft(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def _complete_file(path: str, content: bytes) -> Iterator[Path]:
    """A synced temporary file beside `path`, gone afterwards unless it was moved."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    complete = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with complete.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield complete
    finally:
        complete.unlink(missing_ok=True)
