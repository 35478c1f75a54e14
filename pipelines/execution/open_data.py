"""Opens a configuration's stream so that every node of a cluster can read its images.

Images stay where they are: in a bucket, or in a folder that all nodes see. Data sets that a form
converts, as those of a library, are converted on the driver and copied to the storage, where all
workers can read them.
"""

import dataclasses
from pathlib import Path

import pyarrow.fs

from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.data.experience import Experience
from partialhn.data.table import converted_folder
from pipelines.platform.storage import Storage, open_storage


def open_data(config: DataConfig, storage: Storage) -> list[Experience]:
    """The stream of experiences of a configuration; reads labels, but no images.

    `config.data` may be s3://bucket/prefix, with the same query options as a storage URI.

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
    folder = converted_folder(config.data, cache)
    if folder is None or not folder.is_converted:
        return open_stream(config, cache)
    uploaded = _upload(storage, folder.path)
    return open_stream(dataclasses.replace(config, data=uploaded), cache, storage.filesystem)


def _upload(storage: Storage, folder: Path) -> str:
    """Copies a folder of Parquet files to the storage unless they exist; returns its URI there."""
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("README.md")]):
        target = storage.path("datasets", folder.name, file.name)
        stored = storage.stat(target)
        if stored is None or stored.size != file.stat().st_size:
            pyarrow.fs.copy_files(str(file), target, pyarrow.fs.LocalFileSystem(),
                                  storage.filesystem)
    return storage.uri_of("datasets", folder.name)
