"""Disks: their free space, said before something large is written, and files that the system
refuses, named in a sentence.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from partialhn.errors import InputError, error_chain
from partialhn.numbers import size
from pipelines.platform.storage import Storage

FULL = (errno.ENOSPC, errno.EDQUOT)
SIGNS = ("No space left on device", "os error 28", "disk is full", "Disk quota exceeded")
"""Parts of the messages of libraries that pass no error number on: safetensors, Arrow, SQLite."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors of a path that this process may not use, or that has a file where a folder should be."""
SMALL = 16 * 2**20
"""Free bytes below which a folder counts as full."""


def check_room(storage: Storage, needed: int, what: str) -> str:
    """A line that says what is needed and free at a local storage; empty for a bucket.

    Raises: InputError if less is free than is needed.
    """
    if not storage.is_local:
        return ""
    folder = existing(storage.root)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{what} need {size(needed)}, but {size(free)} are free at {folder}; "
                         "allowed: free some disk, another --storage, or less to store "
                         "(--feature-dtype int8, --views 1)")
    return f"disk: {what} need {size(needed)}, {size(free)} are free at {folder}"


def full_disk(error: BaseException, folders: Iterable[str | Path]) -> str | None:
    """A sentence that names the full disk which caused an error; None for any other error.

    folders: where this process writes, in case the error names no file.
    """
    causes = list(error_chain(error))
    if not any(_says_full(cause) for cause in causes):
        return None
    named = [str(cause.filename) for cause in causes
             if isinstance(cause, OSError) and cause.filename]
    places = [existing(path) for path in (*named, *folders, tempfile.gettempdir())]
    full = next((place for place in places if shutil.disk_usage(place).free < SMALL), places[0])
    return (f"the disk is full: {size(shutil.disk_usage(full).free)} are free at {full}; nothing "
            "half-written will be used: free some space and start the same command again")


def refused_path(error: BaseException) -> str | None:
    """A sentence that names the path which the system refused; None for any other error."""
    for cause in error_chain(error):
        if isinstance(cause, OSError) and cause.errno in REFUSED and cause.filename:
            path = os.fsdecode(cause.filename)
            why = ("a file is where a folder should be" if existing(path).is_file()
                   and cause.errno in (errno.ENOTDIR, errno.EEXIST) else cause.strerror)
            return (f"{path} cannot be used: {why}; allowed: paths that you may read, and write "
                    "to where the command writes")
    return None


def existing(path: str | Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _says_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in FULL) or any(
        sign in str(error) for sign in SIGNS)


def folders_of(words: Iterable[str]) -> list[str]:
    """The folders that a command's words name, and the working folder."""
    return [*(word for word in words if os.sep in word or Path(word).exists()), str(Path.cwd())]
