"""Inspecting the feature store: lists, describes and verifies the stored features."""

import contextlib
import hashlib
from collections.abc import Iterator

from partialhn.errors import InputError, IntegrityError
from partialhn.features.cache import CHUNK, check_content
from partialhn.features.manifest import FeatureRecipe, Manifest, Shard
from partialhn.features.store import FeatureStore
from partialhn.numbers import counted, size
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage
from pipelines.platform.text import table
from pipelines.upkeep.prune import age_text, stored
from pipelines.upkeep.references import References

_COLUMNS = ("key", "state", "rows", "shape", "dtype", "size", "age", "needed by")


def listing(storage: Storage, needed: References, versions_known: bool = True) -> list[str]:
    """A table of all keys, finished or not; a damaged manifest is shown as such.

    versions_known: False where no registry was asked; then nothing counts as needed by nobody.
    """
    store, rows, total = open_store(storage), [_COLUMNS], 0
    for features in stored(storage):
        total += features.bytes
        rows.append((features.key, *_described(store, features.key),
                     size(features.bytes), age_text(features.age),
                     _users(needed.get(features.key, []), "-" if versions_known else "unknown")))
    if len(rows) == 1:
        return [f"there are no features in {storage.uri}"]
    count = len(rows) - 1
    return [*table(rows), f"{count} set{'s' * (count > 1)} of features, {size(total)}; shape: "
                          "views x channels x height x width"]


def _described(store: FeatureStore, key: str) -> tuple[str, str, str, str]:
    """State, rows, shape and number type of a key's features."""
    try:
        manifest = store.manifest(key)
    except IntegrityError:
        return ("damaged", "-", "-", "-")
    if manifest is None:
        return ("partial", "-", "-", "-")
    return ("complete", str(manifest.rows), _shape(manifest), _type(manifest.recipe))


def _users(users: list[str], nobody: str) -> str:
    more = f" and {len(users) - 1} more" if len(users) > 1 else ""
    return f"{users[0]}{more}" if users else nobody


def _type(recipe: FeatureRecipe) -> str:
    return recipe.dtype if recipe.compression == "none" else f"{recipe.dtype}+{recipe.compression}"


def _shape(manifest: Manifest) -> str:
    return "x".join(map(str, manifest.shape_VCHW))


def description(storage: Storage, prefix: str) -> list[str]:
    """Describes one set of features: recipe, cost, shards, and the images that were left out.

    prefix: the first characters of its key. Raises: InputError for an unknown or unfinished key.
    """
    key = _one_key(storage, prefix)
    manifest = open_store(storage).manifest(key)
    if manifest is None:
        raise InputError(f"features {key} are not finished and have no manifest yet; to finish "
                         "them, start the same `partialhn train` again")
    seconds, recipe = sum(shard.seconds for shard in manifest.shards), manifest.recipe
    lines = [f"features  {storage.uri_of('features', key)}",
             f"trunk     {recipe.trunk}", f"data      {recipe.data}",
             f"images    {manifest.rows} of {recipe.input_size} pixels, transform "
             f"{recipe.transform}, {recipe.views} views ({recipe.augment}, seed {recipe.seed})",
             f"features  {_shape(manifest)} (views, channels, height, width) {_type(recipe)}",
             f"bytes     {manifest.bytes} in {counted(len(manifest.shards), 'shard')}",
             f"computed  {manifest.created} in {seconds:.1f} s of work, by "
             + ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())]
    lines += [f"  {shard.name}  {shard.rows} rows  {shard.bytes} bytes  {shard.seconds:.1f} s"
              for shard in manifest.shards]
    return lines + [f"  left out {name}: {reason}" for name, reason in manifest.bad]


def verify(storage: Storage, prefix: str | None = None) -> Iterator[tuple[str, bool]]:
    """Compares each key's shards with its manifest; yields a line and whether they are good.

    prefix: the first characters of a single key. Every shard is read and hashed again. Raises:
    InputError for an unknown key.
    """
    store = open_store(storage)
    for key in _keys(storage) if prefix is None else [_one_key(storage, prefix)]:
        try:
            manifest = store.manifest(key)
        except IntegrityError as error:
            yield str(error), False
            continue
        if manifest is None:
            yield f"{key}  unfinished: its shards are verified when they are used", True
            continue
        problems = [problem for shard in manifest.shards
                    if (problem := _problem(storage, manifest, shard))]
        yield from ((problem, False) for problem in problems)
        if not problems:
            yield (f"{key}  good: {counted(len(manifest.shards), 'shard')}, "
                   f"{counted(manifest.rows, 'row')}, {size(manifest.bytes)}"), True


def _problem(storage: Storage, manifest: Manifest, shard: Shard) -> str | None:
    path = storage.path("features", manifest.key, shard.name)
    digest, length = hashlib.sha256(), 0
    try:
        with contextlib.closing(storage.filesystem.open_input_stream(path)) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                length += len(chunk)
        check_content(path, length, digest.hexdigest(), shard.bytes, shard.sha256)
    except FileNotFoundError:
        return (f"shard {path} is missing; the manifest of {manifest.key} lists it with "
                f"{shard.rows} rows")
    except IntegrityError as error:
        return str(error)
    return None


def _keys(storage: Storage) -> list[str]:
    return sorted(storage.folders(storage.path("features")))


def _one_key(storage: Storage, prefix: str) -> str:
    every = _keys(storage)
    keys = [key for key in every if key.startswith(prefix)]
    if len(keys) != 1:
        raise InputError(f"key is {prefix!r}, and {len(keys) or 'none'} of the {len(every)} keys "
                         f"in {storage.uri} start with it; allowed: the first characters of "
                         "exactly one key, as `partialhn features list` prints them")
    return keys[0]
