"""Images to stored features: the same bytes whoever computes them, and none computed twice."""

import dataclasses
import io
import itertools
import os
import pathlib
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pyarrow.fs import LocalFileSystem

from partialhn.data.augment import augment
from partialhn.data.decode import decode
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError
from partialhn.features import codec
from partialhn.features import shards as computing
from partialhn.features.extract import feature_jobs, group_jobs, precompute, shard_places
from partialhn.features.shards import compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.trunk import run_trunk

LOCAL = LocalFileSystem()


@pytest.fixture(scope="module")
def trunk(network):
    return CutNetwork.of(network, 3).trunk


@pytest.fixture
def folder(tmp_path, images):
    """25 digits as PNG files, which can be taken away."""
    (tmp_path / "images").mkdir()
    for index in range(25):
        pixels_HWC = images[index].permute(1, 2, 0).numpy()
        Image.fromarray(pixels_HWC).save(tmp_path / "images" / f"{index:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def experience(folder):
    files = tuple(str(path) for path in sorted(folder.iterdir()))
    whole = ImageTable(LOCAL, files, range(25), [-1] * 25, np.arange(25) % 2)
    return Experience("a", ("x", "y"), whole.take(range(12)), whole.take(range(12, 15)),
                      whole.take(range(15, 25)))


@pytest.fixture
def jobs(with_options, experience, trunk):
    def make(shard_rows=5, **sections):
        config = with_options(features={"views": 2, "shard_rows": shard_rows}, **sections)
        return feature_jobs(config, [experience], trunk)
    return make


def compute_shard(store, trunk, job, index):
    return next(compute_shards(store, trunk, [(job,)], [(0, index)]))[1][0]


def compute(store, trunk, job):
    return [compute_shard(store, trunk, job, index) for index in range(job.shards)]


def finish(store, trunk, job):
    return store.open(precompute(store, trunk, [job])[0][0])


@pytest.fixture
def store(tmp_path):
    return FeatureStore(LOCAL, str(tmp_path / "store"))


def test_training_images_get_all_views_and_others_one(jobs):
    made = jobs()
    assert [(job.split, job.recipe.views, job.shards) for job in made] == [
        ("train", 2, 3), ("validation", 1, 1), ("test", 1, 2)]
    assert [job.recipe.augment for job in made] == ["crop-flip", "none", "none"]


def test_splits_without_images_make_no_job(with_options, experience, trunk):
    bare = dataclasses.replace(experience, validation=experience.train.take([]))
    assert [job.split for job in feature_jobs(with_options(), [bare], trunk)] == ["train", "test"]


def test_features_are_the_trunks_of_every_view(store, trunk, jobs, experience):
    job = jobs()[0]
    opened = finish(store, trunk, job)
    images_BCHW = decode(experience.train, 16).images_BCHW
    rows = np.arange(12)
    for view in range(2):
        seen = augment(images_BCHW, rows, 12, view, "crop-flip", 0)
        found = opened.gather(torch.arange(12), torch.full((12,), view))
        assert torch.equal(found, run_trunk(trunk, seen))
    assert opened.y_N.tolist() == experience.train.label_N.tolist()
    assert opened.ids == experience.train.ids()


def test_bytes_do_not_depend_on_who_computes_or_in_which_order(tmp_path, trunk, jobs):
    job = jobs()[0]
    one, two = (FeatureStore(LOCAL, str(tmp_path / name)) for name in ("one", "two"))
    forward = compute(one, trunk, job)
    backward = [compute_shard(two, trunk, job, index) for index in (2, 1, 0)][::-1]
    assert [shard.sha256 for shard in forward] == [shard.sha256 for shard in backward]


def test_finished_shards_are_not_computed_again(store, trunk, jobs, folder):
    """The images are taken away: whoever decodes them again fails."""
    job = jobs()[0]
    assert job.recipe.key
    first = compute_shard(store, trunk, job, 0)
    second = compute_shard(store, trunk, job, 1)
    for path in folder.iterdir():
        path.unlink()
    assert compute_shard(store, trunk, job, 0) == first
    assert compute_shard(store, trunk, job, 1) == second
    with pytest.raises(FileNotFoundError):
        compute_shard(store, trunk, job, 2)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_unreadable_images_stop_the_run_or_are_left_out(store, trunk, jobs, folder, experience):
    (folder / "03.png").write_bytes(b"not an image")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"03\.png is no readable"):
        compute(store, trunk, jobs()[0])
    opened = finish(store, trunk, jobs(data={"on_bad_image": "skip"})[0])
    kept = [row for row in range(12) if row not in (3, 7)]
    assert opened.ids == [experience.train.ids()[row] for row in kept]
    assert opened.y_N.tolist() == [row % 2 for row in kept]
    assert [name.rpartition("/")[2] for name, _ in opened.manifest.bad] == ["03.png", "07.png"]
    images_BCHW = decode(experience.train.take(kept), 16).images_BCHW
    seen = augment(images_BCHW, np.array(kept), 12, 1, "crop-flip", 0)
    found = opened.gather(torch.arange(10), torch.ones(10, dtype=torch.int64))
    assert torch.equal(found, run_trunk(trunk, seen))


