"""Data in: the five forms of input, every input error, and the decoder."""

import dataclasses
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from sklearn.datasets import load_digits

from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode, decode_images
from partialhn.data.layout import open_images
from partialhn.data.library import TORCHVISION, convert_digits, write_parquet
from partialhn.errors import InputError
from pipelines.train import stream_counts

DIGITS = load_digits()


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def digit(number, mode="L"):
    image = Image.fromarray((DIGITS.images[number] * 15).astype(np.uint8))
    return image.convert(mode)


def write_folders(root, classes, images=5, mode="L", part="train"):
    """`root/<part>/<class>/<k>.png` with real digits."""
    for c, name in enumerate(classes):
        (root / part / name).mkdir(parents=True)
        for k in range(images):
            image = digit(10 * k + c, mode)
            (root / part / name / f"{k}.png").write_bytes(encoded(image))


def write_rows(path, labels, names=None, image_column="image", label_column="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(digit(i)), "path": f"{i}.png"} for i in range(len(labels))]
    images = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({image_column: images, label_column: labels or pa.array([], pa.int64())})
    if names is not None:
        features = {label_column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)


def stream(data, cache=Path("unused"), filesystem=None, **options):
    return open_stream(DataConfig(data=str(data), **options), cache, filesystem)


def refused(message, data, cache=Path("unused"), **options):
    with pytest.raises(InputError) as caught:
        stream(data, cache, **options)
    assert message in str(caught.value)


def class_of_ids(experience, part="train"):
    """Class names by image, told from the folders the images lie in."""
    return [Path(name).parent.name for name in getattr(experience, part).ids()]


# ---- form (a): Parquet


@pytest.fixture(scope="module")
def tiny_imagenet(image_sets):
    return image_sets / "tiny-imagenet-32"


def test_parquet_of_many_files_with_names_of_parts(tiny_imagenet):
    experiences = stream(tiny_imagenet, tasks=5, classes=50)
    assert [len(e.classes) for e in experiences] == [10] * 5
    assert [len(e.train) for e in experiences] == [4500] * 5
    assert [len(e.validation) for e in experiences] == [len(e.test) for e in experiences]
    assert len({name for e in experiences for name in e.classes}) == 50
    assert all(name[0] == "n" for e in experiences for name in e.classes)
    assert all(np.bincount(e.train.label_N).tolist() == [450] * 10 for e in experiences)
    train, held = set(experiences[0].train.ids()), set(experiences[0].validation.ids())
    assert len(train) == 4500
    assert not train & held


def test_tiny_imagenet_decodes_and_its_labels_follow_the_wordnet_ids(tiny_imagenet):
    experience = stream(tiny_imagenet, tasks=5, classes=50)[2]
    some = experience.train.take(range(0, len(experience.train), 450))
    images_BCHW = decode(some, 32).images_BCHW
    assert images_BCHW.shape == (10, 3, 32, 32)
    assert images_BCHW.float().std() > 30
    for path, row, label in zip(some.file_N, some.row_N, some.label_N, strict=True):
        names = pq.read_table(some.files[path])["image"]
        wordnet_id = names[int(row)].as_py()["path"].split("_")[0]
        assert experience.classes[label].startswith(wordnet_id)


def test_more_classes_than_a_shard_holds_images_of(tiny_imagenet, tmp_path):
    shard = tiny_imagenet / "train-00000-of-00004.parquet"
    assert len(stream(shard, tasks=5, classes=50)) == 5
    every = stream(shard, tasks=5)
    assert sum(len(task.classes) for task in every) == 50
    assert len(every[0].not_used.classes) == 150


def test_parquet_in_sub_folders_and_one_file(tmp_path):
    labels = [0, 1, 2] * 6
    write_rows(tmp_path / "set" / "train" / "0000.parquet", labels, ["a", "b", "c"])
    write_rows(tmp_path / "set" / "test" / "0000.parquet", [0, 1, 2], ["a", "b", "c"])
    write_rows(tmp_path / "one.parquet", labels, ["a", "b", "c"])
    (whole,) = stream(tmp_path / "set", tasks=1)
    assert (whole.classes, len(whole.train), len(whole.validation), len(whole.test)) == (
        ("a", "b", "c"), 15, 3, 3)
    (cut,) = stream(tmp_path / "one.parquet", tasks=1)
    assert [len(cut.train), len(cut.validation), len(cut.test)] == [12, 3, 3]


def test_parquet_without_names_of_parts_is_all_training(tmp_path):
    for k in range(3):
        write_rows(tmp_path / f"part-{k}.parquet", [0, 1] * 5)
    (whole,) = stream(tmp_path, tasks=1, validation=0.0)
    assert (whole.classes, len(whole.train), len(whole.validation), len(whole.test)) == (
        ("0", "1"), 24, 0, 6)


def test_parquet_labels_may_be_strings_and_columns_be_called_otherwise(tmp_path):
    write_rows(tmp_path / "train.parquet", ["cat", "ant", "bee"] * 4, None, "img", "fine_label")
    (whole,) = stream(tmp_path, tasks=1)
    assert whole.classes == ("ant", "bee", "cat")
    assert [whole.classes[label] for label in whole.train.label_N] == [
        ("cat", "ant", "bee")[row % 3] for row in whole.train.row_N]


def test_validation_part_of_its_own_is_used(tmp_path):
    for part, count in (("train", 6), ("validation", 4), ("test", 2)):
        write_rows(tmp_path / f"{part}.parquet", [0, 1] * count)
    (whole,) = stream(tmp_path, tasks=1)
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [12, 8, 4]
    (tmp_path / "test.parquet").unlink()
    (whole,) = stream(tmp_path, tasks=1, validation=0.2)
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [10, 2, 8]


def test_parquet_errors(tmp_path):
    write_rows(tmp_path / "a" / "train.parquet", [0, 1] * 3, None, "picture")
    refused("it needs a column of encoded images named image or img", tmp_path / "a", tasks=1)
    write_rows(tmp_path / "b" / "train.parquet", [0, 1] * 3, None, "image", "target")
    refused("it needs a column of labels named label", tmp_path / "b", tasks=1)
    write_rows(tmp_path / "c" / "train.parquet", [0, 1, -1, 0])
    refused("train.parquet#2 is -1; allowed: 0 or more", tmp_path / "c", tasks=1)
    write_rows(tmp_path / "d" / "train.parquet", [0, 1, None, 0])
    refused("has 1 rows without a label", tmp_path / "d", tasks=1)
    write_rows(tmp_path / "e" / "train.parquet", [0.5, 1.5])
    refused("have type double; allowed: whole numbers or names", tmp_path / "e", tasks=1)
    write_rows(tmp_path / "f" / "train.parquet", [])
    refused("no images found in the train split", tmp_path / "f", tasks=1)
    (tmp_path / "g.parquet").write_bytes(b"PAR1 cut short")
    refused("is no readable Parquet file", tmp_path / "g.parquet", tasks=1)
    write_rows(tmp_path / "h" / "test.parquet", [0, 1])
    refused("has only a test split", tmp_path / "h", tasks=1)
    write_rows(tmp_path / "i" / "train.parquet", [0, 3], ["x", "y"])
    refused("label 3 of the train image", tmp_path / "i", tasks=1)


def test_parquet_parts_that_do_not_belong_together(tmp_path):
    write_rows(tmp_path / "train.parquet", [0, 1] * 3, ["a", "b"])
    write_rows(tmp_path / "test.parquet", [0, 1], ["b", "a"])
    refused("names other classes than the train split", tmp_path, tasks=1)
    write_rows(tmp_path / "test.parquet", ["a", "b"])
    refused("names other classes than the train split", tmp_path, tasks=1)
    write_rows(tmp_path / "extra.parquet", [0, 1])
    refused("extra.parquet stands beside files named after splits", tmp_path, tasks=1)
    (tmp_path / "test").mkdir()
    refused("has both extra.parquet and the folder test/", tmp_path, tasks=1)


def test_test_labels_that_never_occur_in_training(tmp_path):
    write_rows(tmp_path / "a" / "train.parquet", [0, 1] * 3)
    write_rows(tmp_path / "a" / "test.parquet", [0, 1, 7])
    refused("label 7 of the test image", tmp_path / "a", tasks=1)
    write_folders(tmp_path / "b", ["cat", "dog"])
    write_folders(tmp_path / "b", ["cat", "emu"], part="test")
    refused("label 'emu' of the test image", tmp_path / "b", tasks=1)
    refused("never occurs in training", tmp_path / "b", tasks=1)


# ---- form (b): image folders


@pytest.mark.parametrize("test_part", ["test", "val", None])
def test_image_folders(tmp_path, test_part):
    write_folders(tmp_path, ["dog", "ant", "cat", "bee"])
    if test_part:
        write_folders(tmp_path, ["dog", "ant", "cat", "bee"], 2, part=test_part)
    experiences = stream(tmp_path, tasks=2)
    assert sorted(name for e in experiences for name in e.classes) == ["ant", "bee", "cat", "dog"]
    for e in experiences:
        assert class_of_ids(e) == [e.classes[label] for label in e.train.label_N]
        assert class_of_ids(e, "test") == [e.classes[label] for label in e.test.label_N]
        assert [len(e.train), len(e.validation), len(e.test)] == (
            [8, 2, 4] if test_part else [6, 2, 2])


def test_class_folders_without_parts_deep_and_with_other_files(tmp_path):
    write_folders(tmp_path, ["dog/images", "cat/images"], part="set")
    (tmp_path / "set" / "cat" / "boxes.txt").write_text("0 0 1 1")
    (tmp_path / "set" / ".cache").mkdir()
    (whole,) = stream(tmp_path / "set", tasks=1)
    assert whole.classes == ("cat", "dog")
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 10


def test_first_classes_only(tmp_path):
    write_folders(tmp_path, ["a", "b", "c", "d", "e"])
    experiences = stream(tmp_path, task_sizes=(2, 1), classes=3)
    assert sorted(name for e in experiences for name in e.classes) == ["a", "b", "c"]
    assert [len(e.classes) for e in experiences] == [2, 1]
    refused("classes is 6 but", tmp_path, tasks=2, classes=6)


def test_a_class_without_training_images(tmp_path):
    write_folders(tmp_path, ["a", "b", "c"])
    (tmp_path / "train" / "bb").mkdir()
    first = stream(tmp_path, tasks=2)[0]
    assert first.not_used.classes == ("bb",)
    assert "1 named class without an image in any split (bb)" in first.not_used.lines()[0]
    write_rows(tmp_path / "rows" / "train.parquet", [0, 2] * 9, ["x", "y", "z"])
    assert sum((task.classes for task in stream(tmp_path / "rows", tasks=2)), ()) == ("x", "z")
    write_rows(tmp_path / "rows" / "test.parquet", [1], ["x", "y", "z"])
    refused("class 'y' has no training images in", tmp_path / "rows", tasks=2)


def test_paths_without_images(tmp_path):
    refused("or a data form (digits, torchvision, hf", tmp_path / "nowhere", tasks=2)
    refused("no images found in", tmp_path, tasks=2)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "notes.txt").write_text("nothing here")
    refused("no images found in", tmp_path, tasks=2)
    refused("is a file; allowed: a folder, or a file ending in .parquet",
            tmp_path / "train" / "a" / "notes.txt", tasks=2)
    (tmp_path / "train" / "1.png").write_bytes(encoded(digit(0)))
    refused("1.png lies in no class folder", tmp_path, tasks=2)


