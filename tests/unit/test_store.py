"""The feature store: what is written is read, mapped and not copied, or refused by name."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from partialhn.data.experience import newest_slots, slots_behind
from partialhn.errors import InputError, IntegrityError
from partialhn.features.cache import ShardCache
from partialhn.features.codec import encode
from partialhn.features.feature_set import join
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from partialhn.training.slots import Slot, images_behind, open_task_features

RECIPE = FeatureRecipe(trunk="t", data="d", transform="none", input_size=16, views=2,
                       augment="flip", seed=0, dtype="float32", shard_rows=4)
SHAPE_VCHW = (2, 3, 2, 2)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(LocalFileSystem(), str(tmp_path))


def features(rows, seed=0):
    return torch.randn(rows, *SHAPE_VCHW, generator=torch.Generator().manual_seed(seed))


def write(store, recipe, z_NVCHW, bad=()):
    """All shards of z, and the manifest."""
    shards = []
    for index, start in enumerate(range(0, len(z_NVCHW), recipe.shard_rows)):
        rows = np.arange(start, min(start + recipe.shard_rows, len(z_NVCHW)))
        shards.append(store.write_shard(recipe, index, z_NVCHW[rows], rows % 3,
                                        [f"image {row}" for row in rows], seconds=1.5,
                                        bad=bad if index == 0 else ()))
    return store.commit(recipe, shards, SHAPE_VCHW)


@pytest.mark.parametrize("compression", ["none", "lz4"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 10])
def test_round_trip(store, dtype, compression, rows):
    recipe = dataclasses.replace(RECIPE, dtype=dtype, compression=compression)
    z_NVCHW = features(rows)
    manifest = write(store, recipe, z_NVCHW, bad=[("image 99", "is empty")])
    found = store.find(recipe)
    assert found == manifest
    assert (found.rows, len(found.shards)) == (rows, -(-rows // 4))
    assert found.bad == [("image 99", "is empty")]
    opened = store.open(found)
    kept = torch.cat(opened.shards)
    assert kept.dtype == getattr(torch, dtype)
    assert torch.equal(kept, z_NVCHW.to(kept.dtype))
    assert opened.y_N.tolist() == [row % 3 for row in range(rows)]
    assert opened.ids == [f"image {row}" for row in range(rows)]
    assert (len(opened), opened.views, opened.shape_CHW) == (rows, 2, (3, 2, 2))
    size = sum((store_path(store, recipe) / shard.name).stat().st_size for shard in found.shards)
    assert found.bytes == size


def store_path(store, recipe):
    from pathlib import Path

    return Path(store.folder(recipe.key))


def mappings(name):
    """Address ranges of this process that map a file."""
    with open("/proc/self/maps") as lines:  # noqa: PTH123 - not a file on disk
        for line in lines:
            if line.rstrip().endswith(name):
                start, end = line.split()[0].split("-")
                yield int(start, 16), int(end, 16)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")  # noqa: PTH110
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_features_are_mapped_and_not_copied(store, dtype):
    recipe = dataclasses.replace(RECIPE, dtype=dtype)
    manifest = write(store, recipe, features(10))
    opened = store.open(manifest)
    for shard, tensor in zip(manifest.shards, opened.shards, strict=True):
        inside = [start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
                  for start, end in mappings(shard.name)]
        assert any(inside), f"{shard.name} was copied"


def test_gather_over_shards_is_gather_in_memory(store):
    z_NVCHW = features(10)
    opened = store.open(write(store, dataclasses.replace(RECIPE, dtype="float16"), z_NVCHW))
    assert len(opened.shards) == 3
    rows_B, views_B = torch.tensor([9, 0, 3, 4, 4, 8, 7]), torch.tensor([1, 0, 1, 0, 1, 1, 0])
    wanted = z_NVCHW[rows_B, views_B].half().float()
    assert torch.equal(opened.gather(rows_B, views_B), wanted)
    whole = opened.to(torch.device("cpu"))
    assert len(whole.shards) == 1
    assert torch.equal(whole.gather(rows_B, views_B), wanted)
    assert opened.gather(rows_B, views_B).dtype == torch.float32


def test_a_single_shard_gathers_the_same(store):
    z_NVCHW = features(4)
    opened = store.open(write(store, RECIPE, z_NVCHW))
    rows_B, views_B = torch.tensor([3, 3, 0]), torch.tensor([0, 1, 1])
    assert torch.equal(opened.gather(rows_B, views_B), z_NVCHW[rows_B, views_B])


@pytest.mark.parametrize(("field", "value"), [
    ("trunk", "u"), ("data", "e"), ("transform", "blur"), ("input_size", 32), ("views", 3),
    ("augment", "crop"), ("seed", 1), ("dtype", "float16"), ("dtype", "bfloat16"),
    ("dtype", "int8"), ("shard_rows", 5), ("compression", "lz4"), ("interpolation", "bicubic"),
    ("crop", 0.875), ("squash", True)])
def test_every_field_of_the_recipe_changes_the_key(field, value):
    assert dataclasses.replace(RECIPE, **{field: value}).key != RECIPE.key
    assert {f.name for f in dataclasses.fields(RECIPE)} == {
        "trunk", "data", "transform", "input_size", "views", "augment", "seed", "dtype",
        "shard_rows", "compression", "interpolation", "crop", "squash"}
    assert dataclasses.replace(RECIPE).key == RECIPE.key


def test_features_stored_before_there_was_compression_are_found():
    old = FeatureRecipe("t", "d", "none", 16, 2, "flip", 0, "float16", 4)
    assert old.key == "5c7a2872108c1cdc66808a8dfaa11509"
    assert FeatureRecipe(**old.fields()) == old
    assert not old.fields().keys() & {"compression", "interpolation", "crop", "squash"}


# int8 --------------------------------------------------------------------------------------------


def int8(store, z_NVCHW, compression="none"):
    recipe = dataclasses.replace(RECIPE, dtype="int8", compression=compression)
    return store.open(write(store, recipe, z_NVCHW))


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_int8_is_within_half_a_step_of_each_channel_of_each_shard(store, compression):
    z_NVCHW = features(10) * torch.tensor([1.0, 100.0, 1e-4]).view(1, 1, 3, 1, 1)
    z_NVCHW[4:8] *= 7  # the second shard has other scales
    z_NVCHW[8:, :, 1] = 0  # nothing in a channel of the third
    opened = int8(store, z_NVCHW, compression)
    assert all(shard.dtype == torch.int8 for shard in opened.shards)
    for features_ in (opened, opened.to(torch.device("cpu"))):
        for view in (0, 1):
            rows_B = torch.arange(10)
            found = features_.gather(rows_B, torch.full((10,), view))
            assert found.dtype == torch.float32
            for start in (0, 4, 8):
                part = z_NVCHW[start:start + 4]
                step_C = part.abs().amax((0, 1, 3, 4)) / 127
                error_NCHW = (found[start:start + 4] - part[:, view]).abs()
                assert (error_NCHW <= 0.501 * step_C.view(1, 3, 1, 1) + 1e-12).all()


def test_int8_is_a_function_of_the_shard_alone(store, tmp_path):
    z_NVCHW = features(10)
    others = z_NVCHW.clone()
    others[:4] *= 3
    mine = int8(store, z_NVCHW).manifest
    theirs = int8(FeatureStore(LocalFileSystem(), str(tmp_path / "b")), others).manifest
    assert [shard.sha256 for shard in mine.shards[1:]] == [
        shard.sha256 for shard in theirs.shards[1:]]
    assert mine.shards[0].sha256 != theirs.shards[0].sha256


@pytest.mark.parametrize(("dtype", "value"), [
    ("int8", float("inf")), ("int8", float("nan")), ("float16", 70_000.0),
    ("float16", float("-inf")), ("bfloat16", float("nan")), ("float32", float("nan"))])
def test_features_that_are_not_finite_are_refused_by_the_images_name(dtype, value):
    z_NVCHW = features(4)
    z_NVCHW[2, 0, 1, 1, 1] = value
    ids = ["a.png", "b.png", "c.png", "d.png"]
    with pytest.raises(InputError, match=f"features of image c.png are not finite as {dtype}, "
                                         "and those of 0 more"):
        encode(z_NVCHW, np.zeros(4, np.int64), ids, dtype, "none", "")


def test_large_features_that_a_number_type_holds_are_kept():
    z_NVCHW = features(4)
    z_NVCHW[2, 0, 1, 1, 1] = 70_000.0
    for dtype in ("bfloat16", "float32", "int8"):
        assert encode(z_NVCHW, np.zeros(4, np.int64), list("abcd"), dtype, "none", "")


@pytest.mark.parametrize("scale", [None, "[1.0]", "[1.0, 0.0, 1.0]", "[1.0, NaN, 1.0]", "{}", "x"])
def test_an_int8_shard_without_its_scales_is_refused(store, scale, monkeypatch):
    from partialhn.features import codec

    whole = codec.pa.schema

    def other(fields, metadata):
        metadata = {key: value for key, value in metadata.items() if key != "scale"}
        return whole(fields, metadata=metadata | ({"scale": scale} if scale else {}))

    monkeypatch.setattr(codec.pa, "schema", other)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        int8(store, features(4))


def test_sets_of_several_number_types_are_joined(store):
    z_NVCHW = features(10)
    plain = store.open(write(store, RECIPE, z_NVCHW))
    both = join([plain, int8(store, z_NVCHW)])
    rows_B = torch.arange(20)
    for each in (both, both.to(torch.device("cpu"))):
        found = each.gather(rows_B, torch.ones_like(rows_B))
        assert torch.equal(found[:10], z_NVCHW[:, 1])
        assert (found[10:] - z_NVCHW[:, 1]).abs().max() < 0.03
    assert torch.equal(both.first_views(1).gather(rows_B, torch.zeros_like(rows_B)),
                       both.gather(rows_B, torch.zeros_like(rows_B)))


def test_features_to_test_a_task_are_opened_when_they_are_first_used(store):
    slots = [Slot(name, ("x", "y", "z"), name, "none", {"test": write(
        store, dataclasses.replace(RECIPE, data=name, dtype="int8"), features(6, seed))})
        for seed, name in enumerate(("a", "b", "a/more"))]
    gone = Path(store.folder(slots[1].manifests["test"].key)) / "part"
    for shard in gone.parent.glob("*.arrow"):
        shard.rename(gone)
    first, damaged, more = open_task_features(store, slots, ())
    assert (first.refreshes, damaged.refreshes, more.refreshes) == (None, None, 0)
    assert more.test.keys == tuple(slots[place].manifests["test"].key for place in (0, 2))
    assert (damaged.test.keys, damaged.test.shape_CHW) == (
        (slots[1].manifests["test"].key,), SHAPE_VCHW[1:])
    with pytest.raises(IntegrityError, match="is missing"):
        damaged.test.first_views(1)
    opened = join([store.open(slots[place].manifests["test"]) for place in (0, 2)])
    assert len(more.test) == 12
    assert torch.equal(more.test.scales.scale_SC, opened.scales.scale_SC)
    rows = torch.arange(12)
    assert torch.equal(more.test.gather(rows, rows % 2), opened.gather(rows, rows % 2))
    assert first.test.first_views(1).views == 1


def test_a_task_is_its_newest_slot_and_rests_on_the_images_of_those_that_it_refreshes():
    names = ["a", "b", "a/more", "b/=other", "c", "b/last", "a/last"]
    assert list(newest_slots(names).items()) == [("a", 6), ("b", 5), ("c", 4)]
    assert slots_behind(names) == [[0], [1], [0, 2], [3], [4], [3, 5], [0, 2, 6]]
    slots = [Slot(name, (), name, "none", {"test": SimpleNamespace(rows=10 ** number)})
             for number, name in enumerate(names)]
    assert [images_behind(slots, place, "test") for place in (1, 2, 5, 6)] == [
        10, 101, 101_000, 1_000_101]
    assert images_behind(slots, 0, "validation") == 0


def test_without_a_manifest_nothing_is_there(store):
    assert store.find(RECIPE) is None
    shard = store.write_shard(RECIPE, 0, features(4), np.zeros(4), list("abcd"), seconds=0)
    assert store.find(RECIPE) is None
    assert store.find_shard(RECIPE.key, 0) == shard
    assert store.find_shard(RECIPE.key, 1) is None
    store.commit(RECIPE, [shard], SHAPE_VCHW)
    assert store.find(RECIPE) is not None
    assert store.find(dataclasses.replace(RECIPE, seed=9)) is None


def last_shard(store, manifest):
    return store_path(store, RECIPE) / manifest.shards[-1].name


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_a_damaged_shard_is_named(store, damage):
    manifest = write(store, RECIPE, features(10))
    path = last_shard(store, manifest)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes({"truncate": content[:-100], "empty": b"", "flip": content}[damage])
    with pytest.raises(IntegrityError) as caught:
        store.open(manifest)
    assert path.name in str(caught.value)
    assert "damaged" in str(caught.value)
    assert str(caught.value).endswith(f"computed again, delete {store.folder(manifest.key)}")
    assert manifest.shards[-1].sha256[:12] in str(caught.value)


def test_every_byte_of_a_shard_counts(store):
    manifest = write(store, dataclasses.replace(RECIPE, views=2), features(1))
    path = last_shard(store, manifest)
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            store.open(manifest)
    path.write_bytes(content)
    store.open(manifest)


def test_a_missing_shard_is_named(store):
    manifest = write(store, RECIPE, features(10))
    last_shard(store, manifest).unlink()
    with pytest.raises(IntegrityError, match=rf"{manifest.shards[-1].name} is missing"):
        store.open(manifest)


@pytest.mark.parametrize("change", [
    lambda text: text[:50], lambda text: "[]",
    lambda text: text.replace('"views": 2', '"views": 3'),
    lambda text: text.replace('"trunk"', '"tree"'), lambda text: text.replace('"rows"', '"row"')])
def test_a_damaged_manifest_is_refused(store, change):
    write(store, RECIPE, features(4))
    path = store_path(store, RECIPE) / "manifest.json"
    text = change(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(IntegrityError, match=f"manifest of features {RECIPE.key}"):
        store.find(RECIPE)


def test_a_damaged_shard_record_is_refused(store):
    shard = store.write_shard(RECIPE, 0, features(4), np.zeros(4), list("abcd"), seconds=0)
    sidecar = store_path(store, RECIPE) / "part-00000.json"
    for text in ("{", json.dumps({"name": shard.name})):
        sidecar.write_text(text)
        with pytest.raises(IntegrityError, match=r"part-00000\.json"):
            store.find_shard(RECIPE.key, 0)


def test_the_first_writer_of_a_shard_wins(store, tmp_path):
    other = FeatureStore(LocalFileSystem(), str(tmp_path))
    mine = store.write_shard(RECIPE, 0, features(4, 1), np.zeros(4), list("abcd"), seconds=1)
    theirs = other.write_shard(RECIPE, 0, features(4, 2), np.zeros(4), list("abcd"), seconds=2)
    assert theirs == mine
    opened = other.open(other.commit(RECIPE, [theirs], SHAPE_VCHW))
    assert torch.equal(opened.shards[0], features(4, 1))


def test_the_first_manifest_wins(store):
    first = write(store, RECIPE, features(4))
    again = store.commit(RECIPE, [], SHAPE_VCHW)
    assert again == first


def in_a_process_that_is_killed(work):
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_killed_before_its_claim_harms_nothing(store, tmp_path):
    killed = FeatureStore(LocalFileSystem(), str(tmp_path), put_if_absent=die)
    in_a_process_that_is_killed(lambda: killed.write_shard(
        RECIPE, 0, features(4, 1), np.zeros(4), list("abcd"), seconds=1))
    folder = store_path(store, RECIPE)
    leftover = [path.name for path in folder.iterdir()]
    assert len(leftover) == 1
    assert store.find_shard(RECIPE.key, 0) is None
    (folder / f".{leftover[0]}.0123").write_bytes(b"half a dra")
    (folder / ".part-00000.json.0123").write_bytes(b"{")
    opened = store.open(write(store, RECIPE, features(10, 2)))
    assert torch.equal(torch.cat(opened.shards), features(10, 2))


def test_a_writer_killed_before_the_manifest_leaves_finished_shards(store, tmp_path):
    def work():
        store.write_shard(RECIPE, 0, features(4, 1), np.zeros(4), list("abcd"), seconds=1)
        FeatureStore(LocalFileSystem(), str(tmp_path), put_if_absent=die).commit(
            RECIPE, [], SHAPE_VCHW)
    in_a_process_that_is_killed(work)
    assert store.find(RECIPE) is None
    assert store.find_shard(RECIPE.key, 0).rows == 4


def test_a_remote_store_reads_through_its_cache(tmp_path):
    """A filesystem that is not local by type: claims and cache are asked for."""
    (tmp_path / "bucket").mkdir()
    remote = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    with pytest.raises(ValueError, match="put_if_absent"):
        FeatureStore(remote, "features")

    def put(path, content):
        target = tmp_path / "bucket" / path
        if target.exists():
            return False
        target.write_bytes(content)
        return True

    (tmp_path / "bucket" / "root" / "features" / RECIPE.key).mkdir(parents=True)
    store = FeatureStore(remote, "root", put, ShardCache(tmp_path / "cache", 1 << 20))
    manifest = write(store, RECIPE, features(10))
    opened = store.open(manifest)
    assert torch.equal(torch.cat(opened.shards), features(10))
    cached = tmp_path / "cache" / RECIPE.key / manifest.shards[0].name
    before = cached.stat().st_mtime_ns
    store.open(manifest)
    assert cached.stat().st_mtime_ns == before
    cached.write_bytes(cached.read_bytes()[:-1])
    assert torch.equal(torch.cat(store.open(manifest).shards), features(10))
    with pytest.raises(ValueError, match="needs a cache"):
        FeatureStore(remote, "root", put).open(manifest)


def test_features_that_are_null_are_refused():
    """Arrow 25 gives zeros for the null rows of a tensor column."""
    import pyarrow as pa

    from partialhn.features.codec import decode

    content = encode(torch.ones(3, 1, 2, 2, 2), np.arange(3), ["a", "b", "c"], "float32", "none",
                     "{}")
    batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
    tensor = batch.schema.field("features").type
    rows_N = batch.column(2).storage.take(pa.array([0, None, 2]))
    other = pa.record_batch([batch.column(0), batch.column(1),
                             pa.ExtensionArray.from_storage(tensor, rows_N)], schema=batch.schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(other)
    assert decode(pa.py_buffer(content), "float32", 3, (1, 2, 2, 2)).z_NVCHW.sum() == 24
    with pytest.raises(ValueError, match="null"):
        decode(sink.getvalue(), "float32", 3, (1, 2, 2, 2))
