"""Folders and files that other processes create meanwhile."""

from typing import Any

import pyarrow.fs as pafs


def folder_entries(filesystem: pafs.FileSystem, folder: str) -> list[Any]:
    """Arrow's `FileInfo` of every file and folder directly below a folder, in no order.

    Nothing if there is no folder. Arrow's own `allow_not_found` raises FileNotFoundError for a
    folder that is created while it looks (`findings/arrow_listing_not_found.sh`).
    """
    try:
        return list(filesystem.get_file_info(pafs.FileSelector(folder)))
    except FileNotFoundError:
        return []


def content_of(filesystem: pafs.FileSystem, path: str) -> bytes | None:
    """The content of a small file; None if there is no file."""
    try:
        with filesystem.open_input_file(path) as source:
            return bytes(source.readall())
    except FileNotFoundError:
        return None