def test_a_shard_of_unreadable_images_is_empty_and_harmless(store, trunk, jobs, folder):
    for index in range(5, 10):
        (folder / f"{index:02d}.png").write_bytes(b"")
    opened = finish(store, trunk, jobs(data={"on_bad_image": "skip"})[0])
    assert [shard.rows for shard in opened.manifest.shards] == [5, 0, 2]
    assert len(opened) == 7


def test_nothing_readable_is_bad_input(store, trunk, jobs, folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    job = jobs(data={"on_bad_image": "skip"})[0]
    with pytest.raises(InputError, match="task 'a' has no readable train image: all 12"):
        finish(store, trunk, job)


def test_recipes_follow_data_trunk_and_options(with_options, experience, trunk, network):
    def key(change=experience, cut=trunk, **sections):
        return feature_jobs(with_options(**sections), [change], cut)[0].recipe.key

    other = dataclasses.replace(experience, train=experience.train.take(range(11)))
    keys = [key(), key(change=other), key(cut=CutNetwork.of(network, 2).trunk),
            key(change=dataclasses.replace(experience, transform="blur")),
            key(features={"views": 3}), key(features={"augment": "flip"}),
            key(features={"feature_dtype": "float16"}), key(features={"shard_rows": 3}),
            key(data={"input_size": 32}), key(data={"stream_seed": 1})]
    assert len(set(keys)) == len(keys)
    for same in (key(train={"seed": 5}), key(hypernet={"beta": 9.0}),
                 key(change=dataclasses.replace(experience, name="b"))):
        assert same == keys[0]


# Several depths in one pass ------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepest(network):
    return CutNetwork.of(network, 4).trunk


def jobs_at(with_options, experience, trunk, depths=None, **sections):
    return feature_jobs(with_options(features={"views": 2, "shard_rows": 5}, **sections),
                        [experience], trunk, depths)


def test_many_depths_in_one_pass_are_bit_for_bit_those_of_one(tmp_path, with_options, experience,
                                                              network, deepest):
    together, alone = (FeatureStore(LOCAL, str(tmp_path / name)) for name in ("one", "many"))
    jobs = jobs_at(with_options, experience, deepest, range(5))
    manifests, decoded = precompute(together, deepest, jobs)
    assert decoded == 25, "every image once, whatever the number of depths"
    assert len({manifest.key for manifest in manifests}) == 15
    for depth in range(5):
        trunk = CutNetwork.of(network, depth).trunk
        mine = [m for job, m in zip(jobs, manifests, strict=True) if job.depth == depth]
        theirs, _ = precompute(alone, trunk, jobs_at(with_options, experience, trunk))
        assert [m.key for m in mine] == [m.key for m in theirs]
        assert [[s.sha256 for s in m.shards] for m in mine] == [
            [s.sha256 for s in m.shards] for m in theirs]


def test_only_the_missing_depths_are_computed(store, with_options, experience, deepest, folder):
    precompute(store, deepest, jobs_at(with_options, experience, deepest, [2]))
    jobs = jobs_at(with_options, experience, deepest, [1, 2, 4])
    assert [[job.depth for job in group] for group in group_jobs(jobs)] == [[1, 2, 4]] * 3
    before = {path: path.stat().st_mtime_ns for path in
              (folder.parent / "store").rglob("*.arrow")}
    assert precompute(store, deepest, jobs)[1] == 25
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for path in folder.iterdir():
        path.unlink()
    assert precompute(store, deepest, jobs)[1] == 0


def test_equal_jobs_are_computed_once(store, with_options, experience, trunk):
    twin = dataclasses.replace(experience, name="b")
    jobs = feature_jobs(with_options(), [experience, twin], trunk)
    manifests, decoded = precompute(store, trunk, jobs)
    assert decoded == 25
    assert manifests[:3] == manifests[3:]


def test_a_job_of_another_trunk_is_refused(store, with_options, experience, deepest, images):
    other = CutNetwork.of(build_network("slim_resnet18", 2, seed=9), 3).trunk
    with pytest.raises(ValueError, match="task 'a' needs trunk"):
        precompute(store, deepest, jobs_at(with_options, experience, other))
    with pytest.raises(ValueError, match="depth 2 does not contain one of depth 3"):
        deepest.upto(2).upto(3)


def test_images_left_out_earlier_are_not_silently_missing(store, with_options, experience, trunk,
                                                          folder):
    (folder / "03.png").write_bytes(b"not an image")
    lenient = jobs_at(with_options, experience, trunk, data={"on_bad_image": "skip"})
    strict = jobs_at(with_options, experience, trunk, data={"on_bad_image": "error"})
    assert lenient[0].recipe == strict[0].recipe
    precompute(store, trunk, lenient)
    with pytest.raises(InputError, match=r"03\.png is no readable .*leave out 1 such image:"):
        precompute(store, trunk, strict)


def test_the_seconds_of_a_depth_are_those_it_takes_alone(store, with_options, experience, deepest,
                                                         monkeypatch):
    """What is deeper does not count, nor what was written for others before it.

    The clock stands still but where the last depth is computed, and where features are written.
    """
    whole, written, now = type(deepest).outputs, FeatureStore._write, [0.0]

    def outputs(self, images_BCHW):
        for depth, z_BCHW in whole(self, images_BCHW):
            if depth == 3:
                now[0] += 3
            yield depth, z_BCHW

    def write(self, path, content):
        now[0] += 1
        written(self, path, content)

    monkeypatch.setattr(type(deepest), "outputs", outputs)
    monkeypatch.setattr(FeatureStore, "_write", write)
    jobs = jobs_at(with_options, experience, deepest, [1, 2, 3])[1::3]  # of one shard
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    manifests, _ = precompute(store, deepest, jobs)
    assert [manifest.shards[0].seconds for manifest in manifests] == [1, 1, 4]


def test_two_processes_may_write_the_same_features_at_once(tmp_path, store, jobs, trunk):
    """Both succeed with one set, which verifies, and whose every shard is one of theirs."""
    torch.set_num_threads(1)
    made = jobs()
    go, children = tmp_path / "go", []
    for name in "ab":
        child = os.fork()
        if not child:
            code = 1
            try:
                while not go.exists():
                    time.sleep(0.001)
                manifests, decoded = precompute(store, trunk, made)
                (tmp_path / name).write_text(f"{decoded} {[m.key for m in manifests]} "
                                             f"{[m.created for m in manifests]}")
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    go.touch()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    (decoded, keys), (others, same) = ((tmp_path / name).read_text().split(" ", 1)
                                       for name in "ab")
    assert keys == same
    assert 25 <= int(decoded) + int(others) <= 50
    for job in made:
        manifest = store.find(job.recipe)
        assert manifest.rows == len(job.table)
        opened = store.open(manifest)
        again = finish(FeatureStore(LOCAL, str(tmp_path / "alone")), trunk, job)
        assert all(map(torch.equal, opened.shards, again.shards))
        folder = pathlib.Path(store.folder(job.recipe.key))
        assert {path.name for path in folder.glob("*.arrow")} == {
            shard.name for shard in manifest.shards}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_number_types_are_made_in_one_pass_with_the_others(store, with_options, experience, trunk,
                                                           dtype):
    configs = [with_options(features={"feature_dtype": each, "compression": compression})
               for each in ("float32", dtype) for compression in ("none", "lz4")]
    jobs = [job for config in configs for job in feature_jobs(config, [experience], trunk)]
    manifests, decoded = precompute(store, trunk, jobs)
    assert decoded == 25
    rows_B = torch.arange(12)
    train = [store.open(manifest).gather(rows_B, torch.ones_like(rows_B))
             for manifest in manifests[::3]]
    assert torch.equal(train[0], train[1])
    assert torch.equal(train[2], train[3])
    assert not torch.equal(train[0], train[2])
    assert (train[0] - train[2]).abs().max() < 0.01 * train[0].abs().max()


class Meeting:
    """A barrier that is passed once: what comes to it later goes on."""

    def __init__(self, parties):
        self.barrier, self.met = threading.Barrier(parties), False

    def wait(self):
        if not self.met:
            self.barrier.wait(timeout=20)
            self.met = True


def test_shards_are_read_ahead_of_the_trunk_and_written_behind_it(store, trunk, jobs, monkeypatch):
    """The third is read and the first written while the second goes through the trunk, by the
    thread that asks.
    """
    meeting, users = Meeting(3), set()
    run, read, written = computing.outputs_at, computing.decode_images, FeatureStore.write_shard
    runs = itertools.count()

    def decode_and_meet(*arguments):
        if len(arguments[0]) == 2:  # of the third shard; two readers may overtake each other
            meeting.wait()
        return read(*arguments)

    def run_and_meet(*arguments):
        users.add(threading.current_thread())
        if next(runs) == 2:  # of the second shard, its first view
            meeting.wait()
        return run(*arguments)

    def write_and_meet(self, recipe, index, *arguments, **options):
        if index == 0:
            meeting.wait()
        return written(self, recipe, index, *arguments, **options)

    monkeypatch.setattr(computing, "decode_images", decode_and_meet)
    monkeypatch.setattr(computing, "outputs_at", run_and_meet)
    monkeypatch.setattr(FeatureStore, "write_shard", write_and_meet)
    monkeypatch.setattr(computing, "READERS", 2)
    job = jobs()[0]
    made = list(compute_shards(store, trunk, [(job,)], [(0, 0), (0, 1), (0, 2)]))
    assert meeting.met
    assert users == {threading.current_thread()}
    assert [(place, count) for place, _, count in made] == [((0, 0), 5), ((0, 1), 5), ((0, 2), 2)]
    alone = FeatureStore(LOCAL, store.root + "-alone")
    assert [shards for _, shards, _ in made] == [
        [dataclasses.replace(compute_shard(alone, trunk, job, index),
                             seconds=made[index][1][0].seconds)] for index in range(3)]


def test_no_more_shards_are_held_than_it_says(store, trunk, jobs, monkeypatch):
    """However slow writing is: features of those that are written and of the one in the trunk."""
    held, most = set(), []
    written, run = FeatureStore.write_shard, computing._Shard.compute

    def write(self, recipe, index, *arguments, **options):
        time.sleep(0.05)
        held.discard(index)
        return written(self, recipe, index, *arguments, **options)

    def features(self, *arguments):
        held.add(self.place[1])
        most.append(len(held))
        return run(self, *arguments)

    monkeypatch.setattr(FeatureStore, "write_shard", write)
    monkeypatch.setattr(computing._Shard, "compute", features)
    (job, *_) = jobs(shard_rows=1)
    assert len(list(compute_shards(store, trunk, [(job,)], shard_places([(job,)])))) == 12
    assert 1 < max(most) <= computing.BEHIND + 1


@pytest.mark.parametrize(("dtype", "packed", "together"), [
    ("float32", False, 64), ("float16", True, 64), ("int8", True, 64), ("float32", True, 128)])
def test_pieces_give_the_bits_of_the_whole(tmp_path, store, trunk, images, with_options, packed,
                                           dtype, together, monkeypatch):
    """150 images in shards of 130: two whole pieces and a part of one; image 3 is damaged.

    Larger batches may round differently.
    """
    monkeypatch.setattr(computing, "images_together", lambda _: together)
    rows = [row % len(images) for row in range(150)]
    encoded_N = [encoded(Image.fromarray(images[row].permute(1, 2, 0).numpy())) for row in rows]
    encoded_N[3] = b""
    if packed:
        pq.write_table(pa.table({"image": encoded_N}), tmp_path / "d.parquet", row_group_size=40)
        table = ImageTable(LOCAL, (str(tmp_path / "d.parquet"),), [0] * 150, range(150), [0] * 150)
    else:
        for row, image in enumerate(encoded_N):
            (tmp_path / f"{row:03d}.png").write_bytes(image)
        files = tuple(str(path) for path in sorted(tmp_path.glob("*.png")))
        table = ImageTable(LOCAL, files, range(150), [-1] * 150, [0] * 150)
    config = with_options(features={"views": 2, "shard_rows": 130, "feature_dtype": dtype},
                          data={"on_bad_image": "skip"})
    experience = Experience("a", ("x",), table, table.take([]), table.take([]))
    (job,) = feature_jobs(config, [experience], trunk)
    opened = finish(store, trunk, job)
    kept = np.array([row for row in range(150) if row != 3])
    seen_BCHW = images[[rows[row] for row in kept]]
    whole = torch.stack([run_trunk(trunk, augment(seen_BCHW, kept, 150, view, "crop-flip", 0))
                         for view in range(2)], 1)
    for shard, part in ((0, whole[:129]), (1, whole[129:])):
        content = codec.encode(part, np.zeros(len(part), int), ["x"] * len(part), dtype, "none", "")
        wanted = codec.decode(pa.py_buffer(content), dtype, len(part), part.shape[1:])
        assert (torch.equal if together == 64 else torch.allclose)(opened.shards[shard],
                                                                   wanted.z_NVCHW)


def test_pixels_and_features_are_never_held_whole(store, trunk, jobs, monkeypatch):
    """The trunk gets one piece at a time, and no more pieces are decoded ahead than it says."""
    monkeypatch.setattr(computing, "PIECE", 2)
    monkeypatch.setattr(computing, "MOST_AHEAD", 4)
    monkeypatch.setattr(computing, "READERS", 4)
    monkeypatch.setattr(computing, "images_together", lambda _: 2)
    decoded, sizes, most = [], [], []
    read, run = computing.decode_images, computing.outputs_at

    def decode(*arguments):
        decoded.append(len(arguments[0]))
        return read(*arguments)

    def through(trunk, depths, images_BCHW, together):
        sizes.append(len(images_BCHW))
        time.sleep(0.02)  # whatever may be read ahead is read meanwhile
        most.append(len(decoded) - len(sizes))
        return run(trunk, depths, images_BCHW, together)

    monkeypatch.setattr(computing, "decode_images", decode)
    monkeypatch.setattr(computing, "outputs_at", through)
    job = jobs(shard_rows=12)[1]
    train = dataclasses.replace(jobs(shard_rows=12)[0], recipe=dataclasses.replace(
        jobs(shard_rows=12)[0].recipe, views=1, augment="none"))
    list(compute_shards(store, trunk, [(train,), (job,)], shard_places([(train,), (job,)])))
    assert set(sizes) == set(decoded) == {2, 1}
    assert max(most) <= 4


def test_the_first_bad_image_is_told_and_finished_shards_stay(store, trunk, jobs, folder):
    for name in ("07.png", "11.png"):
        (folder / name).write_bytes(b"no image")
    job = jobs()[0]
    with pytest.raises(InputError, match=r"07\.png"):
        for _ in compute_shards(store, trunk, [(job,)], [(0, 0), (0, 1), (0, 2)]):
            pass
    assert not any(thread.name.startswith("shard") for thread in threading.enumerate())
    assert store.find_shard(job.recipe.key, 0) is not None
    assert store.find_shard(job.recipe.key, 1) is None