def test_splits_that_do_not_fit_the_data(tmp_path):
    write_folders(tmp_path, ["a", "b", "c"])
    refused("tasks is 4 but there are 3 classes; allowed: 1 to 3", tmp_path, tasks=4)
    refused("task_sizes 2 2 sum to 4 but there are 3", tmp_path, task_sizes=(2, 2))
    refused("tasks is not given", tmp_path)
    refused("stream_seed is -1", tmp_path, tasks=3, stream_seed=-1)


def test_too_few_images_for_the_held_out_share(tmp_path):
    write_folders(tmp_path, ["a", "b"], images=1)
    refused("class 'a' has 1 image, too few to hold out 0.2 for test", tmp_path, tasks=1)
    write_folders(tmp_path, ["a", "b"], images=1, part="test")
    refused("too few to hold out 0.1 for validation", tmp_path, tasks=1)
    (alone,) = stream(tmp_path, tasks=1, validation=0.0)
    assert [len(alone.train), len(alone.validation), len(alone.test)] == [2, 0, 2]


def test_a_task_without_test_images(tmp_path):
    write_folders(tmp_path, ["a", "b"])
    write_folders(tmp_path, ["a"], part="test")
    refused("has no test images", tmp_path, tasks=2)


# ---- form (c): torchvision


