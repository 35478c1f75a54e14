"""What the names in a data set's folder say, and what is refused because they do not say it."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.data.experience import all_not_used
from partialhn.data.layout import read_sets
from partialhn.data.listing import (
    is_junk,
    kind_of,
    split_of_folder,
    splits_of_files,
    unused,
)
from partialhn.errors import InputError


def png(value=0):
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def put_images(folder, classes=("a", "b"), count=6, suffix=".png"):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}{suffix}").write_bytes(png(10 * label + number))


def put_rows(path, labels=(0, 1) * 6, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(n), "path": ""} for n in range(len(labels))]
    table = pa.table({"image": rows, "label": list(labels)})
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(("name", "split"), [
    ("cars-train.parquet", "train"), ("cars_test-00000-of-00002.parquet", "test"),
    ("train-00000-of-00004.parquet", "train"), ("carsValidation.parquet", "validation"),
    ("TRAIN.parquet", "train"), ("2026.val.parquet", "validation"),
    ("testset.parquet", "test"), ("contest.parquet", "train"), ("valley.parquet", "train"),
])
def test_any_word_of_a_file_may_name_its_split(name, split):
    assert splits_of_files("/data", [name]) == {split: [name]}


@pytest.mark.parametrize("names", [
    ["train-test.parquet"], ["a-train.parquet", "a-dev.parquet"], ["cars-eval.parquet"],
    ["holdout.parquet"], ["traintest.parquet"], ["a-train.parquet", "a.parquet"],
    ["validation_of_test.parquet"],
])
def test_a_file_that_does_not_say_its_split_clearly_is_refused(names):
    with pytest.raises(InputError, match=names[-1].split(".", maxsplit=1)[0]):
        splits_of_files("/data", names)


@pytest.mark.parametrize(("name", "split"), [
    ("train", "train"), ("Test", "test"), ("train_set", "train"), ("test_set", "test"),
    ("validation-images", "validation"), ("TrainingData", "train"), ("trainset", "train"),
    ("test tube", None), ("steam train", None), ("2026-11", None), ("train_test", None),
    ("dev", None), ("set", None), ("", None),
])
def test_a_folder_is_a_split_when_all_its_words_say_so(name, split):
    assert split_of_folder(name) == split


def test_two_files_of_one_data_set_are_not_mixed(tmp_path):
    put_rows(tmp_path / "cars-train.parquet", (0, 1) * 16)
    put_rows(tmp_path / "cars-test.parquet", (0, 1) * 8)
    images = read_sets(str(tmp_path))
    assert (len(images.train), len(images.test)) == (32, 16)


def test_folders_of_splits_with_longer_names(tmp_path):
    put_images(tmp_path / "train_set")
    put_images(tmp_path / "test_set", count=3)
    images = read_sets(str(tmp_path))
    assert (len(images.train), len(images.test)) == (12, 6)


@pytest.mark.parametrize("name", ["dev", "extra", "more/train", "holdout"])
def test_a_folder_of_images_beside_the_splits_is_refused(tmp_path, name):
    put_images(tmp_path / "train")
    put_images(tmp_path / name)
    top = name.partition("/")[0]
    with pytest.raises(InputError, match=f"{top} holds 12 images"):
        read_sets(str(tmp_path))


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ""])
def test_images_by_rarer_names_are_used(tmp_path, suffix):
    put_images(tmp_path / "train", suffix=".png")
    put_images(tmp_path / "train", ("c",), suffix=suffix)
    images = read_sets(str(tmp_path))
    assert len(images.train) == 18
    assert not images.not_used


def test_what_is_not_used_is_counted_by_kind(tmp_path):
    put_images(tmp_path / "train", count=12)
    for name in ("x.avif", "y.avif", "z.heic", "notes", "labels.csv"):
        (tmp_path / "train" / "a" / name).write_bytes(b"other content")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / "Thumbs.db").write_bytes(b"junk")
    experiences = open_stream(DataConfig(data=str(tmp_path), tasks=2, validation=0.0), tmp_path)
    (note,) = all_not_used(experiences)
    assert note.files == {".avif": 2, ".csv": 1, ".heic": 1, ".md": 1, "no suffix": 1}
    assert "2 .avif, 1 .csv" in note.lines()[0]


@pytest.mark.parametrize("junk", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found",
                                  "System Volume Information", "__MACOSX", ".thumbnails",
                                  "@EADIR"])
def test_what_file_systems_leave_is_neither_a_class_nor_an_image(tmp_path, junk):
    put_images(tmp_path / "train")
    put_images(tmp_path / "train" / junk, ("0.png",), count=1)
    put_images(tmp_path / "train" / "a" / junk, ("0.png",), count=2)
    (tmp_path / junk).mkdir()
    images = read_sets(str(tmp_path))
    assert (images.classes, len(images.train)) == (("a", "b"), 12)


def test_junk_and_kinds():
    assert is_junk("a/@eaDir/b.png")
    assert not is_junk("a/eaDir/b.png")
    assert [kind_of(path) for path in ("a/b.PNG", "a.b/c", ".hidden", "x.tar.gz")] == [
        ".png", "no suffix", "no suffix", ".gz"]
    assert unused(["a/", "a/1.png", "a/2.txt", "_READY", "task.yaml"], ["a/1.png"]) == {".txt": 1}


def test_the_layout_of_a_data_sets_repository(tmp_path):
    put_rows(tmp_path / "data" / "train-00000-of-00001.parquet", (0, 1) * 10)
    put_rows(tmp_path / "data" / "test-00000-of-00001.parquet", (0, 1) * 5)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# a data set")
    images = read_sets(str(tmp_path))
    assert (len(images.train), len(images.test)) == (20, 10)


def test_one_task_of_a_directory_is_still_a_task(tmp_path):
    put_images(tmp_path / "alpha" / "train")
    assert list(read_sets(str(tmp_path))) == ["alpha"]


@pytest.mark.parametrize("written", [{"info": None}, [], {"info": []}, {"info": {"features": 3}},
                                     {"info": {"features": {"label": None}}}, 7])
def test_metadata_of_another_shape_names_no_classes(tmp_path, written):
    put_rows(tmp_path / "train.parquet", metadata={"huggingface": json.dumps(written)})
    assert read_sets(str(tmp_path)).classes == ("0", "1")


def described(names):
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


def test_class_names_as_a_mapping_of_numbers(tmp_path):
    put_rows(tmp_path / "train.parquet", metadata=described({"1": "dog", "0": "cat"}))
    assert read_sets(str(tmp_path)).classes == ("cat", "dog")


@pytest.mark.parametrize("names", [{"0": "x"} | {"5": "y"}, "cat dog", [["a"], ["b"]], 3])
def test_class_names_of_another_shape_are_refused(tmp_path, names):
    put_rows(tmp_path / "train.parquet", metadata=described(names))
    with pytest.raises(InputError, match="class names of"):
        read_sets(str(tmp_path))


def test_metadata_that_is_no_json(tmp_path):
    put_rows(tmp_path / "train.parquet", metadata={"huggingface": "{"})
    with pytest.raises(InputError, match="is not JSON"):
        read_sets(str(tmp_path))
