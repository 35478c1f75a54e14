"""The Python of the documents runs as it stands there, and prints what the page says."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from partialhn.data.table import FORMS
from partialhn.networks.table import BACKBONES
from partialhn.strategies import table as strategies
from pipelines.cli.main import run
from tests.docs.pages import PAGES, ROOT, blocks, blocks_of, shell_lines

PYTHON_PAGES = [page for page in PAGES if any(
    block.language == "python" and not (block.reason or block.example) for block in blocks(page))]
EXAMPLES = [block for block in blocks_of("python") if block.example]


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """A page may register lines of its own; no other test of this process shall see them."""
    tables = (strategies.TABLE, BACKBONES, FORMS)
    before = [set(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            table.unregister(name)


@pytest.fixture
def images(tmp_path):
    """A folder IMAGES of real digits: six classes, of 20 images to learn from and 8 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label, name in enumerate(("airplane", "bird", "car", "cat", "deer", "dog")):
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
        if block.language != "python" or block.reason or block.example:
            continue
        capsys.readouterr()
        exec(compile(block.body, page, "exec"), scope)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert shape(printed) == shape(block.output), printed


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.example)
def test_a_part_of_an_example_is_what_the_example_runs(block):
    """The examples themselves are run by tests/examples."""
    assert block.body.partition("\n")[2] in (ROOT / block.example).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_three_lines_of_shell_of_the_readme_run(tmp_path, monkeypatch, capsys, images):
    block = next(block for block in blocks("README.md")
                 if block.language == "console" and "predict" in block.body)
    monkeypatch.chdir(tmp_path)
    for line in shell_lines(block):
        assert run(shlex.split(line)[1:]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "Partial hypernetwork" in printed
    assert "8 images of task '0' labelled by models:/my-stream/3" in printed
    assert (tmp_path / "report.html").stat().st_size > 10_000
