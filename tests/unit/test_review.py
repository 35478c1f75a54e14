"""Which tasks a report looks at more closely, and which classes are taken for each other."""

import io

import numpy as np
import torch
from PIL import Image

from partialhn.training.review import (
    NEWEST,
    REVIEWED,
    _confused,
    _evenly,
    example,
    reviewed_tasks,
    sample_examples,
)


def test_a_short_stream_is_reviewed_whole():
    assert reviewed_tasks([0.5] * REVIEWED, [2] * REVIEWED) == list(range(REVIEWED))


def test_of_a_long_stream_the_newest_tasks_and_those_nearest_to_guessing():
    accuracies = np.linspace(0.9, 0.99, 200)
    accuracies[[7, 90]] = 0.55, 0.3
    classes = [2] * 200
    classes[90] = 10          # 20 points above guessing, task 7 only 5
    found = reviewed_tasks(accuracies.tolist(), classes)
    assert len(found) == REVIEWED
    assert found == sorted(found)
    assert {7, 90} <= set(found)
    assert found[-NEWEST:] == [196, 197, 198, 199]


def test_confused_classes_are_counted():
    y_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    predicted_N = torch.tensor([0, 1, 1, 1, 0, 2, 2, 2, 0])
    assert _confused(predicted_N, y_N, ["cat", "dog", "ant"]) == [
        {"class": "cat", "taken_for": "dog", "images": 2, "of": 3},
        {"class": "dog", "taken_for": "cat", "images": 1, "of": 2},
        {"class": "ant", "taken_for": "cat", "images": 1, "of": 4}]
    assert _confused(y_N, y_N, ["cat", "dog", "ant"]) == []


def test_a_sample_gives_right_and_wrong_examples():
    sink = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(sink, "PNG")
    rows = [{"image": sink.getvalue(), "label": "cat", "expected": "cat" if place % 3 else "dog",
             "probability": 0.75} for place in range(30)]
    shots = sample_examples(rows)
    assert [shot["answer"] for shot in shots] == ["cat"] * 4 + ["dog"] * 4
    assert sample_examples([]) == []


def test_an_image_that_cannot_be_decoded_has_no_picture():
    assert example(b"no image", "cat", "cat", 0.5)["image"] == ""


def test_answers_are_spread_over_many_images():
    assert _evenly(5, 1000).tolist() == [0, 1, 2, 3, 4]
    assert _evenly(0, 1000).tolist() == []
    many = _evenly(50_000, 1000)
    assert (len(many), many[0], many[-1]) == (1000, 0, 49_999)
    assert (many.diff() >= 50).all()
