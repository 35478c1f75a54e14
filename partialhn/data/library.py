"""Data sets that come from a library, converted once to Parquet files in a cache folder.

The files have the same layout as a downloaded data set (`image` as a struct of encoded bytes
and name, `label`, class names in the schema metadata), so one reader serves both.
"""

import http.client
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from partialhn.errors import InputError

_TRAIN_TEST = ({"train": True}, {"train": False})
_SPLITS = ({"split": "train"}, {"split": "test"})
TORCHVISION: dict[str, tuple[dict[str, Any], ...]] = {
    "CIFAR10": _TRAIN_TEST,
    "CIFAR100": _TRAIN_TEST,
    "MNIST": _TRAIN_TEST,
    "FashionMNIST": _TRAIN_TEST,
    "KMNIST": _TRAIN_TEST,
    "QMNIST": _TRAIN_TEST,
    "USPS": _TRAIN_TEST,
    "SVHN": _SPLITS,
    "STL10": _SPLITS,
    "GTSRB": _SPLITS,
    "DTD": _SPLITS,
    "Flowers102": _SPLITS,
    "Food101": _SPLITS,
    "FGVCAircraft": ({"split": "trainval"}, {"split": "test"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
    "Imagenette": ({"split": "train"}, {"split": "val"}),
    "EuroSAT": ({},),
}
"""torchvision's classification data sets by name, with the arguments for train and test part."""

ROWS_PER_GROUP = 1024


def convert_digits(cache_dir: Path) -> Path:
    """scikit-learn's 1,797 handwritten digits (8x8 greyscale) as PNG in one Parquet file."""
    folder = cache_dir / "digits"
    path = folder / "train.parquet"
    if not path.exists():
        from sklearn.datasets import load_digits  # here: seconds, and needed once

        digits = load_digits()
        images = (Image.fromarray((pixels_HW * (255 / 16)).round().astype("uint8"))
                  for pixels_HW in digits.images)
        write_parquet(path, zip(images, digits.target.tolist(), strict=True),
                      [str(name) for name in digits.target_names])
    return folder


def digits_form(argument: str, cache_dir: Path) -> Path:
    """The form `digits`, which takes no argument. Raises: InputError for one."""
    if argument:
        raise InputError(f"data is {'digits:' + argument!r}; allowed: digits")
    return convert_digits(cache_dir)


def convert_torchvision(name: str, cache_dir: Path) -> Path:
    """A torchvision data set as PNG in `train.parquet` and `test.parquet`.

    Downloads it to `<cache_dir>/torchvision` unless it is there already.

    Raises: InputError for a name that is not in `TORCHVISION`, or that cannot be downloaded.
    """
    if name not in TORCHVISION:
        raise InputError(f"torchvision has no usable data set {name!r}; allowed: "
                         f"{', '.join(TORCHVISION)}")
    folder = cache_dir / f"torchvision-{name}"
    for part, arguments in zip(("train", "test"), TORCHVISION[name], strict=False):
        path = folder / f"{part}.parquet"
        if not path.exists():
            dataset = _download(name, arguments, cache_dir / "torchvision")
            write_parquet(path, (dataset[i] for i in range(len(dataset))), _class_names(dataset))
    return folder


def _download(name: str, arguments: dict[str, Any], root: Path) -> Any:
    from torchvision import datasets  # here: seconds, and most streams need none of it

    root.mkdir(parents=True, exist_ok=True)
    try:
        return getattr(datasets, name)(root=str(root), download=True, **arguments)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise InputError(f"torchvision data set {name!r} cannot be downloaded to {root}: {error}; "
                         "it needs a network, once, or the files of an earlier download "
                         "there") from error


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def write_parquet(path: Path, images: Iterable[tuple[Image.Image, int]],
                  classes: list[str] | None) -> None:
    """Writes labelled images as PNG; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                        ("label", pa.int64())])
    if classes is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # hidden from readers
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for rows in _batches(_encode(images)):
                writer.write_table(pa.Table.from_pylist(rows, schema), ROWS_PER_GROUP)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(images: Iterable[tuple[Image.Image, int]]) -> Iterator[dict[str, Any]]:
    for number, (image, label) in enumerate(images):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        yield {"image": {"bytes": encoded.getvalue(), "path": f"{number:06d}.png"},
               "label": int(label)}


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_PER_GROUP:
            yield batch
            batch = []
    if batch:
        yield batch