def test_torchvision_name_that_does_not_exist(tmp_path):
    refused("torchvision has no usable data set 'CIFAR1000'; allowed: CIFAR10, CIFAR100",
            "torchvision:CIFAR1000", tmp_path, tasks=2)


@pytest.mark.parametrize("name", ["CIFAR100", "FashionMNIST", "SVHN"])
def test_torchvision_without_a_network(tmp_path, monkeypatch, name):
    for scheme in ("http", "https"):  # nothing listens on port 9 of this machine
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    refused(f"torchvision data set {name!r} cannot be downloaded", f"torchvision:{name}",
            tmp_path, tasks=2)
    refused("it needs a network, once", f"torchvision:{name}", tmp_path, tasks=2)


def test_torchvision_names_are_torchvisions():
    from torchvision import datasets

    assert set(TORCHVISION) <= set(datasets.__all__)


def test_torchvision_is_converted_once(tmp_path):
    """Real digits in MNIST's own files, as an earlier download would have left them."""
    raw = tmp_path / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 400)), ("t10k", slice(400, 500))):
        images = (DIGITS.images[rows] * 15).astype(np.uint8)
        header = struct.pack(">IIII", 0x803, len(images), 8, 8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, len(images))
        labels = DIGITS.target[rows].astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    first = stream("torchvision:MNIST", tmp_path, tasks=5)
    for file in raw.iterdir():
        file.unlink()
    again = stream("torchvision:MNIST", tmp_path, tasks=5)
    assert [e.fingerprint for e in first] == [e.fingerprint for e in again]
    assert sum(len(e.test) for e in first) == 100
    assert sorted(name for e in first for name in e.classes)[0] == "0 - zero"


