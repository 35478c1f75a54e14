"""Data sets as repositories hold them: README.md, tables beside images, columns, hf:."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from partialhn.config import DataConfig
from partialhn.data.card import matching
from partialhn.data.columns import Columns
from partialhn.data.datasets import open_stream
from partialhn.data.experience import leaks
from partialhn.data.layout import list_images, open_images, read_sets
from partialhn.errors import InputError
from tests.unit.test_listing import png, put_images, put_rows


def put_readme(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\n{text}---\n# a data set\n")


def refused(message, data, **options):
    with pytest.raises(InputError, match=message):
        read_sets(str(data), **options)


def labels_of(images, split="train"):
    """File name -> class name."""
    table = getattr(images, split)
    return {Path(name).name: images.classes[label]
            for name, label in zip(table.ids(), table.label_N.tolist(), strict=True)}


# ---- README.md

CONFIG = """configs:
- config_name: default
  data_files:
  - {split: train, path: "data/fold[12]-*"}
  - {split: validation, path: data/fold3-00000-of-00001.parquet}
  - {split: test, path: ["data/fold4-*", "more/**"]}
  - {split: unlabelled, path: data/fold5-*}
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': cat, '1': dog}}}}
  splits:
  - {name: train, num_examples: 24}
  - {name: test, num_examples: 99}
"""


def test_a_readme_says_which_files_hold_which_split_and_the_class_names(tmp_path):
    for number, count in enumerate((6, 6, 3, 2, 9), 1):
        put_rows(tmp_path / "data" / f"fold{number}-00000-of-00001.parquet", (0, 1) * count)
    put_rows(tmp_path / "more" / "a" / "b.parquet", (0, 1))
    put_readme(tmp_path, CONFIG)
    images = read_sets(str(tmp_path))
    assert images.classes == ("cat", "dog")
    assert [len(images.train), len(images.validation), len(images.test)] == [24, 6, 6]
    assert images.not_used.files == {".parquet": 1}
    assert [note.split(",")[0] for note in images.not_used.notes] == [
        "the split 'unlabelled' that its README.md names is not used",
        "its README.md says 99 images in the split 'test'"]


def test_a_readme_without_configs_gives_class_names_to_files_that_have_none(tmp_path):
    put_rows(tmp_path / "data" / "train.parquet")
    put_readme(tmp_path, CONFIG[CONFIG.index("dataset_info"):])
    assert read_sets(str(tmp_path)).classes == ("cat", "dog")
    described = {"info": {"features": {"label": {"names": ["dog", "cat"]}}}}
    put_rows(tmp_path / "data" / "train.parquet", metadata={"huggingface": json.dumps(described)})
    refused("and the README.md of its data set name different classes", tmp_path)


def test_several_configurations_are_chosen_and_never_mixed(tmp_path):
    for name, count in (("small", 6), ("large", 9)):
        put_rows(tmp_path / name / "train.parquet", (0, 1) * count)
    configs = "configs:\n" + "".join(
        f"- {{config_name: {name}, data_files: {name}/*.parquet}}\n" for name in ("small", "large"))
    put_readme(tmp_path, configs)
    assert list(read_sets(str(tmp_path))) == ["large", "small"], "a directory of tasks stays one"
    (task,) = open_stream(DataConfig(data=f"hf:{tmp_path}:large", tasks=1, validation=0), tmp_path)
    assert len(task.train) + len(task.test) == 18
    refused("configuration is 'huge'; allowed: .*small, large", tmp_path, chosen="huge")
    put_readme(tmp_path, configs.replace("large,", "large, default: true,"))
    assert len(read_sets(str(tmp_path)).train) == 18
    (tmp_path / "small" / "train.parquet").rename(tmp_path / "small.parquet")
    put_readme(tmp_path, configs.replace("small/*.parquet", "small.parquet"))
    refused("has the configurations small, large and no default; allowed: data hf:", tmp_path)


def test_a_configuration_in_a_folder_and_images_in_patterns(tmp_path):
    put_images(tmp_path / "photos" / "train")
    put_images(tmp_path / "photos" / "test", count=2)
    put_readme(tmp_path, "configs:\n- {config_name: default, data_dir: photos}\n")
    images = read_sets(str(tmp_path))
    assert (images.classes, len(images.train), len(images.test)) == (("a", "b"), 12, 4)
    put_readme(tmp_path, "configs:\n- {config_name: default, data_files: 'photos/train/**'}\n")
    images = read_sets(str(tmp_path))
    assert (images.classes, len(images.train), images.test) == (("a", "b"), 12, None)
    assert images.not_used.files == {".png": 4}


@pytest.mark.parametrize(("text", "message"), [
    ("configs: 3\n", "configs of .* are"), ("configs: [a\n", "cannot be read"),
    ("configs: [{data_files: [{split: train}]}]\n", "data_files of .* are"),
    ("configs: [{data_files: ../other/*}]\n", "files below its own folder"),
    ("configs: [{data_files: 'https://host/a.parquet'}]\n", "files below its own folder"),
    ("configs: [{data_files: gone-*}]\n", "no such file is there"),
    ("configs: [{data_files: '*.tar'}]\n", "is in 1 .tar files; allowed: Parquet files, images"),
    ("configs: [{data_files: '[z-a]'}]\n", "cannot be used"),
    ("configs: [{data_files: [{split: test, path: t*}, {split: testing, path: t*}]}]\n",
     "two splits for test"),
    ("dataset_info: {features: [{name: label, dtype: {class_label: {names: {'1': x}}}}]}\n",
     "class names of .* are numbered 1"),
])
def test_a_readme_of_another_shape_is_refused(tmp_path, text, message):
    put_rows(tmp_path / "train.parquet")
    (tmp_path / "a.tar").write_bytes(b"")
    put_readme(tmp_path, text)
    refused(message, tmp_path)


def test_patterns():
    paths = ["a/b/1.png", "a/2.png", "3.png", "a/"]
    for pattern, expected in (("**", ["3.png", "a/2.png", "a/b/1.png"]), ("*", ["3.png"]),
                              ("a/**/1.png", ["a/b/1.png"]), ("a/?.png", ["a/2.png"]),
                              ("**/*.png", ["3.png", "a/2.png", "a/b/1.png"]),
                              ("[!4].png", ["3.png"]), ("3.p.g", [])):
        assert matching(paths, [pattern]) == expected
    assert matching(paths, ["2*"], "a") == ["a/2.png"]


# ---- tables beside images

CODES = {"0.png": "007", "1.png": "10", "2.png": "007", "3.png": "10"}


def put_table(folder, rows=CODES, form="csv", column="label", file="file_name", files=None):
    """Images in a folder, and a table with a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows if files is None else files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(7))
    path = folder / f"metadata.{form}"
    if form == "csv":
        path.write_text(f"{file},{column},note\n" + "".join(
            f'"{name}",{label},"a, b"\n' for name, label in rows.items()))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({file: name, column: label}) + "\n"
                                for name, label in rows.items()))
    else:
        pq.write_table(pa.table({file: list(rows), column: list(rows.values())}), path)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["", "train", "train/images"])
