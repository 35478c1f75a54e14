"""Photographs for benches: JPEGs that no cache of a decoder makes smaller."""

from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow.fs import LocalFileSystem

from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable


def photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Experience:
    """JPEGs below the folder, as the training images of one class. size: their width and height."""
    rng, files = np.random.default_rng(0), []
    (folder / "jpegs").mkdir(exist_ok=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-12, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(str(folder / "jpegs" / f"{size[0]}-{number:05d}.jpg"))
        Image.fromarray(noisy).save(files[-1], quality=85)
    table = ImageTable(LocalFileSystem(), tuple(files), range(count), [-1] * count, [0] * count)
    return Experience("photographs", ("x",), table, table.take([]), table.take([]))
