"""A closer look at learned tasks for the report, from stored features.

It finds the classes that are taken for each other, ridge regression beside the model, and images
with right and wrong answers.

The work is bounded: of a long stream only the tasks that most need a look are reviewed, and ridge
regression is fitted here only where no held-out images measured it while the task was learned.

Legend: N test images, K classes, F pooled features.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from partialhn.checkpoints.model import Model
from partialhn.data.decode import decode_images
from partialhn.data.experience import newest_slots
from partialhn.data.image_table import ImageTable
from partialhn.features.closed_form import fit_ridge, pooled_cells
from partialhn.features.feature_set import FeatureSet
from partialhn.features.store import FeatureStore
from partialhn.training.answers import answer
from partialhn.training.experience import TaskFeatures
from partialhn.training.records import EpochRecord
from partialhn.training.slots import Slot, open_task_features

REVIEWED = 24
"""Most tasks that are reviewed."""
NEWEST = 4
"""So many of them are the newest; the others are those with the least accuracy above guessing."""
EXAMPLES = 4
"""Images with a right answer, and as many with a wrong one, of every reviewed task."""
LOOKED = 1000
"""Most test images of a task that are answered again, evenly spread."""
CONFUSED = 5
"""Pairs of classes that are kept of every task."""
LARGEST = 16 << 20
"""Stored bytes of training features up to which ridge regression is fitted here."""
SIDE = 64
"""Pixels along each side of an example image."""


def reviewed_tasks(accuracies: Sequence[float], classes: Sequence[int]) -> list[int]:
    """Indices of the tasks to review, from every task's accuracy now."""
    count = len(accuracies)
    if count <= REVIEWED:
        return list(range(count))
    newest = list(range(count - NEWEST, count))
    above = [accuracy - 1 / kinds for accuracy, kinds in zip(accuracies, classes, strict=True)]
    lowest = sorted(range(count - NEWEST), key=lambda task: above[task])[:REVIEWED - NEWEST]
    return sorted(lowest + newest)


def review(model: Model, slots: Sequence[Slot], store: FeatureStore,
           accuracies: Sequence[float], epochs: Sequence[EpochRecord],
           tests: Mapping[str, ImageTable]) -> list[dict[str, Any]]:
    """The reviewed tasks as plain values for `result.json`.

    slots: all of the model; a task is reviewed with its newest. accuracies: of every slot, now.
    epochs: records of the learned slots. tests: test images by slot; a slot without them has no
    example images.
    """
    strategy = model.strategy
    last = {record.task_index: record for record in epochs}
    newest = sorted(newest_slots([slot.name for slot in slots]).values())
    places = [newest[number] for number in reviewed_tasks(
        [accuracies[place] for place in newest], [len(slots[place].classes) for place in newest])]
    beside = {place for place in places if model.config.backbone.depth
              and _wants_ridge(slots[place], last.get(place))}
    opened = open_task_features(store, slots, beside)
    reviews = []
    for place in places:
        slot, features = slots[place], opened[place]
        rows_N = _evenly(len(features.test), LOOKED)
        logits_NK, y_N = answer(strategy, place, features.test, rows_N=rows_N)
        predicted_N = logits_NK.argmax(1)
        reviews.append({
            "task": slot.name, "index": place, "images": len(y_N),
            "confused": _confused(predicted_N, y_N, slot.classes),
            "ridge": _beside_ridge(features, predicted_N, rows_N) if place in beside else None,
            "examples": _examples(features.test, rows_N, logits_NK, y_N, slot.classes,
                                  tests.get(slot.name))})
    return reviews


def _wants_ridge(slot: Slot, last: EpochRecord | None) -> bool:
    """Whether ridge regression is fitted here: the task is not solved by it, and it is little work.

    Of a larger task the report has what was measured on held-out images while it was learned.
    """
    train = slot.manifests.get("train")
    return train is not None and train.bytes <= LARGEST and not (last and last.solved)


