"""Pixels on their way to the trunk: on disk where they are many, and as the model keeps them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow.fs import LocalFileSystem

from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data import decode as decoder
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode, decode_images, decode_to_file
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError, IntegrityError
from partialhn.predict import Predictor
from partialhn.run import StreamRun, run_stream
from partialhn.training import pretrain
from partialhn.training.pretrain import (
    counted_statistics,
    fit_network,
    load_network,
    pixel_statistics,
)

LOCAL = LocalFileSystem()


def smooth(seed, width, height):
    """A photograph-like image: smooth colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photographs(tmp_path):
    """Two classes of JPEG files of many sizes; one class is darker."""
    sizes = [(60, 90), (200, 150), (97, 97), (640, 480), (33, 120)]
    for split, count in (("train", 10), ("test", 5)):
        for label in ("dark", "light"):
            (tmp_path / "photographs" / split / label).mkdir(parents=True)
            for index in range(count):
                seed = index + 100 * (split == "test") + 1000 * (label == "dark")
                image = smooth(seed, *sizes[index % 5])
                if label == "dark":
                    image = image.point([value // 3 for value in range(256)] * 3)
                image.save(tmp_path / "photographs" / split / label / f"{index}.jpg", quality=90)
    return tmp_path / "photographs"


@pytest.fixture
def table(photographs):
    files = tuple(str(path) for path in sorted((photographs / "train").rglob("*.jpg")))
    return ImageTable(LOCAL, files, range(20), [-1] * 20, [0] * 10 + [1] * 10)


def test_images_on_disk_are_those_in_memory(table, photographs, monkeypatch):
    monkeypatch.setattr(decoder, "PIECE", 7)
    (photographs / "train" / "dark" / "3.jpg").write_bytes(b"")
    one, two = (read(table, 24, "noise", "skip", seed=3) for read in (decode, decode_to_file))
    assert torch.equal(one.images_BCHW, two.images_BCHW)
    assert torch.equal(one.index_B, two.index_B)
    assert one.bad == two.bad
    assert len(two.bad) == 1
    assert len(decode_to_file(table.take([]), 24).images_BCHW) == 0


def test_a_full_temporary_folder_is_said_before_anything_is_decoded(table, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoder.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"GiB once they are decoded, .* \(No space left on "
                                         r"device; .* GiB free\); allowed: .* TMPDIR"):
        decode_to_file(table, 24)


def test_counted_statistics_are_those_of_the_pixels(table):
    images_NCHW = decode(table, 24).images_BCHW
    for one, two in zip(pixel_statistics(images_NCHW), counted_statistics(images_NCHW),
                        strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    flat_NCHW = torch.full((3, 3, 4, 4), 255, dtype=torch.uint8)
    mean_C, std_C = counted_statistics(flat_NCHW)
    assert mean_C.tolist() == [1, 1, 1]
    assert std_C.tolist() == pytest.approx([1e-3] * 3)


@pytest.mark.trains
def test_a_trunk_is_trained_alike_from_memory_and_from_disk(tmp_path, photographs, monkeypatch):
    """Up to the rounding of the pixels' mean and spread."""
    config = Config.from_dict({"data": {"data": str(photographs), "tasks": 1, "input_size": 16},
                               "backbone": {"trunk_epochs": 1}})
    (first,) = open_stream(config.data, tmp_path)

    def trained(root):
        list(fit_network(config, first, LOCAL, str(root)))
        return load_network(config, first, LOCAL, str(root)).state_dict()

    one = trained(tmp_path / "one")
    monkeypatch.setattr(pretrain, "SMALL", 8)
    two = trained(tmp_path / "two")
    for key, value in one.items():
        # Adam may turn the rounding of a gradient near zero into a whole step of one weight
        change = (value.float() - two[key].float()).norm()
        assert change <= 0.01 * value.float().norm(), key


def test_a_model_keeps_the_pixels_of_its_trunk(tmp_path, photographs):
    """JPEG files of many sizes, a trunk of timm from a folder: learned, stored, loaded, asked."""
    timm = pytest.importorskip("timm")
    body = timm.create_model("test_vit", num_classes=3)
    (tmp_path / "trunk").mkdir()
    torch.save(body.state_dict(), tmp_path / "trunk" / "pytorch_model.bin")
    config = Config.from_dict({
        "data": {"data": str(photographs), "tasks": 1, "input_size": 96},
        "backbone": {"backbone": "timm:test_vit", "trunk": str(tmp_path / "trunk")},
        "train": {"epochs": 2}, "features": {"views": 1}})
    result = run_stream(config, tmp_path / "store")
    assert any("input_size is 96" in note for note in StreamRun(config, tmp_path / "store").notes)
    result.model.save(tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model")
    assert predictor.model.trunk.pixels == result.model.trunk.pixels
    assert predictor.model.trunk.pixels.geometry == "bicubic/0.95"
    image = (photographs / "test" / "dark" / "1.jpg").read_bytes()
    asked = predictor.decode([image], ["x"]).images_BCHW
    assert torch.equal(asked, decode_images([image], ["x"], 96,
                                            pixels=predictor.model.trunk.pixels).images_BCHW)
    assert not torch.equal(asked, decode_images([image], ["x"], 96).images_BCHW)
    plain = Model.load(tmp_path / "model")
    plain.trunk.pixels = type(plain.trunk.pixels)()
    assert plain.weights_hash() != result.model.weights_hash()
    shutil.copytree(tmp_path / "model", tmp_path / "damaged")
    (fields,) = (tmp_path / "damaged").glob("*.json")
    fields.write_text(fields.read_text().replace('"crop": 0.95', '"crop": 9.5'))
    with pytest.raises(IntegrityError, match=r"pixels.crop is 9.5|damaged"):
        Model.load(tmp_path / "damaged")