# ---- form (d): digits


def test_digits(tmp_path):
    experiences = stream("digits", tmp_path, tasks=5)
    assert [len(e.classes) for e in experiences] == [2] * 5
    count = sum(len(part) for e in experiences for part in (e.train, e.validation, e.test))
    assert count == 1797
    for e in experiences:
        decoded = decode(e.test, 8)
        for image_CHW, row, label in zip(decoded.images_BCHW, e.test.row_N, e.test.label_N,
                                         strict=True):
            expected = (DIGITS.images[row] * (255 / 16)).round()
            assert (image_CHW.numpy() == expected).all()
            assert e.classes[label] == str(DIGITS.target[row])


def test_digits_are_written_once_and_leave_nothing_behind(tmp_path):
    file = convert_digits(tmp_path) / "train.parquet"
    written = file.stat().st_mtime_ns
    assert convert_digits(tmp_path) / "train.parquet" == file
    assert file.stat().st_mtime_ns == written
    assert list(file.parent.iterdir()) == [file]


def test_a_conversion_that_fails_half_way_leaves_no_file(tmp_path):
    def images():
        yield digit(0), 0
        raise OSError("the network went away")

    with pytest.raises(OSError, match="went away"):
        write_parquet(tmp_path / "set" / "train.parquet", images(), ["zero"])
    assert list((tmp_path / "set").iterdir()) == []


def test_a_stream_is_a_function_of_its_seed(tmp_path):
    prints = [[e.fingerprint for e in stream("digits", tmp_path, tasks=3, stream_seed=seed)]
              for seed in (0, 0, 1)]
    assert prints[0] == prints[1]
    assert not set(prints[0]) & set(prints[2])