def test_labels_in_a_table_beside_images_stay_text(tmp_path, form, place):
    put_table(tmp_path / place, form=form)
    images = read_sets(str(tmp_path))
    assert (images.classes, labels_of(images)) == (("007", "10"), CODES)
    assert not images.not_used


def test_one_table_for_all_splits_and_numbers_in_their_order(tmp_path):
    put_table(tmp_path, {f"{split}/{n}.png": str(n) for split in ("train", "test")
                         for n in (2, 10, 0)})
    images = read_sets(str(tmp_path))
    assert images.classes == ("0", "2", "10")
    assert labels_of(images, "test") == {"2.png": "2", "10.png": "10", "0.png": "0"}


def test_class_names_of_numbers_in_a_table(tmp_path):
    put_table(tmp_path, {"a.png": 1, "b.png": 0}, "jsonl")
    put_readme(tmp_path, CONFIG[CONFIG.index("dataset_info"):CONFIG.index("  splits")])
    assert labels_of(read_sets(str(tmp_path))) == {"a.png": "dog", "b.png": "cat"}


def test_a_table_and_class_folders(tmp_path):
    put_images(tmp_path / "train")
    before = read_sets(str(tmp_path))
    names = [f"{label}/{n}.png" for label in "ab" for n in range(6)]
    put_table(tmp_path / "train", {name: name[0] for name in names}, files=())
    same = read_sets(str(tmp_path))
    assert same.train.fingerprint() == before.train.fingerprint()
    put_table(tmp_path / "train", {name: str(int(name[2]) % 3) for name in names}, files=())
    other = read_sets(str(tmp_path))
    assert other.classes == ("0", "1", "2")
    assert "labels are the column 'label' of train/metadata.csv" in other.not_used.lines()[0]
    put_table(tmp_path / "train", dict.fromkeys(names, "a caption"), column="text", files=())
    captions = read_sets(str(tmp_path))
    assert (captions.classes, captions.not_used.files) == (("a", "b"), {".csv": 1})


