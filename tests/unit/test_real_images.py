"""A small stream of real photographs from Parquet; needs PARTIALHN_TEST_DATA."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data.datasets import open_stream
from partialhn.predict import Predictor
from partialhn.run import run_stream

DATA = os.environ.get("PARTIALHN_TEST_DATA")
pytestmark = [pytest.mark.trains, pytest.mark.skipif(
    not DATA, reason="PARTIALHN_TEST_DATA is not set: the folder of real image sets")]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """32 images of each of the first four classes of CIFAR-10, as they are in their file."""
    source = sorted((Path(DATA) / "cifar10").rglob("*train*.parquet"))[0]
    table = pq.ParquetFile(source).read_row_group(0)
    labels, rows, counts = table["label"].to_pylist(), [], [0] * 4
    for row, label in enumerate(labels):
        if label < 4 and counts[label] < 32:
            counts[label] += 1
            rows.append(row)
    assert counts == [32] * 4
    folder = tmp_path_factory.mktemp("photographs")
    pq.write_table(table.take(pa.array(rows)), folder / "train.parquet")
    return folder


def test_two_tasks_of_photographs(photographs, tmp_path):
    config = Config.from_dict({
        "data": {"data": str(photographs), "tasks": 2, "classes": 4, "input_size": 16},
        "backbone": {"freeze_depth": 2, "trunk_epochs": 1, "trunk_batch_size": 16},
        "features": {"views": 2}, "train": {"epochs": 1, "batch_size": 16}})
    result = run_stream(config, tmp_path / "root")
    model, fields = result.model, result.fields
    assert fields["images_decoded"] == 128
    assert {name for task in fields["tasks"] for name in task["classes"]} == {
        "airplane", "automobile", "bird", "cat"}
    assert fields["forgetting"] == 0
    again = run_stream(config, tmp_path / "root")
    second = again.fields
    assert second["images_decoded"] == 0
    assert second["weights_hash"] == fields["weights_hash"] == again.model.weights_hash()
    model.save(tmp_path / "model")
    assert Model.load(tmp_path / "model").weights_hash() == fields["weights_hash"]
    first = open_stream(config.data, tmp_path / "root" / "datasets")[0]
    found = Predictor.load(tmp_path / "model").predict(first.test.read(), "0")
    assert set(found.labels) <= set(first.classes)
    truth = [first.classes[label] for label in first.test.label_N]
    right = sum(mine == theirs for mine, theirs in zip(found.labels, truth, strict=True))
    assert abs(right - fields["accuracy_matrix"][-1][0] * len(truth)) <= 1.5
