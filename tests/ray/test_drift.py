"""`partialhn drift` as a user runs it: recorded answers, a table, JSON and exit codes."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialhn.data import corruptions
from partialhn.data.datasets import open_stream
from partialhn.predict import Predictor
from pipelines.label_images import predict_to_parquet
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect

pytestmark = pytest.mark.slow

MODEL = "models:/digits@champion"


@pytest.fixture(scope="module")
def experiences(learned):
    return open_stream(learned.config.data, Path(learned.output.storage) / "datasets")


def folder_of(images, path, transform="none"):
    """The images as files, corrupted or as they are."""
    path.mkdir(parents=True)
    for number, encoded in enumerate(images):
        if transform == "none":  # another size, or other pixels, would be a change
            (path / f"{number:04d}.png").write_bytes(encoded)
            continue
        with Image.open(io.BytesIO(encoded)) as image:
            changed = corruptions.corrupt(image.convert("RGB").resize((16, 16)),
                                          corruptions.parse(transform), encoded, 0)
        changed.save(path / f"{number:04d}.png")
    return str(path)


@pytest.fixture
def live(learned):
    """Where answers are recorded, empty before and after."""
    folder = Path(learned.output.storage) / "live"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_what_was_asked_drifts_or_not(learned, experiences, live, command, tmp_path):
    where = ("--name", "digits", "--storage", learned.output.storage)
    assert command("drift", *where)[0] == 2
    # images that task 1 was learned from: its trunk has not seen them. From everywhere in the set,
    # because each part of it was written by other people
    rows = np.linspace(0, len(experiences[1].train) - 1, 150).astype(int)
    same = folder_of(experiences[1].train.take(rows).read(), tmp_path / "same")
    assert command("predict", "--model", MODEL, "--task", "1", "--input", same, "--output",
                   tmp_path / "a.parquet", "--storage", learned.output.storage, "--record")[0] == 0
    code, text, _ = command("drift", *where)
    assert (code, "same" in text, "DRIFTS" in text) == (0, True, False), text
    changed = folder_of(experiences[2].test.read(), tmp_path / "changed", "solarise")
    predict_to_parquet(MODEL, "2", changed, str(tmp_path / "b.parquet"), learned.output.storage,
                       record=True)
    code, text, _ = command("drift", *where)
    assert code == 3, text
    assert text.splitlines()[-1].endswith("DRIFTS")
    code, text, _ = command("drift", *where, "--json")
    fields = json.loads(text)
    assert (code, fields["drift"]) == (3, True)
    assert {task["task"]: task["drifts"] for task in fields["tasks"]} == {"1": False, "2": True}
    code, text, errors = command("drift", *where, "--retrain")  # the pass starts
    assert (code, "taken over from `partialhn train`" in text) == (3, True), text + errors
    assert command("drift", *where, "--alpha", "2")[0] == 2
    assert command("drift", *where, "--hours", "0.0000001")[0] == 2
    assert not [path for path in live.rglob("*") if path.suffix in (".png", ".jpg")]


def test_nothing_is_recorded_unless_asked(learned, experiences, live, command, tmp_path):
    images = folder_of(experiences[1].test.take([0, 1]).read(), tmp_path / "images")
    assert command("predict", "--model", MODEL, "--task", "1", "--input", images, "--output",
                   tmp_path / "a.parquet", "--storage", learned.output.storage)[0] == 0
    assert not live.exists()


def test_predict_infers_the_task_of_each_image(learned, experiences, live, command, tmp_path):
    import pyarrow.parquet as pq

    images = [image for each in experiences for image in each.test.take(np.arange(20)).read()]
    folder = folder_of(images, tmp_path / "images")
    code, text, _ = command("predict", "--model", MODEL, "--task", "auto", "--input", folder,
                            "--output", tmp_path / "a.parquet", "--storage",
                            learned.output.storage)
    assert code == 0, text
    assert "60 images without their task labelled by" in text
    measured = learned.result["without_task_id"]
    assert text.startswith(
        f"task auto finds the right task for {100 * measured['task_accuracy']:.1f} % of this "
        f"stream's test images and the right class for {100 * measured['acc']:.1f} %; with the "
        f"task given, {100 * measured['acc_given']:.1f} %; these shares count every image, but it "
        f"takes {100 * measured['known_rejected']:.1f} % of them for images of no known task")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    expected = ["0"] * 20 + ["1"] * 20 + ["2"] * 20
    assert np.mean([row["task"] == task for row, task in zip(rows, expected, strict=True)]) > 0.6
    for row in rows:
        assert row["label"] is None or row["label"] in row["classes"]
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert 0 < row["task_probability"] <= 1


def test_the_result_says_what_no_task_id_costs(learned):
    measured = learned.result["without_task_id"]
    assert measured["task_accuracy"] > 0.6
    assert measured["acc"] <= measured["task_accuracy"]
    assert measured["acc_given"] == pytest.approx(learned.result["acc"], abs=1e-6)
    assert 0 <= measured["rejection_auroc"] <= 1
    registry = connect(open_storage(learned.output.storage), learned.result["tracking_uri"])
    told = registry.resolve(MODEL).without_task_id
    assert {key: told[key] for key in ("acc", "acc_given", "task_accuracy")} == {
        key: measured[key] for key in ("acc", "acc_given", "task_accuracy")}


def test_the_registered_model_takes_auto(learned, experiences):
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(learned.result["tracking_uri"])
    model = mlflow.pyfunc.load_model(MODEL)
    images = [image for each in experiences for image in each.test.take([0, 1, 2]).read()]
    found = model.predict(pd.DataFrame({"image": images, "task": ["auto"] * 8 + ["1"]}))
    checkpoint = model.unwrap_python_model().predictor
    assert isinstance(checkpoint, Predictor)
    labels = [None if pd.isna(label) else label for label in found["label"][:8]]
    assert labels == [answer.label for answer in checkpoint.predict_auto(images[:8])]
    assert found["classes"][8] == list(experiences[1].classes)
    assert list(found.columns) == ["label", "probability", "classes", "probabilities"]
