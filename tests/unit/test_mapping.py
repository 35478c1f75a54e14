"""Pages of mapped files are given back, and the content stays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.features.codec import as_tensor
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.mapping import mapped, release_pages
from partialhn.features.store import FeatureStore

MIB = 1 << 20


def pages_of_files():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "content"
    path.write_bytes(np.arange(32 * MIB // 8).tobytes())
    with path.open("rb") as file:
        return mapped(file)


def test_pages_are_given_back_and_read_again(content):
    numbers = as_tensor(np.frombuffer(content, np.int64))
    before = pages_of_files()
    total = numbers.sum()
    assert pages_of_files() > before + 24 * MIB
    release_pages(numbers[1000:])
    assert pages_of_files() < before + 8 * MIB
    assert numbers.sum() == total


def test_memory_without_a_file_is_left_alone(content):
    numbers = torch.arange(1000)
    release_pages(numbers)
    assert numbers.sum() == 999 * 500


def test_a_copy_of_features_leaves_nothing_of_the_files_behind(tmp_path):
    store = FeatureStore(LocalFileSystem(), str(tmp_path))
    recipe = FeatureRecipe("t", "d", "none", 32, 1, "none", 0, "float16", 256)
    for index in range(4):
        store.write_shard(recipe, index, torch.rand(256, 1, 16, 32, 32), np.zeros(256, int),
                          [str(row) for row in range(256)], seconds=0)
    manifest = store.commit(recipe, [store.find_shard(recipe.key, index) for index in range(4)],
                            (1, 16, 32, 32))
    before = pages_of_files()
    features = store.open(manifest)
    copied = features.to(torch.device("cpu"))
    assert features.nbytes == 32 * MIB
    assert pages_of_files() < before + 16 * MIB
    assert torch.equal(copied.gather(torch.arange(1024), torch.zeros(1024, dtype=torch.int64)),
                       features.gather(torch.arange(1024), torch.zeros(1024, dtype=torch.int64)))
