"""What the feature store holds: lists it, describes it, and reads it again byte for byte."""

import contextlib
import hashlib
from collections.abc import Iterator

from partialhn.errors import InputError, IntegrityError
from partialhn.features.cache import CHUNK, check_content
from partialhn.features.manifest import FeatureRecipe, Manifest, Shard
from partialhn.features.store import FeatureStore
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage
from pipelines.upkeep.prune import age_text, stored
from pipelines.upkeep.references import References

_COLUMNS = ("key", "state", "rows", "shape VCHW", "dtype", "MiB", "age", "needed by")


def listing(storage: Storage, needed: References) -> list[str]:
    """A table of every key, finished or not; a damaged manifest is a row that says so."""
    store, rows, total = open_store(storage), [_COLUMNS], 0
    for each in stored(storage):
        total += each.bytes
        rows.append((each.key, *_described(store, each.key), f"{each.bytes / 2**20:.1f}",
                     age_text(each.age), _users(needed.get(each.key, []))))
    if len(rows) == 1:
        return [f"no features in {storage.uri}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return [*lines, f"{len(rows) - 1} keys, {total / 2**20:.1f} MiB"]


def _described(store: FeatureStore, key: str) -> tuple[str, str, str, str]:
    """State, rows, shape and number type."""
    try:
        manifest = store.manifest(key)
    except IntegrityError:
        return ("damaged", "-", "-", "-")
    if manifest is None:
        return ("partial", "-", "-", "-")
    return ("complete", str(manifest.rows), _shape(manifest), _type(manifest.recipe))


def _users(users: list[str]) -> str:
    more = f" and {len(users) - 1} more" if len(users) > 1 else ""
    return f"{users[0]}{more}" if users else "-"


def _type(recipe: FeatureRecipe) -> str:
    return recipe.dtype if recipe.compression == "none" else f"{recipe.dtype}+{recipe.compression}"


def _shape(manifest: Manifest) -> str:
    return "x".join(map(str, manifest.shape_VCHW))


def description(storage: Storage, prefix: str) -> list[str]:
    """One set of features: recipe, cost, shards, and the images that were left out.

    Raises: InputError for a key that is not there or not finished.
    """
    key = _one_key(storage, prefix)
    manifest = open_store(storage).manifest(key)
    if manifest is None:
        raise InputError(f"features {key} are not finished: no manifest yet; the same "
                         "`partialhn train` goes on with them")
    seconds, recipe = sum(shard.seconds for shard in manifest.shards), manifest.recipe
    lines = [f"features  {storage.uri_of('features', key)}",
             f"trunk     {recipe.trunk}", f"data      {recipe.data}",
             f"images    {manifest.rows} of {recipe.input_size} pixels, transform "
             f"{recipe.transform}, {recipe.views} views ({recipe.augment}, seed {recipe.seed})",
             f"features  {_shape(manifest)} (views, channels, height, width) {_type(recipe)}",
             f"bytes     {manifest.bytes} in {len(manifest.shards)} shards",
             f"made      {manifest.created} in {seconds:.1f} s of work, by "
             + ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())]
    lines += [f"  {shard.name}  {shard.rows} rows  {shard.bytes} bytes  {shard.seconds:.1f} s"
              for shard in manifest.shards]
    return lines + [f"  left out {name}: {reason}" for name, reason in manifest.bad]


def verify(storage: Storage, prefix: str | None = None) -> Iterator[tuple[str, bool]]:
    """A line for every key, and whether all of it is as its manifest says.

    Every shard is read and hashed, whatever was noted before. Raises: InputError for an unknown
    key.
    """
    store = open_store(storage)
    for key in _keys(storage) if prefix is None else [_one_key(storage, prefix)]:
        try:
            manifest = store.manifest(key)
        except IntegrityError as error:
            yield str(error), False
            continue
        if manifest is None:
            yield f"{key}  partial: its finished shards are checked when they are used", True
            continue
        problems = [problem for shard in manifest.shards
                    if (problem := _problem(storage, manifest, shard))]
        yield from ((problem, False) for problem in problems)
        if not problems:
            yield (f"{key}  good: {len(manifest.shards)} shards, {manifest.rows} rows, "
                   f"{manifest.bytes} bytes"), True


def _problem(storage: Storage, manifest: Manifest, shard: Shard) -> str | None:
    path = storage.path("features", manifest.key, shard.name)
    digest, size = hashlib.sha256(), 0
    try:
        with contextlib.closing(storage.filesystem.open_input_stream(path)) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        check_content(path, size, digest.hexdigest(), shard.bytes, shard.sha256)
    except FileNotFoundError:
        return (f"shard {path} is missing; the manifest of {manifest.key} lists it with "
                f"{shard.rows} rows")
    except IntegrityError as error:
        return str(error)
    return None


def _keys(storage: Storage) -> list[str]:
    return sorted(storage.folders(storage.path("features")))


def _one_key(storage: Storage, prefix: str) -> str:
    found = [key for key in _keys(storage) if key.startswith(prefix)]
    if len(found) != 1:
        raise InputError(f"key is {prefix!r}, which {len(found)} keys in {storage.uri} start with; "
                         "allowed: the first characters of one that `partialhn features list` "
                         "prints")
    return found[0]
