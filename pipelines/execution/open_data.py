"""A configuration's stream, with images that every node of a cluster can read.

Images stay where they are: in a bucket, or in a folder that all nodes see. Data sets that come
from a library are converted on the driver and go to the storage, where the workers find them.
"""

import dataclasses
from pathlib import Path

import pyarrow.fs

from partialhn.config import DataConfig
from partialhn.data import library
from partialhn.data.datasets import open_stream
from partialhn.data.experience import Experience
from pipelines.platform.storage import Storage, open_storage


def open_data(config: DataConfig, storage: Storage) -> list[Experience]:
    """The stream of experiences that a configuration describes; reads labels, but no images.

    `config.data` may be s3://bucket/prefix, with the same options after it as a storage's.

    Raises: InputError for data, a bucket or credentials that cannot be used, naming them.
    """
    if config.data.startswith("s3://"):
        source = open_storage(config.data)
        source.check(write=False)
        with source.explained():
            return open_stream(dataclasses.replace(config, data=source.uri), Path(),
                               source.filesystem)
    if storage.is_local:
        return open_stream(config, Path(storage.root) / "datasets")
    cache = Path.home() / ".cache" / "partialhn" / "datasets"
    if config.data == "digits":
        folder = library.convert_digits(cache)
    elif config.data.startswith("torchvision:"):
        folder = library.convert_torchvision(config.data.removeprefix("torchvision:"), cache)
    else:
        return open_stream(config, cache)
    shared = _shared(storage, folder)
    return open_stream(dataclasses.replace(config, data=shared), cache, storage.filesystem)


def _shared(storage: Storage, folder: Path) -> str:
    """Copies a folder of Parquet files to the storage, where it is not there yet."""
    for file in sorted(folder.glob("*.parquet")):
        target = storage.path("datasets", folder.name, file.name)
        there = storage.stat(target)
        if there is None or there.size != file.stat().st_size:
            pyarrow.fs.copy_files(str(file), target, pyarrow.fs.LocalFileSystem(),
                                  storage.filesystem)
    return storage.uri_of("datasets", folder.name)