def test_images_in_no_class_folder_beside_a_table_without_labels(tmp_path):
    put_table(tmp_path, column="breed")
    words = (rf"image {tmp_path}/\S+ lies in no class folder, and {tmp_path}/metadata.csv has "
             "columns 'file_name', 'breed', 'note'; it needs a column of labels named label or")
    with pytest.raises(InputError, match=words):
        read_sets(str(tmp_path))
    put_table(tmp_path / "whole" / "train", column="breed")
    with pytest.raises(InputError, match=r"train/metadata.csv has columns .*it needs a column"):
        read_sets(str(tmp_path / "whole"))
    (tmp_path / "whole" / "train" / "metadata.csv").unlink()
    with pytest.raises(InputError, match="lies in no class folder; allowed"):
        read_sets(str(tmp_path / "whole" / "train"))


def test_a_column_that_names_splits_is_said_not_to_be_used(tmp_path):
    put_table(tmp_path / "table")
    path = tmp_path / "table" / "metadata.csv"
    head, *rows = path.read_text().splitlines()
    lines = [f"{head},split", *(f"{row},{'train' if n else 'test'}" for n, row in enumerate(rows))]
    path.write_text("\n".join(lines))
    table = pa.table({"image": [png(7)] * 4, "label": [0, 1, 0, 1], "split": ["train", "test"] * 2})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "train.parquet")
    for data in ("table", "parquet", "parquet/train.parquet"):
        (note,) = read_sets(str(tmp_path / data)).not_used.notes
        assert note.startswith("the column 'split' of")
        assert "(test, train) is not used" in note
    pq.write_table(table.take([0, 2]), tmp_path / "parquet" / "train.parquet")
    assert not read_sets(str(tmp_path / "parquet")).not_used.notes


def test_images_without_a_row_are_told_and_rows_without_a_file_refused(tmp_path):
    put_table(tmp_path / "train", files=[*CODES, "extra.png"])
    images = read_sets(str(tmp_path))
    assert (len(images.train), labels_of(images)) == (4, CODES)
    assert "1 images have no row in train/metadata.csv and are left out, the first is "\
        "train/extra.png" in images.not_used.notes
    assert not images.not_used.files, "said once"
    (tmp_path / "train" / "2.png").unlink()
    refused("has 1 rows whose file is not there, the first is train/2.png", tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("file_name,label\n1.png,\n", "row 0 of .* has no label"),
    ("file_name,label\n1.png\n", "row 0 of .* has no label"),
    ("file_name,label\n1.png,a,b\n", "more cells than the 2"),
    ("file_name,label\n1.png,a\n1.png,b\n", "although another row names it"),
    ("file_name,label\n../1.png,a\n", "names the file '../1.png'"),
    ("file_name,label\n/1.png,a\n", "names the file '/1.png'"),
    ("file_name,label,label\n1.png,a,b\n", "two columns of one name"),
    ("file,label\n1.png,a\n", "needs a column file_name"),
    ("file_name,label,labels\n1.png,a,b\n", "columns label and labels, and it is not clear"),
    ("a_file_name,b_file_name,label\n1.png,2.png,a\n", "a_file_name and b_file_name"),
    ('file_name,label\n"1.png,a\n', "no readable csv"),
])
def test_a_table_that_does_not_fit_its_images_is_refused(tmp_path, text, message):
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text(text)
    refused(message, tmp_path)


@pytest.mark.parametrize(("lines", "message"), [
    ('{"file_name": "1.png", "label": 1.5}', "is 1.5"), ("[1]", "a JSON object a line"),
    ('{"file_name": "1.png", "label": null}', "has no label"), ("{", "no readable jsonl"),
    ('{"file_name": "1.png", "label": "a"}\n{"file_name": "2.png", "label": 1}', "text .* numbers"),
])
def test_lines_of_another_shape_are_refused(tmp_path, lines, message):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text(lines)
    refused(message, tmp_path)


# ---- columns

