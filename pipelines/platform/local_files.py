"""Files on a local or shared disk: atomic writes, conditional writes, and listing."""

import contextlib
import dataclasses
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file in a storage: its path, size and version."""

    path: str
    """A path in the storage's filesystem."""
    size: int
    """Size in bytes."""
    modified: float
    """Time when its content was written, in seconds since 1970 by the storage's own clock."""
    etag: str
    """A string that changes whenever the content does."""
    arrived: float
    """Time when its content or name last changed in this storage, in the same seconds; a copy that
    keeps the times of its original, such as that of rsync -a, has an earlier `modified`."""


class LocalFiles:
    """Files on a disk to which several processes write."""

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces a file; readers see the old content or the new, never a mixture."""
        with _complete_file(path, content) as complete:
            complete.replace(path)

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes a file unless it exists; of several writers exactly one gets True."""
        with _complete_file(path, content) as complete:
            try:
                os.link(complete, path)
            except FileExistsError:
                return False
            return True

    def stat(self, path: str) -> StoredFile | None:
        """Size, time and etag of a file; None if it does not exist."""
        try:
            info = os.stat(path)  # noqa: PTH116 - a pass asks for thousands of files
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(info.st_mode):
            return None
        return StoredFile(path, info.st_size, info.st_mtime,
                          f"{info.st_ino:x}-{info.st_mtime_ns:x}-{info.st_size:x}", info.st_ctime)

    def list(self, path: str) -> Iterator[StoredFile]:
        """Every file below a folder, except unfinished ones and those deleted meanwhile."""
        for folder, _, names in os.walk(path):
            for name in names:
                file = None if _is_draft(name) else self.stat(f"{folder}/{name}")
                if file is not None:
                    yield file

    def folders(self, path: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder."""
        try:
            return tuple(sorted(item.name for item in os.scandir(path) if item.is_dir()))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with everything in it; does nothing if there is none."""
        target = Path(path)
        while target.is_dir() and not target.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # another process deletes here too
                shutil.rmtree(target)
                return
        target.unlink(missing_ok=True)

    def now(self, path: str) -> float:  # noqa: ARG002
        """The clock of `StoredFile.modified`, in seconds since 1970."""
        return time.time()

    def check(self, path: str, write: bool) -> None:
        """Checks a folder without creating it.

        Raises: InputError naming the folder and the reason, if it cannot be used.
        """
        folder = Path(path)
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        reason = ("is not a folder" if not folder.is_dir()
                  else "cannot be read by you" if not os.access(folder, os.R_OK | os.X_OK)
                  else "cannot be written by you" if write and not os.access(folder, os.W_OK)
                  else "")
        if reason:
            raise InputError(f"storage {path!r}: {folder} {reason}; allowed: a folder that you may "
                             "write to, or s3://bucket/prefix")


def _is_draft(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def _complete_file(path: str, content: bytes) -> Iterator[Path]:
    """A temporary file beside `path` with the content, on disk; deleted at the end unless moved."""
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
