"""Files mapped into memory, and their pages given back when they were read.

A page that was read counts as memory of the process until the system takes it back. Features that
are hashed when they are opened, or copied to a device, would count as a whole.
"""

import contextlib
import mmap
import os
import threading
import weakref
from typing import IO

import pyarrow as pa
from torch import Tensor

_mappings: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Mappings in use, by their first address."""
_changing = threading.Lock()


def mapped(file: IO[bytes]) -> pa.Buffer:
    """The content of a file, memory-mapped.

    A lock on the file lasts as long as the content is in use, because the mapping keeps a handle
    of the same open file.
    """
    if not os.fstat(file.fileno()).st_size:
        return pa.py_buffer(b"")  # nothing that could be mapped
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    content = pa.py_buffer(mapping)
    with _changing:
        _mappings[content.address] = mapping
    return content


def release_pages(content: pa.Buffer | Tensor) -> None:
    """Gives back the pages of the mapped file that holds the content; it is still there, and read
    again where it is used. Content in ordinary memory stays as it is.
    """
    address = content.data_ptr() if isinstance(content, Tensor) else content.address
    with _changing:
        for first, mapping in _mappings.items():
            if first <= address < first + len(mapping):
                with contextlib.suppress(OSError):  # advice that a system need not take
                    mapping.madvise(mmap.MADV_DONTNEED)
                return
