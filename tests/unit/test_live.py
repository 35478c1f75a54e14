"""What was asked lately: a bounded sample of features, written whole, read with suspicion."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from partialhn.errors import IntegrityError
from partialhn.predict import Answer
from pipelines.platform.storage import open_storage
from pipelines.serving import live
from pipelines.serving.live import CAPACITY, KEEP, FeatureRecorder, read_live

TRUNK = "a" * 64


def answers(task, count, label="x"):
    return [Answer(task, label, 1.0, ("x",), (1.0,))] * count


def batch(values):
    """Features whose pooled value says which image they are of."""
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path / "store"))


def test_what_is_written_is_read(storage):
    recorder = FeatureRecorder(storage, "s")
    recorder.add(TRUNK, batch(range(5)), [*answers("a", 3), *answers("b/2", 1),
                                          *answers("a", 1, None)], lambda row: f"image {row}")
    path = recorder.flush()
    found = read_live(storage, "s", TRUNK, hours=1)
    assert {task: (sorted(each.z_BC[:, 0].tolist()), each.seen)
            for task, each in found.items()} == {
        "a": ([0, 1, 2], 3), "b/2": ([3], 1), "none": ([4], 1)}
    assert found["a"].z_BC.shape == (3, 3)
    assert {task: each.ids for task, each in found.items()} == {
        "a": (), "b/2": (), "none": ("image 4",)}
    table = pq.read_table(path)
    assert set(table.schema.names) == {"task", "seen", "z", "id"}
    pq.write_table(table.drop_columns("id"), path)  # as version 0.1.0 wrote it
    assert read_live(storage, "s", TRUNK, hours=1)["none"].ids == ()


def test_many_strange_images_are_said_with_examples(storage):
    recorder = FeatureRecorder(storage, "s")
    recorder.add(TRUNK, batch(range(60)), [*answers("a", 31), *answers("a", 29, None)], str)
    assert not recorder.state()["new_task"], "too few to say"
    recorder.add(TRUNK, batch(range(1)), answers("a", 1, None), lambda row: "the last")
    state = recorder.state()
    assert (state["new_task"], state["unknown_share"]) == (True, round(30 / 61, 4))
    assert state["unknown_examples"] == ["56", "57", "58", "59", "the last"]


def test_the_sample_is_bounded_and_every_image_has_the_same_chance(storage):
    kept = []
    for seed in range(12):
        recorder = FeatureRecorder(storage, "s", seed)
        for start in range(0, 2048, 64):
            recorder.add(TRUNK, batch(range(start, start + 64)), answers("a", 64))
        rows = recorder._tasks["a"].rows
        assert len(rows) == CAPACITY
        kept += [float(row[0]) for row in rows]
    assert recorder.state()["rows"] == {"a": CAPACITY}
    quarters = np.histogram(kept, bins=4, range=(0, 2048))[0] / len(kept)
    np.testing.assert_allclose(quarters, 0.25, atol=0.03)


def test_writers_are_joined_by_what_they_saw(storage):
    for seen, value in ((300, 0.0), (100, 1.0)):
        recorder = FeatureRecorder(storage, "s")
        recorder.add(TRUNK, batch([value] * seen), answers("a", seen))
        recorder.flush()
    found = read_live(storage, "s", TRUNK, hours=1)["a"]
    assert found.seen == 400
    assert found.z_BC.mean() == pytest.approx(0.25, abs=0.01)


def test_a_writer_replaces_its_file_and_old_files_go(storage, monkeypatch):
    monkeypatch.setattr(live, "KEEP", 3)
    paths = []
    for _ in range(5):
        recorder = FeatureRecorder(storage, "s")
        recorder.add(TRUNK, batch([1.0]), answers("a", 1))
        assert recorder.flush() == recorder.flush()
        paths.append(recorder.flush())
        os.utime(paths[-1], (len(paths), len(paths)))
    recorder.flush()
    folder = os.path.dirname(paths[0])  # noqa: PTH120
    assert len(os.listdir(folder)) == 3  # noqa: PTH208
    assert KEEP > 3


def test_only_this_trunk_and_these_hours(storage):
    recorder = FeatureRecorder(storage, "s")
    recorder.add(TRUNK, batch([1.0]), answers("a", 1))
    path = recorder.flush()
    recorder.add("b" * 64, batch([2.0]), answers("a", 1))
    recorder.flush()
    assert read_live(storage, "s", TRUNK, 1)["a"].z_BC[0, 0] == 1
    assert read_live(storage, "s", "b" * 64, 1)["a"].z_BC[0, 0] == 2
    os.utime(path, (1, 1))
    assert read_live(storage, "s", TRUNK, 1) == {}
    assert read_live(storage, "other", TRUNK, 1) == {}


def test_a_disk_that_refuses_does_not_stop_the_answers(tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    recorder = FeatureRecorder(open_storage(str(tmp_path / "store")), "s", flush_seconds=0)
    recorder.add(TRUNK, batch([1.0]), answers("a", 1))
    recorder.close()
    assert recorder.state()["error"].startswith(("NotADirectoryError", "FileExistsError"))


@pytest.mark.parametrize("damage", ["truncated", "not Parquet", "other columns", "no numbers",
                                    "no list", "a bomb"])
def test_damaged_files_are_named(storage, damage):
    recorder = FeatureRecorder(storage, "s")
    recorder.add(TRUNK, batch(range(50)), answers("a", 50))
    path = recorder.flush()
    with open(path, "rb") as file:  # noqa: PTH123
        content = file.read()
    if damage in ("truncated", "not Parquet"):
        content = content[:-20] if damage == "truncated" else b"no Parquet at all"
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(content)
    elif damage == "other columns":
        pq.write_table(pa.table({"task": ["a"]}), path)
    elif damage == "a bomb":  # 4 million rows in a few kilobytes
        same = pa.array(np.zeros(4_000_000, np.int64))
        pq.write_table(pa.table({"task": pa.array(["a"] * 1).take(same), "seen": same, "z": same}),
                       path)
    elif damage == "no list":
        pq.write_table(pa.table({"task": ["a"], "seen": [1], "z": [1.0]}), path)
    else:
        z = pa.FixedSizeListArray.from_arrays(pa.array([float("nan")] * 3), 3)
        pq.write_table(pa.table({"task": ["a"], "seen": [1], "z": z}), path)
    with pytest.raises(IntegrityError, match=rf"{os.path.basename(path)}"):  # noqa: PTH119
        read_live(storage, "s", TRUNK, 1)
