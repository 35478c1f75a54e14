"""The data form `hf:OWNER/NAME[:CONFIG]`: data sets of the Hugging Face Hub, and local clones.

A clone of Parquet files or images is read where it lies. Everything else goes through the
`datasets` library, which downloads it or finds it in its own cache, and is written once as Parquet
files; the encoded images stay byte for byte what they were. A repository of image files is fetched
whole and read by this package, because `datasets` puts a class folder named `test` into two splits
and turns the code 007 into 7.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from partialhn.data.card import README, split_named
from partialhn.data.listing import image_paths, is_junk, parquet_paths
from partialhn.data.table import Folder
from partialhn.errors import InputError
from partialhn.naming import digest

_ALLOWED = "allowed: hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, or hf:FOLDER[:CONFIG] with a clone"


def open_hub(argument: str, cache_dir: Path) -> Folder:
    """The folder of a clone, or the folder below `cache_dir` with the data set's Parquet files.

    Raises: InputError for a data set that does not exist or cannot be fetched, for a configuration
    that it does not have, or where the `datasets` library is needed and missing.
    """
    name, _, config = argument.partition(":")
    chosen = config or None
    clone = Path(name).expanduser().absolute()
    if name and clone.is_dir():
        files = {path.relative_to(clone).as_posix(): path.stat() for path in sorted(
            clone.rglob("*")) if path.is_file()}
        listing = [path for path in files if not is_junk(path)]
        if image_paths(listing) or parquet_paths(listing):
            return Folder(clone, chosen, is_converted=False)
        content = digest([(path, files[path].st_size, files[path].st_mtime_ns)
                          for path in listing] + [config], 16)
        return _converted(str(clone), chosen, cache_dir / f"hf-{clone.name}-{content}")
    if not name or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"data is {'hf:' + argument!r}, which is no folder; {_ALLOWED}")
    return _converted(name, chosen, cache_dir / "-".join(
        ["hf", *name.split("/"), *([config] if config else [])]))


def _converted(name: str, chosen: str | None, folder: Path) -> Folder:
    """A data set that is fetched the first time; afterwards it stays what it was."""
    if (folder / README).exists():
        return Folder(folder)
    snapshot = folder / "snapshot.json"
    if snapshot.exists():
        found = Path(json.loads(snapshot.read_text(encoding="utf-8"))["folder"])
        if found.is_dir():
            return Folder(found, chosen, is_converted=False)
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(name, chosen)
        if _of_image_files(builder):
            return _as_snapshot(name, chosen, snapshot, builder.hash)
        builder.download_and_prepare()
        _write(builder.as_dataset(), folder, str(builder.hash))
    except InputError:
        raise
    except Exception as error:  # the library and its clients raise anything
        if not isinstance(error, ValueError) and _cached_snapshot(name):
            return _as_snapshot(name, chosen, snapshot, None)
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError):  # it is there, but not in this form
            raise InputError(f"data set {name!r} cannot be read as it is named: {reason}; allowed: "
                             f"hf:{name}:CONFIG with one of its configurations") from error
        raise InputError(
            f"data set {name!r} cannot be fetched: {reason}; allowed without a network: a clone as "
            f"data FOLDER or hf:FOLDER:CONFIG, made elsewhere by hf download {name} --repo-type "
            "dataset --local-dir FOLDER, or a copy of the library's cache in HF_HOME") from error
    return Folder(folder)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("data hf:... needs the datasets library; allowed: pip install "
                         "'partialhn[hf]', or the folder of a clone of Parquet files or images"
                         ) from error
    return datasets


def _of_image_files(builder: Any) -> bool:
    """Whether a data set is a folder of image files, also where only its cache is at hand."""
    names = {builder.name, builder.info.builder_name}
    described = Path(builder.cache_dir or "") / "dataset_info.json"
    if builder.name == "cache" and described.is_file():
        names.add(json.loads(described.read_text(encoding="utf-8")).get("builder_name"))
    return "imagefolder" in names


def _cached_snapshot(name: str) -> Path | None:
    """A repository's folder in the Hub's own cache; None unless all of its files came through."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None
    blobs = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "blobs"
    return None if any(blobs.glob("*.incomplete")) else found


def _as_snapshot(name: str, chosen: str | None, note: Path, revision: str | None) -> Folder:
    """The folder of a whole repository, which is fetched where a revision of the Hub is known."""
    from huggingface_hub import snapshot_download

    found = _cached_snapshot(name)
    if revision and "/" in name and not Path(name).is_dir() and len(revision) == 40:
        found = Path(snapshot_download(name, repo_type="dataset", revision=revision))
    if found is None:
        raise InputError(f"data set {name!r} is a folder of images and only its converted copy is "
                         "at hand, in which labels may be wrong; allowed: a clone as data FOLDER, "
                         f"made by hf download {name} --repo-type dataset --local-dir FOLDER")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"folder": str(found)}), encoding="utf-8")
    return Folder(found, chosen, is_converted=False)


def _write(splits: Mapping[str, Any], folder: Path, revision: str) -> None:
    """Writes the splits as Parquet files and a README.md that names them; all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        for own, rows in splits.items():
            if split_named(own):  # the others are said to be unused when the README.md is read
                rows.to_parquet(str(draft / f"{own}.parquet"))
        files = [{"split": own, "path": f"{own}.parquet"} for own in splits]
        described = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}],
                                    "revision": revision})
        (draft / README).write_text(f"---\n{described}---\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