def test_classes_may_come_in_the_order_of_their_labels(tmp_path):
    for seed in (0, 1):
        given = stream("digits", tmp_path, tasks=5, class_order="given", stream_seed=seed)
        assert [e.classes for e in given] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"),
                                              ("8", "9")]


# ---- form (e): a directory of tasks


@pytest.fixture
def tasks_folder(tmp_path):
    write_folders(tmp_path / "task-2", ["cat", "dog"], mode="RGB")
    write_folders(tmp_path / "task-2", ["cat", "dog"], 2, part="test")
    write_rows(tmp_path / "task-10" / "train.parquet", [0, 1, 2] * 6, ["x", "y", "z"])
    write_rows(tmp_path / "task-10" / "test.parquet", [0, 1, 2], ["x", "y", "z"])
    write_folders(tmp_path / "task-1", ["a", "b"])
    large = Image.effect_noise((90, 40), 60)
    (tmp_path / "task-1" / "train" / "a" / "large.jpg").write_bytes(encoded(large, "JPEG"))
    return tmp_path


def test_directory_of_tasks(tasks_folder):
    experiences = stream(tasks_folder)
    assert [e.name for e in experiences] == ["task-1", "task-2", "task-10"]
    assert [e.classes for e in experiences] == [("a", "b"), ("cat", "dog"), ("x", "y", "z")]
    assert [[len(e.train), len(e.validation), len(e.test)] for e in experiences] == [
        [7, 2, 2], [8, 2, 4], [15, 3, 3]]
    for e in experiences:
        assert decode(e.train, 16).images_BCHW.shape == (len(e.train), 3, 16, 16)
    assert len(stream(tasks_folder, tasks=3)) == 3


def test_a_stream_through_another_filesystem_has_the_same_content(tasks_folder):
    inside = SubTreeFileSystem(str(tasks_folder.parent), LocalFileSystem())
    there = stream(f"s3://{tasks_folder.name}/", filesystem=inside)
    assert [e.fingerprint for e in there] == [e.fingerprint for e in stream(tasks_folder)]
    assert there[0].train.files[0].startswith(tasks_folder.name)
    assert [e.fingerprint for e in stream(f"file://{tasks_folder}")] == [
        e.fingerprint for e in there]
    refused("has the scheme 's3'; without a filesystem of its own", "s3://bucket/tasks")


def test_directory_of_tasks_with_options_for_a_cut(tasks_folder):
    refused("tasks is given but", tasks_folder, tasks=2)
    refused("a directory of 3 tasks; allowed: leave task_sizes out", tasks_folder,
            task_sizes=(2, 2, 3))
    refused("classes is 2 but", tasks_folder, classes=2)


def test_duplicate_task_names(tasks_folder):
    write_folders(tasks_folder / "Task-1", ["a", "b"])
    refused("duplicate task names 'Task-1' and 'task-1'", tasks_folder)


def test_a_task_without_training_part(tasks_folder):
    (tasks_folder / "zoo" / "a").mkdir(parents=True)
    refused("is a directory of tasks but 'zoo' has no train split", tasks_folder)


# ---- transforms


def test_task_transforms(tmp_path):
    plain = stream("digits", tmp_path, tasks=2)
    noisy = stream("digits", tmp_path, tasks=2, task_transforms=("none", "grey+noise"))
    assert [e.transform for e in noisy] == ["none", "grey+noise"]
    assert noisy[0].fingerprint == plain[0].fingerprint
    assert noisy[1].fingerprint != plain[1].fingerprint
    refused("task_transforms has 1 entries for 2 tasks", "digits", tmp_path, tasks=2,
            task_transforms=("grey",))
    refused("has the unknown part 'fog'", "digits", tmp_path, tasks=2,
            task_transforms=("none", "grey+fog"))


