"""Listing a folder that other processes create and fill meanwhile."""

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
