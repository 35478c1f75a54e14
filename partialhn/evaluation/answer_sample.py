"""A sample of test images of every task with the model's predictions, stored beside the model.

One Parquet file: image (encoded), task, label (true), expected (predicted label) and probability
(of the predicted label). Whoever loads the model later predicts again and compares.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from partialhn.data.experience import Experience, task_of
from partialhn.errors import InputError, IntegrityError
from partialhn.predict import Predictor

IMAGES = 128
"""Images of all tasks together, spread evenly over the tasks; at least one for each task."""
MAX_BYTES = 2 * 1024 ** 2
"""Encoded images of all tasks together; larger images are left out."""
TOLERANCE = 0.01
"""Largest difference of a probability that rounding on another processor explains."""
SCHEMA = pa.schema([("image", pa.binary()), ("task", pa.string()), ("label", pa.string()),
                    ("expected", pa.string()), ("probability", pa.float64())])

Answer = Callable[[list[bytes], str], tuple[Sequence[str], Sequence[float]]]
"""A function that takes images and a task and returns labels and their probabilities."""


@dataclasses.dataclass(frozen=True)
class SampleCheck:
    """The result of predicting again."""

    images: int
    accuracy: float
    """Accuracy now."""
    expected_accuracy: float
    """Accuracy when the sample was taken."""
    differing: int
    """Images whose probability differs by more than rounding."""

    @property
    def passed(self) -> bool:
        return self.differing == 0


def write_sample(path: Path, predictor: Predictor, experiences: Sequence[Experience]) -> None:
    """Writes a sample: test images of every task, spread over its classes, with the predictions.

    A task that was refreshed is sampled from its newest data. Unreadable images are left out. The
    trunk runs once over the images of all tasks, since a run for each task has a small batch.
    """
    newest = {task_of(each.name): each for each in experiences}
    count = max(1, IMAGES // len(newest))
    images: list[bytes] = []
    tasks: list[str] = []
    labels: list[str] = []
    decoded: list[Tensor] = []
    for task, experience in newest.items():
        encoded, classes, images_BCHW = _pick(experience, count, MAX_BYTES // len(newest),
                                              predictor)
        images += encoded
        labels += classes
        tasks += [task] * len(encoded)
        decoded.append(images_BCHW)
    answers = predictor.answers(predictor.features(torch.cat(decoded)), tasks) if images else []
    pq.write_table(pa.table([images, tasks, labels, [answer.label for answer in answers],
                             [answer.probability for answer in answers]], schema=SCHEMA), path)


def sample_again(path: Path, predictor: Predictor, sample: pa.Table) -> bytes:
    """Writes another model's sample, without tasks that this model lacks, with its own answers.

    Returns the first image, encoded. Raises: InputError if no image is left.
    """
    rows = [row for row in sample.to_pylist() if row["task"] in predictor.tasks]
    if not rows:
        raise InputError(f"the stored sample has no image of {', '.join(predictor.tasks)}; "
                         "allowed: a sample of one of these tasks")
    images, tasks = [row["image"] for row in rows], [row["task"] for row in rows]
    decoded = predictor.decode(images, [f"number {i}" for i in range(len(images))])
    answers = predictor.answers(predictor.features(decoded.images_BCHW), tasks)
    pq.write_table(pa.table([images, tasks, [row["label"] for row in rows],
                             [answer.label for answer in answers],
                             [answer.probability for answer in answers]], schema=SCHEMA), path)
    first: bytes = images[0]
    return first


def _pick(experience: Experience, count: int, budget: int,
          predictor: Predictor) -> tuple[list[bytes], list[str], Tensor]:
    """Test images within the budget of bytes, their class names, and the decoded images."""
    order_N = np.argsort(experience.test.label_N, kind="stable")
    spread = np.linspace(0, len(order_N) - 1, min(count, len(order_N))).round().astype(int)
    part = experience.test.take(order_N[spread])
    encoded = part.read()
    readable = predictor.decode(encoded, part.ids(), "skip")
    images, labels, rows = [], [], []
    for row, place in enumerate(readable.index_B.tolist()):
        if len(encoded[place]) <= budget:
            budget -= len(encoded[place])
            images.append(encoded[place])
            labels.append(experience.classes[int(part.label_N[place])])
            rows.append(row)
    return images, labels, readable.images_BCHW[rows]


def read_sample(path: Path) -> pa.Table:
    """The rows of a sample. Raises: IntegrityError for a damaged or an oversized file."""
    try:
        size = path.stat().st_size
        if size > 2 * MAX_BYTES:
            raise IntegrityError(f"sample {path} has {size} bytes; expected at most "
                                 f"{2 * MAX_BYTES}")
        with pq.ParquetFile(path) as file:
            rows, limit = file.metadata.num_rows, 1_000_000
            unpacked = sum(file.metadata.row_group(g).total_byte_size
                           for g in range(file.metadata.num_row_groups))
            if not file.schema_arrow.equals(SCHEMA) or rows > limit or unpacked > 4 * MAX_BYTES:
                raise IntegrityError(f"sample {path} holds {rows} rows of {file.schema_arrow.names}"
                                     f", {unpacked} bytes; expected the format of `write_sample`")
            return file.read()
    except (OSError, pa.ArrowException, ValueError) as error:
        raise IntegrityError(f"sample {path} cannot be read: {error}") from error


def check_sample(sample: pa.Table, answer: Answer) -> SampleCheck:
    """Predicts all images of a sample again and compares with the stored predictions."""
    right = expected_right = differing = 0
    for task in sample["task"].unique().to_pylist():
        rows = sample.filter(pa.compute.equal(sample["task"], task)).to_pylist()
        labels, probabilities = answer([row["image"] for row in rows], task)
        for row, label, probability in zip(rows, labels, probabilities, strict=True):
            right += label == row["label"]
            expected_right += row["expected"] == row["label"]
            differing += not abs(probability - row["probability"]) <= TOLERANCE
            # on another processor a near tie may give the other label, with the same probability
    total = max(sample.num_rows, 1)
    return SampleCheck(sample.num_rows, right / total, expected_right / total, differing)