def _beside_ridge(features: TaskFeatures, predicted_N: Tensor,
                  rows_N: Tensor) -> dict[str, float] | None:
    """Test accuracy of ridge regression, and the shares that one of the two alone gets right."""
    train, test = features.train, features.test
    if train is None or not len(train) or not len(test):
        return None
    classifier = fit_ridge(pooled_cells(train, 1), train.y_N.cpu(), features.classes)
    y_N = test.y_N.cpu()[rows_N]
    ridge_N = classifier.logits(pooled_cells(test, 1)[rows_N].double()).argmax(1) == y_N
    ours_N = predicted_N == y_N
    return {"accuracy": _share(ridge_N), "only_ours": _share(ours_N & ~ridge_N),
            "only_ridge": _share(ridge_N & ~ours_N)}


def _share(right_N: Tensor) -> float:
    return float(right_N.double().mean())


def _confused(predicted_N: Tensor, y_N: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are taken for each other most often, most often first."""
    count = len(classes)
    pairs = torch.bincount(y_N * count + predicted_N, minlength=count**2).view(count, count)
    of_K = pairs.sum(1)
    wrong = pairs - torch.diag(pairs.diagonal())
    order = torch.argsort(wrong.flatten(), descending=True, stable=True)[:CONFUSED].tolist()
    return [{"class": classes[place // count], "taken_for": classes[place % count],
             "images": int(wrong.flatten()[place]), "of": int(of_K[place // count])}
            for place in order if wrong.flatten()[place] > 0]


def _examples(test: FeatureSet, rows_N: Tensor, logits_NK: Tensor, y_N: Tensor,
              classes: Sequence[str], table: ImageTable | None) -> list[dict[str, Any]]:
    """Images with right and with wrong answers, spread over the answered test images."""
    if table is None or not len(y_N):
        return []
    probability_N, predicted_N = logits_NK.softmax(1).max(1)
    right_N = (predicted_N == y_N).numpy()
    known = _places(test, table)
    places = [known.get(row, -1) for row in rows_N.tolist()]
    rows = [row for row in (*_spread(np.flatnonzero(right_N)), *_spread(np.flatnonzero(~right_N)))
            if places[row] >= 0 and int(table.label_N[places[row]]) == int(y_N[row])]
    images = table.take([places[row] for row in rows]).read()
    return [example(image, classes[int(y_N[row])], classes[int(predicted_N[row])],
                    float(probability_N[row])) for row, image in zip(rows, images, strict=True)]


def _places(test: FeatureSet, table: ImageTable) -> dict[int, int]:
    """The image of each row of the features: by its id, or by its place where none was left out,
    since features that are found again may have been computed from a copy in another folder.
    """
    if len(test) == len(table):
        return {row: row for row in range(len(table))}
    known = {name: place for place, name in enumerate(table.ids())}
    return {row: known[name] for row, name in enumerate(test.ids) if name in known}


def sample_examples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same from a stored sample of answers (`partialhn.evaluation.answer_sample`), for a task
    whose images are no longer at hand.
    """
    right_N = np.array([row["label"] == row["expected"] for row in rows], bool)
    chosen = [*_spread(np.flatnonzero(right_N)), *_spread(np.flatnonzero(~right_N))]
    return [example(rows[row]["image"], rows[row]["label"], rows[row]["expected"],
                    rows[row]["probability"]) for row in chosen]


def _spread(rows: npt.NDArray[np.int64]) -> list[int]:
    """At most `EXAMPLES` of some rows, evenly spread."""
    return [int(row) for row in rows[_evenly(len(rows), EXAMPLES).numpy()]]


def _evenly(count: int, most: int) -> Tensor:
    """At most so many of the numbers below `count`, evenly spread."""
    places = torch.linspace(0, max(count - 1, 0), min(count, most), dtype=torch.float64)
    return places.round().long()


def example(image: bytes, label: str, given: str, probability: float) -> dict[str, Any]:
    """One example: a small JPEG in base64, its class, the model's answer and its probability."""
    decoded = decode_images([image], ["example"], SIDE, on_bad="skip").images_BCHW
    sink = io.BytesIO()
    if len(decoded):
        Image.fromarray(decoded[0].permute(1, 2, 0).numpy()).save(sink, "JPEG", quality=85)
    return {"image": base64.b64encode(sink.getvalue()).decode(), "label": label, "answer": given,
            "probability": round(probability, 3)}