def test_noise_depends_on_the_image_and_the_seed_not_on_its_company_or_place(tmp_path):
    write_folders(tmp_path / "one", ["a", "b"])
    write_folders(tmp_path / "two", ["a", "b"])
    one, two = (stream(tmp_path / name, tasks=1)[0].train for name in ("one", "two"))
    together = decode(one, 8, "noise").images_BCHW
    assert (decode(one.take([3]), 8, "noise").images_BCHW[0] == together[3]).all()
    assert (decode(two, 8, "noise").images_BCHW == together).all()
    assert (decode(one, 8, "noise", seed=1).images_BCHW != together).any()


# ---- decoding


@pytest.mark.parametrize(("mode", "form"), [
    ("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"),
    ("I;16", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "BMP"),
    ("P", "GIF"), ("RGB", "WEBP"), ("L", "PPM"), ("I;16", "PPM")])
def test_any_mode_becomes_rgb(mode, form):
    grey = digit(4).resize((32, 32))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    image_CHW = decode_images([encoded(image, form)], ["x"], 32).images_BCHW[0]
    expected = np.asarray(grey.convert("1").convert("RGB") if mode == "1" else grey.convert("RGB"))
    difference = image_CHW.numpy().astype(int) - expected.transpose(2, 0, 1)
    assert abs(difference).mean() < 6


@pytest.mark.parametrize("largest", [255, 1023, 4095])
def test_few_bits_in_16_are_refused_and_not_made_black(largest):
    values = np.arange(64).reshape(8, 8) * largest // 63
    image = encoded(Image.fromarray(values.astype(np.uint16)))
    bad = decode_images([image], ["x"], 8, on_bad="skip").bad[0]
    assert bad.reason.startswith(f"has 16 bits a value, but none above {largest}")
    black, bright = (encoded(Image.fromarray(np.full((8, 8), value, np.uint16)))
                     for value in (0, 4096))
    assert decode_images([black, bright], ["x", "y"], 8).images_BCHW.amax((1, 2, 3)).tolist() == [
        0, 16]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_few_bits_in_16_of_a_colour_image_are_refused_too(colour_type, channels):
    """As PNG writers of cameras have it; Pillow reads the upper 8 bits and writes no such file."""
    def written(largest):
        values_HWC = np.full((8, 8, channels), 0xFFFF, ">u2")
        values_HWC[..., :3 if channels > 2 else 1] = largest
        header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
        rows = b"".join(b"\0" + row.tobytes() for row in values_HWC)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts)
    bad = decode_images([written(4095)], ["x"], 8, on_bad="skip").bad[0]
    assert bad.reason.startswith("has 16 bits a value, but none above 4095")
    black, bright = written(0), written(0x8000)
    assert decode_images([black, bright], ["x", "y"], 8).images_BCHW.amax((1, 2, 3)).tolist() == [
        0, 128]


@pytest.mark.parametrize(("size", "close"), [((64, 32), 0.5), ((300, 200), 0.5),
                                             ((32, 64), 0.5), ((40, 333), 4), ((8, 9), 8)])
def test_shorter_side_is_resized_and_the_centre_kept(size, close):
    """Equal to resizing and then cropping; between pixels where that would round."""
    image = digit(7, "RGB").resize(size, Image.Resampling.BICUBIC)
    scale = 16 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)),
                           Image.Resampling.BILINEAR)
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    expected_HWC = np.asarray(resized.crop((left, top, left + 16, top + 16))).astype(int)
    image_CHW = decode_images([encoded(image)], ["x"], 16).images_BCHW[0].numpy()
    assert abs(image_CHW.transpose(1, 2, 0) - expected_HWC).mean() <= close


def test_a_very_long_image_costs_no_more_than_its_middle():
    long = encoded(Image.new("L", (100_000, 2), 7))
    assert (decode_images([long], ["x"], 512).images_BCHW == 7).all()


def test_shrinking_is_antialiased():
    checks = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8))
    shrunk = decode_images([encoded(checks)], ["x"], 16).images_BCHW.float()
    assert ((shrunk - 127.5).abs() < 3).all()