def put_columns(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [png(n) for n in range(12)]
    values = {name: rows[::-1] if kind == "other" else rows if kind == "image" else kind
              for name, kind in columns.items()}
    pq.write_table(pa.table(values), path)


def test_columns_are_chosen_by_options(tmp_path):
    path = tmp_path / "train.parquet"
    put_columns(path, photo="image", mask="other", kind=["x", "y"] * 6, label=[0, 1, 2] * 4)
    refused("named image or img, or image_column", tmp_path)
    images = read_sets(str(tmp_path), columns=Columns("photo", "kind"))
    assert images.classes == ("x", "y")
    assert images.train.take([3]).read() == [png(3)]
    task = open_stream(DataConfig(data=str(path), tasks=1, image_column="mask", validation=0,
                                  label_column="label"), tmp_path)[0]
    assert task.classes == ("0", "1", "2")
    assert task.train.read()[0] == png(11 - int(task.train.row_N[0]))
    refused("label_column is 'sort'; allowed: a column of .* photo, mask, kind, label", tmp_path,
            columns=Columns("photo", "sort"))
    refused("column 'kind' of .* has type string", tmp_path, columns=Columns("kind"))
    assert open_images(str(tmp_path), column="mask").read()[0] == png(11)
    put_images(tmp_path / "folders")
    refused("the folder names of .* are the labels", tmp_path / "folders",
            columns=Columns(label="label"))


@pytest.mark.parametrize(("columns", "message"), [
    ({"image": "image", "img": "other", "label": [0, 1] * 6}, "columns image and img, and it"),
    ({"image": "image", "label": [0, 1] * 6, "fine_label": [0, 1, 2] * 4}, "label and fine_label"),
])
def test_two_columns_that_would_do_are_not_guessed_from(tmp_path, columns, message):
    put_columns(tmp_path / "train.parquet", **columns)
    refused(message, tmp_path)


def test_columns_by_their_type_in_the_metadata(tmp_path):
    put_columns(tmp_path / "train.parquet", photo="image", mask="other", species=[0, 1] * 6)
    features = {"photo": {"_type": "Image"}, "mask": {"_type": "Value"},
                "species": {"names": ["oak", "fir"], "_type": "ClassLabel"}}
    table = pq.read_table(tmp_path / "train.parquet").replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    images = read_sets(str(tmp_path))
    assert (images.classes, images.train.read()[0]) == (("oak", "fir"), png(0))


@pytest.mark.parametrize(("labels", "classes"), [
    (pa.array([True, False] * 6), ("false", "true")), (pa.array([0, 1] * 6, pa.int8()), ("0", "1")),
    (pa.array([0, 1] * 6, pa.uint64()), ("0", "1")),
    (pa.array(["b", "a"] * 6).dictionary_encode(), ("a", "b")),
    (pa.array(["b", "a"] * 6, pa.large_string()), ("a", "b")),
    (pa.array(["007", "10"] * 6, pa.string_view()), ("007", "10")),
])
def test_labels_of_any_type(tmp_path, labels, classes):
    put_columns(tmp_path / "train.parquet", image="image", label=labels)
    images = read_sets(str(tmp_path))
    assert images.classes == classes
    assert images.train.label_N.tolist() == [classes.index(str(label).lower())
                                             for label in labels.to_pylist()]


@pytest.mark.parametrize("labels", [[[0], [1, 2]] * 6, [1.0, 2.0] * 6, ["a", ""] * 6,
                                    pa.array(["a", None] * 6).dictionary_encode()])
def test_labels_that_are_none_are_refused(tmp_path, labels):
    put_columns(tmp_path / "train.parquet", image="image", label=labels)
    refused("label", tmp_path)


# ---- where a data set lies

def test_a_single_data_set_one_level_down_is_that_data_set(tmp_path):
    put_images(tmp_path / "cars" / "train", ("a", "b", "c", "d"))
    put_images(tmp_path / "cars" / "test", ("a", "b", "c", "d"), count=2)
    alone = open_stream(DataConfig(data=str(tmp_path)), tmp_path)
    assert [task.name for task in alone] == ["cars"], "nothing says how to cut it"
    cut = open_stream(DataConfig(data=str(tmp_path), tasks=2), tmp_path)
    direct = open_stream(DataConfig(data=str(tmp_path / "cars"), tasks=2), tmp_path)
    assert [task.fingerprint for task in cut] == [task.fingerprint for task in direct]
    few = open_stream(DataConfig(data=str(tmp_path), classes=2, task_sizes=(1, 1)), tmp_path)
    assert sorted(task.classes for task in few) == [("a",), ("b",)]


@pytest.mark.parametrize("place", ["flowers", "flowers/jpg", "data", "train/images"])
def test_class_folders_further_down_are_the_classes(tmp_path, place):
    put_images(tmp_path / place)
    (tmp_path / "LICENSE.txt").write_text("free")
    images = read_sets(str(tmp_path))
    assert (images.classes, len(images.train)) == (("a", "b"), 12)


@pytest.mark.parametrize(("places", "message"), [
    (["train/cat/2025", "train/cat/2026"], "it is not clear which are the classes"),
    (["x/v1/train/cat", "y/v1/train/cat"], "named like a split, so it would be mixed"),
    (["train/cat/test", "train/dog"], "named like a split"),
    (["alpha/train/a", "."], "lies beside the folders of tasks"),
    (["train/a", "."], "lies beside the folders of splits"),
])
def test_folders_that_say_two_things_are_refused(tmp_path, places, message):
    for place in places:
        put_images(tmp_path / place, (".",), count=2)
    refused(message, tmp_path)


def test_splits_and_tasks_in_folders_of_their_own(tmp_path):
    put_rows(tmp_path / "spark" / "train.parquet" / "part-0.parquet", (0, 1) * 9)
    put_rows(tmp_path / "spark" / "test.parquet" / "part-0.parquet")
    images = read_sets(str(tmp_path / "spark"))
    assert (len(images.train), len(images.test)) == (18, 12)
    for name in ("cats", "dogs"):
        put_rows(tmp_path / "tasks" / name / "data" / "train-00000-of-00001.parquet")
        put_readme(tmp_path / "tasks" / name, CONFIG[CONFIG.index("dataset_info"):])
    tasks = read_sets(str(tmp_path / "tasks"))
    assert {name: task.classes for name, task in tasks.items()} == dict.fromkeys(
        ("cats", "dogs"), ("cat", "dog"))


def test_what_is_merged_or_missing_is_told(tmp_path):
    for inner in ("animals/cat", "animals/dog", "cars"):
        put_images(tmp_path / "folders" / "train" / inner, (".",))
    images = read_sets(str(tmp_path / "folders"))
    assert images.classes == ("animals", "cars")
    assert images.not_used.notes == ("the images of animals/ lie in its folders cat, dog; all of "
                                     "them are of the class animals",)
    put_rows(tmp_path / "pieces" / "train-00001-of-00003.parquet")
    put_rows(tmp_path / "pieces" / "test-00000-of-00001.parquet")
    assert read_sets(str(tmp_path / "pieces")).not_used.notes == (
        "train-*-of-00003 is not whole: 1 of its 3 files are here",)
    put_images(tmp_path / "tasks" / "alpha" / "train")
    (tmp_path / "tasks" / "beta.zip").write_bytes(b"PK")
    assert "lie 1 .zip files" in read_sets(str(tmp_path / "tasks"))["alpha"].not_used.lines()[0]


def test_what_is_not_labelled_is_counted(tmp_path):
    put_images(tmp_path, count=3)
    for name in ("x.avif", "a/y.heic", "a/no_suffix"):
        (tmp_path / name).write_bytes(png() if "no" in name else b"other")
    table, not_used = list_images(str(tmp_path))
    assert (len(table), not_used.files) == (7, {".avif": 1, ".heic": 1})


def test_pointers_and_mixtures_are_refused(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    refused("is a pointer of Git LFS", tmp_path)
    put_images(tmp_path / "both")
    put_rows(tmp_path / "both" / "rows.parquet")
    with pytest.raises(InputError, match="holds 12 images and 1 Parquet files"):
        open_images(str(tmp_path / "both"))
    refused(r"a and does not say|holds 6 images", tmp_path / "both")
    put_images(tmp_path / "mixed" / "train")
    put_rows(tmp_path / "mixed" / "train" / "rows.parquet")
    refused("in one split; allowed: one of both", tmp_path / "mixed")


@pytest.mark.parametrize(("name", "put", "message"), [
    ("x.png", lambda path, _: path.symlink_to("/nowhere/x.png"), "x.png is a link to nothing"),
    ("again", lambda path, root: path.symlink_to(root / "train"), "a folder that contains it"),
    ("pipe.png", lambda path, _: os.mkfifo(path), "pipe.png is no regular file"),
])
def test_what_only_looks_like_a_file_is_refused(tmp_path, name, put, message):
    put_images(tmp_path / "train")
    put(tmp_path / "train" / "a" / name, tmp_path)
    refused(message, tmp_path)


def test_links_to_files_and_folders_are_followed(tmp_path):
    put_images(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "b").mkdir(parents=True)
    (tmp_path / "set" / "train" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "set" / "train" / "b" / "1.png").symlink_to(tmp_path / "elsewhere/b/1.png")
    (tmp_path / "set" / ".git").mkdir()
    (tmp_path / "set" / ".git" / "HEAD").symlink_to("nothing")
    assert len(read_sets(str(tmp_path / "set")).train) == 7


def test_names_that_are_nearly_the_same_and_missing_splits_are_told(tmp_path):
    put_images(tmp_path / "train", ("cat", "Cat", "dog"))
    put_images(tmp_path / "val", ("cat", "Cat", "dog"), count=1)
    (task,) = open_stream(DataConfig(data=str(tmp_path), tasks=1), tmp_path)
    assert (len(task.classes), len(task.test)) == (3, 3)
    alike, moved = task.not_used.notes
    assert alike.startswith("the classes 'Cat' and 'cat' differ in case or spaces only")
    assert moved.startswith("no split is named test, so the validation split is the test split")


def test_test_images_that_are_training_images_too_are_counted(tmp_path):
    put_images(tmp_path / "train", ("a", "b"))
    put_images(tmp_path / "test", ("a",), count=4)
    (tmp_path / "test" / "b").mkdir()
    (tmp_path / "test" / "b" / "new.png").write_bytes(png(200))
    tasks = open_stream(DataConfig(data=str(tmp_path), tasks=1), tmp_path)
    assert leaks(tasks) == {"0": 4}
    (tmp_path / "other" / "train").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "other/train" / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "other/train" / "ab"[number % 2] / f"{number}.png").write_bytes(png(number))
    assert leaks(open_stream(DataConfig(data=str(tmp_path / "other"), tasks=1), tmp_path)) == {}


# ---- hf:

FROM_THE_CACHE = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from datasets import config
from datasets.packaged_modules.parquet.parquet import Parquet
from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.errors import InputError

source, ours = Path(sys.argv[1]), Path(sys.argv[2])
splits = {name: str(source / f"data/{name}-*.parquet") for name in ("train", "test", "extra")}
builder = Parquet(dataset_name="pets", config_id="default", data_files=splits, hash="0" * 40)
builder.download_and_prepare()
cache = Path(config.HF_DATASETS_CACHE)
(cache / "pets").rename(cache / "owner___pets")  # as the library names a data set of the Hub
direct, found = (open_stream(DataConfig(data=data, tasks=1), ours)[0]
                 for data in (str(source), "hf:owner/pets"))
assert found.fingerprint == direct.fingerprint, "the same bytes, classes and order"
assert found.classes == ("cat", "dog") and len(found.test) == 6
assert "the split 'extra'" in found.not_used.notes[0]
(cache / "owner___pets").rename(cache / "gone")
assert open_stream(DataConfig(data="hf:owner/pets", tasks=1), ours)[0].classes
for data in ("hf:owner/gone", "hf:owner/pets:other", "hf:", "hf:/no/folder", "hf:a/b/c"):
    try:
        open_stream(DataConfig(data=data, tasks=1), ours)
    except InputError as error:
        print(error)
"""


def test_a_data_set_of_the_hub_in_the_librarys_cache(tmp_path):
    pytest.importorskip("datasets")
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"],
                                                       "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for name, count in (("train", 10), ("test", 3), ("extra", 2)):
        put_rows(tmp_path / "source" / "data" / f"{name}-00000-of-00001.parquet", (0, 1) * count,
                 metadata)
    put_readme(tmp_path / "source", "configs:\n- {config_name: default, data_files: [" + ", ".join(
        f"{{split: {name}, path: data/{name}-*}}" for name in ("train", "test", "extra")) + "]}\n")
    run = subprocess.run(
        [sys.executable, "-c", FROM_THE_CACHE, tmp_path / "source", tmp_path / "ours"],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    gone, other, empty, nowhere, deep = run.stdout.splitlines()
    for text, name in ((gone, "gone"), (other, "pets")):
        assert f"data set 'owner/{name}' cannot be fetched" in text
        assert f"hf download owner/{name} --repo-type dataset --local-dir FOLDER" in text
    assert all("allowed: hf:OWNER/NAME" in text for text in (empty, nowhere, deep))
