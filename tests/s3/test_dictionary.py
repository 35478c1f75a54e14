"""A stream with a dictionary from end to end: two Ray workers over S3, MLflow alone, an exported
file, and a version from before the dictionary was closed.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.config import Config
from partialhn.run import run_stream
from pipelines.export_model import export_version
from pipelines.registry.client import connect
from pipelines.registry.models import roll_back
from pipelines.settings import OutputConfig
from pipelines.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = Config.from_dict({
    "data": {"data": "digits", "tasks": 5, "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 2},
    "features": {"views": 2, "augment": "crop", "shard_rows": 200},
    "hypernet": {"fresh_columns": 4, "dictionary": 3, "dictionary_after": 2},
    "train": {"epochs": 3}, "compute": {"threads": 1, "workers": 2}})
"""The first task trains the base, two have columns of their own, and two use the dictionary."""


@pytest.fixture
def learned(service, storage, tmp_path, monkeypatch, ray_cluster):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"{storage.uri}?endpoint={service.endpoint}&region={service.region}"
    output = OutputConfig("digits", uri, f"sqlite:///{tmp_path}/mlflow.db",
                          str(tmp_path / "result.json"))
    train(CONFIG, output, lambda _: None)
    return output


def test_a_dictionary_on_workers_over_s3_in_mlflow_in_a_file_and_rolled_back(
        learned, storage, tmp_path):
    import mlflow.pyfunc
    import pandas as pd

    result = json.loads(Path(learned.result).read_text())
    alone = run_stream(CONFIG, tmp_path / "alone").fields
    assert result["weights_hash"] == alone["weights_hash"], "one process learns the same bits"
    assert not any("dictionary" in note for note in result["notes"])

    registry = connect(storage, learned.tracking_uri)
    champion = registry.holder("digits", "champion")
    predictor, _ = registry.load_predictor(champion.uri)
    generator = predictor.model.strategy.hypernet
    assert [generator.uses_dictionary(task) for task in range(5)] == [False] * 3 + [True] * 2
    images = [digit(9), digit(4)]
    answers = {task: predictor.predict(images, task) for task in predictor.tasks}

    loaded = mlflow.pyfunc.load_model(registry.source_of(champion))
    rows = loaded.predict(pd.DataFrame({"image": images[:1] * 5, "task": predictor.tasks}))
    assert rows["label"].tolist() == [answers[task].labels[0] for task in predictor.tasks]

    file = tmp_path / "last.pt2"
    export_version(champion.uri, "4", str(file), "torch", storage=learned.storage,
                   tracking_uri=learned.tracking_uri)
    network = torch.export.load(file).module()
    pixels_BCHW = predictor.decode(images, ["nine", "four"]).images_BCHW.float() / 255
    found_BK = network(pixels_BCHW).softmax(1).detach().numpy()
    np.testing.assert_allclose(found_BK, answers["4"].probabilities_BK, atol=1e-3)

    roll_back(registry, "digits", "3", "as before the dictionary was used")
    earlier, version = registry.load_predictor("models:/digits@champion")
    assert (version.version, earlier.tasks) == (3, ["0", "1", "2"])
    for task in earlier.tasks:  # what uses the dictionary has changed nothing before it
        np.testing.assert_array_equal(earlier.predict(images, task).probabilities_BK,
                                      answers[task].probabilities_BK)


def digit(label):
    """An encoded image of a digit."""
    digits = load_digits()
    sink = io.BytesIO()
    Image.fromarray((digits.images[digits.target == label][0] * 15.9).astype(np.uint8)
                    ).save(sink, "PNG")
    return sink.getvalue()