def test_a_large_jpeg_is_like_its_full_decoding():
    smooth = digit(7, "RGB").resize((1000, 900), Image.Resampling.BICUBIC)
    jpeg, png = (decode_images([encoded(smooth, form)], ["x"], 32).images_BCHW.float()
                 for form in ("JPEG", "PNG"))
    assert (jpeg - png).abs().mean() < 3


GOOD = encoded(digit(1))
JPEG = encoded(digit(1, "RGB").resize((64, 64)), "JPEG")
BOMB = encoded(Image.new("1", (4000, 3000)))
BAD = {
    "truncated.png": (GOOD[:len(GOOD) // 2], "is truncated or damaged"),
    "truncated.jpg": (JPEG[:-60], "is truncated or damaged"),
    "text.png": (b"no image at all", "is no readable PNG, JPEG"),
    "empty.png": (b"", "is empty"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is no readable PNG"),
    "bomb.png": (BOMB, "is too large: 4000 x 3000 = 12000000 pixels; allowed: up to 10000000"),
    "float.tiff": (encoded(Image.new("F", (8, 8)), "TIFF"), "has 32-bit values (mode F)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named(name):
    data, reason = BAD[name]
    with pytest.raises(InputError) as caught:
        decode_images([GOOD, data], ["good", name], 8, max_pixels=10_000_000)
    assert str(caught.value).startswith(f"image {name} {reason}")
    assert "--on-bad-image skip (in a configuration: data.on_bad_image)" in str(caught.value)


def test_bad_images_are_left_out_and_listed():
    images, ids = [GOOD], ["first"]
    for name, (data, _) in BAD.items():
        images, ids = [*images, data, JPEG], [*ids, name, f"after {name}"]
    decoded = decode_images(images, ids, 8, on_bad="skip", max_pixels=10_000_000)
    assert [bad.id for bad in decoded.bad] == list(BAD)
    assert all(bad.reason.startswith(BAD[bad.id][1]) for bad in decoded.bad)
    assert decoded.index_B.tolist() == [0, *range(2, len(images), 2)]
    assert len(decoded.images_BCHW) == len(decoded.index_B)
    assert (decoded.images_BCHW[1] == decode_images([JPEG], ["x"], 8).images_BCHW[0]).all()


def test_a_bomb_beyond_the_decoders_own_limit_is_refused_too():
    """A PNG header that claims 20000 x 20000; nothing of that size is ever allocated."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    bomb = (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
            + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 100) + b"IDAT")
    with pytest.raises(InputError, match=r"image huge.png is too large: .*400000000 pixels.*"
                                         r"max_image_pixels is 50000000"):
        decode_images([bomb], ["huge.png"], 8)


def test_a_bad_image_in_a_stream_is_named_with_its_place(tmp_path):
    write_folders(tmp_path, ["a", "b"])
    (tmp_path / "train" / "b" / "9.png").write_bytes(GOOD[:60])
    (whole,) = stream(tmp_path, tasks=1, validation=0.0, test=0.01)
    with pytest.raises(InputError, match=r"train/b/9\.png is truncated"):
        decode(whole.train, 8)
    assert len(decode(whole.train, 8, on_bad="skip").images_BCHW) == len(whole.train) - 1


def test_damage_anywhere_is_a_bad_image_and_nothing_worse(recwarn):
    """Random bytes of seven encodings are changed; the decoder of each may fail in its own way."""
    rng = np.random.default_rng(0)
    image = digit(3, "RGB").resize((40, 30))
    images = []
    for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        for _ in range(40):
            damaged = np.frombuffer(encoded(image, form), np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
            images.append(damaged.tobytes())
    decoded = decode_images(images, [str(i) for i in range(len(images))], 16, on_bad="skip",
                            max_pixels=100_000)
    assert len(decoded.images_BCHW) + len(decoded.bad) == len(images)
    assert 0 < len(decoded.bad) < len(images)
    assert not recwarn.list


def test_a_pointer_of_git_lfs_says_so():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert "git lfs pull" in decode_images([pointer], ["x"], 8, on_bad="skip").bad[0].reason


def test_decoding_nothing():
    decoded = decode_images([], [], 8)
    assert (decoded.images_BCHW.shape, decoded.index_B.shape) == ((0, 3, 8, 8), (0,))


# ---- images without labels


def test_images_for_prediction(tmp_path):
    write_folders(tmp_path, ["a", "b"], 2)
    table = open_images(str(tmp_path))
    assert len(table) == 4
    assert set(table.label_N.tolist()) == {-1}
    assert len(open_images(str(tmp_path / "train" / "a" / "0.png"))) == 1
    pq.write_table(pa.table({"image": [GOOD, JPEG]}), tmp_path / "rows.parquet")
    assert open_images(str(tmp_path / "rows.parquet")).read() == [GOOD, JPEG]
    with pytest.raises(InputError, match=r"^'nowhere' does not exist \(looked for /.*/nowhere\); "
                                         "allowed: an image file, a Parquet file, or a folder of"):
        open_images("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images found"):
        open_images(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["auto", "none"])
def test_names_that_mean_something_else_are_refused(tmp_path, name):
    pixels = np.zeros((8, 8, 3), np.uint8)
    for task in (name, "cats"):
        for part in ("train", "test"):
            for label in ("a", "b"):
                folder = tmp_path / "tasks" / task / part / label
                folder.mkdir(parents=True)
                for number in range(4):
                    Image.fromarray(pixels + number).save(folder / f"{number}.png")
    with pytest.raises(InputError, match=f"task is named '{name}'"):
        open_stream(DataConfig(data=str(tmp_path / "tasks")), tmp_path / "cache")


def test_domains_share_classes_and_divide_images(tmp_path):
    config = DataConfig(data="digits", stream="domains", input_size=16,
                        task_transforms=("none", "blur", "noise"))
    first, *rest = open_stream(config, tmp_path)
    whole = open_stream(DataConfig(data="digits", tasks=1), tmp_path)[0]
    assert [each.transform for each in (first, *rest)] == ["none", "blur", "noise"]
    for part in ("train", "validation", "test"):
        ids = [getattr(each, part).ids() for each in (first, *rest)]
        assert sorted(name for own in ids for name in own) == sorted(getattr(whole, part).ids())
        counts = [np.bincount(getattr(each, part).label_N, minlength=10)
                  for each in (first, *rest)]
        assert np.ptp(counts, axis=0).max() <= 1
    assert first.classes == rest[0].classes == whole.classes
    assert stream_counts([first, *rest]).startswith("3 tasks, 10 classes, ")
    again = open_stream(config, tmp_path)
    assert [each.fingerprint for each in again] == [first.fingerprint,
                                                    *(each.fingerprint for each in rest)]
    other = open_stream(dataclasses.replace(config, stream_seed=1), tmp_path)
    assert other[0].train.ids() != first.train.ids()


@pytest.mark.parametrize("options", [{"tasks": 2}, {"task_sizes": (5, 5)}])
def test_domains_take_no_split_of_classes(tmp_path, options):
    config = DataConfig(data="digits", stream="domains", task_transforms=("none",) * 3, **options)
    with pytest.raises(InputError, match="stream is 'domains' with 3 task_transforms"):
        open_stream(config, tmp_path)


def test_domains_are_named(tmp_path):
    with pytest.raises(InputError, match="task_transforms is not given"):
        open_stream(DataConfig(data="digits", stream="domains"), tmp_path)


def test_domains_need_an_image_of_every_class_in_every_task(tmp_path):
    config = DataConfig(data="digits", stream="domains", task_transforms=("none",) * 9,
                        images_per_class=8)
    with pytest.raises(InputError, match=r"class '0' .* has too few images for 9 tasks"):
        open_stream(config, tmp_path)


def test_so_many_images_of_each_class_and_no_more(tmp_path):
    config = DataConfig(data="digits", tasks=5, images_per_class=30, validation=0.1)
    for task in open_stream(config, tmp_path):
        counts = [np.bincount(getattr(task, part).label_N) for part in ("train", "validation",
                                                                        "test")]
        assert sum(counts).tolist() == [30, 30]
