"""Numbered files of a folder that are only ever added: 00000001.json, 00000002.json and so on."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from pipelines.platform.storage import Storage

READERS = 16
"""Files that are read at once."""
TOGETHER = 16
"""Files that a thread reads one after the other: handing over each would take longer than to read
it from a disk."""
_FILE = re.compile(r"(\d{8})\.json")
Item = TypeVar("Item")


class NumberedFiles(Generic[Item]):
    """What the files of a folder hold. They never change, so each is read only once."""

    def __init__(self, storage: Storage, folder: str, read: Callable[[int], Item]) -> None:
        """read: gives what the file with a number holds."""
        self._storage, self.folder, self._read = storage, folder, read
        self._items: list[Item] = []

    def path(self, number: int) -> str:
        """The path of the file with a number."""
        return f"{self.folder}/{number:08d}.json"

    def items(self) -> list[Item]:
        """What all files so far hold, in order. Raises: as `read`."""
        if not self._items:
            numbers = range(1, self._last() + 1)
            with ThreadPoolExecutor(READERS) as pool:  # a remote storage answers many at once
                for items in pool.map(lambda first: [self._read(number) for number
                                                     in numbers[first:first + TOGETHER]],
                                      range(0, len(numbers), TOGETHER)):
                    self._items += items
        else:  # a listing of a long folder takes longer than to look for the next number
            while self._storage.exists(self.path(len(self._items) + 1)):
                self._items.append(self._read(len(self._items) + 1))
        return list(self._items)

    def put(self, number: int, item: Item, content: bytes) -> bool:
        """Writes the file after the last one; False if another writer was faster."""
        if not self._storage.put_if_absent(self.path(number), content):
            return False
        self._items.append(item)
        return True

    def _last(self) -> int:
        """The highest number of a file; 0 for an empty folder."""
        numbers = map(_FILE.fullmatch, self._storage.files(self.folder))
        return max((int(match[1]) for match in numbers if match), default=0)
