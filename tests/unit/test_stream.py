"""Image tables, experiences, the class-incremental split and the held-out shares."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable, image_field
from partialhn.data.splits import held_out, split_classes
from partialhn.errors import InputError

IMAGES = [bytes([i]) * (i + 1) for i in range(10)]


def write_rows(path, images, **options):
    table = pa.table({"image": [{"bytes": image, "path": "x.png"} for image in images],
                      "label": [0] * len(images)})
    pq.write_table(table, path, **options)


@pytest.fixture
def table(tmp_path):
    """Ten images in two Parquet files of row groups of two, out of order."""
    write_rows(tmp_path / "a.parquet", IMAGES[:6], row_group_size=2)
    write_rows(tmp_path / "b.parquet", IMAGES[6:], row_group_size=2)
    paths = (str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"))
    return ImageTable(LocalFileSystem(), paths, [0] * 6 + [1] * 4, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
                      range(10))


def test_reads_in_the_order_asked_for(table):
    order = [7, 0, 5, 5, 9, 1]
    taken = table.take(order)
    assert taken.read() == [IMAGES[i] for i in order]
    assert taken.label_N.tolist() == order
    assert taken.ids()[0] == f"{table.files[1]}#1"


def test_takes_by_mask_and_keeps_only_the_files_it_needs(table):
    late = table.take(table.label_N >= 6)
    assert late.read() == IMAGES[6:]
    assert late.files == table.files[1:]
    nothing = table.take([])
    assert (len(nothing), nothing.read(), nothing.files) == (0, [], ())
    assert len(table.take(np.zeros(10, dtype=bool))) == 0


def test_ids_are_unique(table):
    assert len(set(table.ids())) == len(table)


def test_reads_image_files_and_absent_images(tmp_path):
    (tmp_path / "one.png").write_bytes(b"one")
    write_rows(tmp_path / "rows.parquet", [None, b"two"])
    paths = (str(tmp_path / "one.png"), str(tmp_path / "rows.parquet"))
    table = ImageTable(LocalFileSystem(), paths, [1, 0, 1], [1, -1, 0], [0, 0, 0])
    assert table.read() == [b"two", b"one", b""]
    assert table.ids() == [f"{paths[1]}#1", paths[0], f"{paths[1]}#0"]


def test_reads_a_plain_binary_column(tmp_path):
    pq.write_table(pa.table({"img": [b"a", b"b"]}), tmp_path / "t.parquet")
    table = ImageTable(LocalFileSystem(), (str(tmp_path / "t.parquet"),), [0, 0], [1, 0], [0, 0])
    assert table.read() == [b"b", b"a"]


def test_fingerprint_is_of_content_labels_and_order_not_of_place(table, tmp_path):
    for i, image in enumerate(IMAGES):
        (tmp_path / f"{i}.png").write_bytes(image)
    files = tuple(str(tmp_path / f"{i}.png") for i in range(10))
    elsewhere = ImageTable(LocalFileSystem(), files, range(10), [-1] * 10, range(10))
    assert elsewhere.fingerprint() == table.fingerprint()
    assert table.take(range(9, -1, -1)).fingerprint() != table.fingerprint()
    relabelled = ImageTable(table.filesystem, table.files, table.file_N, table.row_N, [0] * 10)
    assert relabelled.fingerprint() != table.fingerprint()


def test_fingerprint_tells_where_one_image_ends(tmp_path):
    prints = set()
    for k, images in enumerate(([b"ab", b"c"], [b"a", b"bc"])):
        write_rows(tmp_path / f"{k}.parquet", images)
        path = (str(tmp_path / f"{k}.parquet"),)
        prints.add(ImageTable(LocalFileSystem(), path, [0, 0], [0, 1], [0, 0]).fingerprint())
    assert len(prints) == 2


def test_a_table_pickles_small_and_reads_afterwards(table):
    packed = pickle.dumps(table)
    assert len(packed) < 2000
    assert pickle.loads(packed).read() == IMAGES


def test_experience_fingerprint_covers_data_but_not_the_name(table):
    parts = table.take(range(6)), table.take([6]), table.take([7, 8, 9])
    one = Experience("a", ("x", "y"), *parts)
    assert Experience("b", ("x", "y"), *parts).fingerprint == one.fingerprint
    assert Experience("a", ("x", "y"), *parts, "noise").fingerprint != one.fingerprint
    assert Experience("a", ("x", "z"), *parts).fingerprint != one.fingerprint
    assert Experience("a", ("x", "y"), parts[0], parts[2], parts[1]).fingerprint != one.fingerprint


def test_column_without_images_is_refused():
    with pytest.raises(InputError, match="has columns pixels, label; it needs a column of encoded"):
        image_field(pa.schema([("pixels", pa.binary()), ("label", pa.int64())]), "t.parquet")
    with pytest.raises(InputError, match=r"column 'image' of t\.parquet has type string"):
        image_field(pa.schema([("image", pa.string())]), "t.parquet")


@pytest.mark.parametrize(("classes", "tasks", "sizes", "expected"), [
    (10, 5, None, [2, 2, 2, 2, 2]),
    (10, 3, None, [4, 3, 3]),
    (10, 10, None, [1] * 10),
    (10, None, (5, 1, 4), [5, 1, 4]),
    (10, 3, (2, 6, 2), [2, 6, 2]),
])
def test_split_is_disjoint_complete_and_of_the_sizes_asked_for(classes, tasks, sizes, expected):
    parts = split_classes(classes, tasks, sizes, seed=3)
    assert [len(part) for part in parts] == expected
    assert sorted(label for part in parts for label in part) == list(range(classes))
    assert all(list(part) == sorted(part) for part in parts)


def test_split_depends_on_the_seed_alone():
    assert split_classes(20, 4, None, 1) == split_classes(20, 4, (5, 5, 5, 5), 1)
    assert split_classes(20, 4, None, 1) != split_classes(20, 4, None, 2)
    assert split_classes(5, None, (3, 2), None) == [(0, 1, 2), (3, 4)]


@pytest.mark.parametrize(("tasks", "sizes", "message"), [
    (11, None, "tasks is 11 but there are 10 classes; allowed: 1 to 10"),
    (None, None, "tasks is not given; allowed: 1 to 10"),
    (None, (4, 3, 2), "task_sizes 4 3 2 sum to 9 but there are 10 classes"),
    (None, (4, 3, 5), "task_sizes 4 3 5 sum to 12 but there are 10 classes"),
    (2, (4, 3, 3), "task_sizes has 3 counts for 2 tasks"),
])
def test_split_that_cannot_be_is_refused(tasks, sizes, message):
    with pytest.raises(InputError, match=message):
        split_classes(10, tasks, sizes, seed=0)


def test_held_out_takes_a_share_of_every_class():
    label_N = np.repeat([0, 1, 2], [100, 20, 3])[np.random.default_rng(0).permutation(123)]
    marked_N = held_out(label_N, 0.1, "validation", ("a", "b", "c"), seed=0)
    assert np.bincount(label_N[marked_N]).tolist() == [10, 2, 1]
    assert not held_out(label_N, 0, "validation", ("a", "b", "c"), seed=0).any()


def test_held_out_draw_of_a_class_ignores_other_classes():
    of_two = held_out(np.repeat([0, 1], [50, 50]), 0.2, "test", ("a", "b"), seed=4)
    of_one = held_out(np.repeat([0], [50]), 0.2, "test", ("a",), seed=4)
    assert (of_two[:50] == of_one).all()
    again = held_out(np.repeat([0], [50]), 0.2, "test", ("a",), seed=5)
    other_part = held_out(np.repeat([0], [50]), 0.2, "validation", ("a",), seed=4)
    assert (of_one != again).any()
    assert (of_one != other_part).any()


def test_too_few_images_of_a_class_to_hold_some_out():
    with pytest.raises(InputError, match=r"class 'dog' has 1 image, too few to hold out 0.2 "
                                         "for test; allowed: 2 or more"):
        held_out(np.array([0, 0, 1]), 0.2, "test", ("cat", "dog"), seed=0)
    with pytest.raises(InputError, match="allowed: 2 or more, or validation 0"):
        held_out(np.array([0, 0, 1]), 0.1, "validation", ("cat", "dog"), seed=0)


def test_import_is_light():
    code = ("import sys, partialhn.data.image_table; heavy = {'torch', 'PIL', 'sklearn', "
            "'torchvision', 'pyarrow.parquet'} & set(sys.modules); "
            "sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
