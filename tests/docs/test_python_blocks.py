"""The Python of the documents runs as it stands there, and prints what the page says."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.docs.pages import PAGES, blocks

PYTHON_PAGES = [page for page in PAGES if any(
    block.language == "python" and block.reason is None for block in blocks(page))]


@pytest.fixture
def images(tmp_path):
    """A folder IMAGES of real digits: four classes, of 20 images to learn from and 8 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label, name in enumerate(("bird", "cat", "deer", "dog")):
        pixels_NHW = (digits.images[digits.target == label][:28] * 15.9).astype(np.uint8)
        for row, pixels_HW in enumerate(pixels_NHW):
            folder = tmp_path / "IMAGES" / ("train" if row < 20 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_HW).save(folder / f"{row:03d}.png")


def shape(text):
    """The text without what differs between processors: numbers, and the room they take."""
    text = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "0", text)
    return [" ".join(re.sub(r"[-=]{3,}", "-", line).split()) for line in text.splitlines()
            if line.strip()]


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys, images):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["page"])
    scope = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python" or block.reason:
            continue
        capsys.readouterr()
        exec(compile(block.body, page, "exec"), scope)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert shape(printed) == shape(block.output), printed
