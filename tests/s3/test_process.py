"""The main job in one process over S3: states are kept there, and a run that broke off goes on."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.config import Config
from partialhn.run import run_stream
from pipelines.execution import worker
from pipelines.execution.local import ProcessHost
from pipelines.platform import cluster
from pipelines.registry.client import connect
from pipelines.retrain.run import retrain
from pipelines.settings import OutputConfig, RetrainConfig
from pipelines.train import train
from pipelines.upkeep.prune_versions import choose, prune

CONFIG = {
    "data": {"data": "digits", "tasks": 2, "task_sizes": [2, 2], "classes": 4, "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 1},
    "features": {"views": 2, "augment": "crop", "shard_rows": 200},
    "hypernet": {"fresh_columns": 4}, "train": {"epochs": 3}}


def arrive(storage, task, labels):
    """Puts a task of two digits into the inbox; returns one of its images."""
    digits = load_digits()
    for split, rows in (("train", slice(0, 40)), ("test", slice(40, 60))):
        images = []
        for label in labels:
            for pixels in digits.images[digits.target == label][rows]:
                sink = io.BytesIO()
                Image.fromarray((pixels * 15).astype(np.uint8)).save(sink, "PNG")
                images.append({"image": {"bytes": sink.getvalue(), "path": ""}, "label": label})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(images), sink)
        storage.put_if_absent(storage.path("inbox", task, f"{split}.parquet"), sink.getvalue())
    storage.put_if_absent(storage.path("inbox", task, "_READY"), b"")
    return images[0]["image"]["bytes"]


class BrokenOffError(Exception):
    """What stands for a killed process here."""


def test_a_run_over_s3_goes_on_in_the_middle_of_a_task(service, storage, empty_registry, tmp_path,
                                                       monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cluster, "_is_started", lambda: False)
    monkeypatch.setattr(worker, "SECONDS", 0.0)
    empty_registry(tmp_path / "registry")
    config = Config.from_dict(CONFIG | {"compute": {"threads": 1, "cache": str(tmp_path / "c")}})
    uri = f"{storage.uri}?endpoint={service.endpoint}&region={service.region}"
    output = OutputConfig("digits", uri, f"sqlite:///{tmp_path}/registry/mlflow.db",
                          str(tmp_path / "result.json"))
    sent, send = [], ProcessHost.send

    def sends(self, strategy, record):
        sent.append((record.task_index, getattr(record, "epoch", "end")))
        send(self, strategy, record)
        if sent == [(0, 1), (0, 2), (0, 3), (0, "end"), (1, 1), (1, 2)]:
            raise BrokenOffError

    monkeypatch.setattr(ProcessHost, "send", sends)
    with pytest.raises(BrokenOffError):
        train(config, output, lambda _: None)
    sent.clear()
    train(config, output, lambda _: None)
    assert sent == [(0, "end"), (1, 3), (1, "end")]
    result = json.loads(Path(output.result).read_text())
    fields = run_stream(config, tmp_path / "oracle").fields
    assert result["weights_hash"] == fields["weights_hash"]
    assert [row["task"] for row in result["versions"]] == ["0", "1"]
    assert storage.folders(storage.path("runs", "digits")) == ("learned",)
    assert list((tmp_path / "c").iterdir()), "features are read through the cache"


def test_versions_share_tensors_and_what_is_left_of_a_prune_is_loaded_by_mlflow(
        service, storage, empty_registry, tmp_path, monkeypatch):
    """A prune leaves the champion and the one before it; MLflow alone loads the champion."""
    import mlflow.pyfunc
    import pandas as pd

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cluster, "_is_started", lambda: False)
    empty_registry(tmp_path / "registry")
    config = Config.from_dict(CONFIG | {
        "train": {"epochs": 1}, "compute": {"threads": 1, "cache": str(tmp_path / "c")}})
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()))
    (tmp_path / "policy.yaml").write_text("min_above_chance: null\nmax_p_value: null\n")
    settings = RetrainConfig(
        "digits", f"{storage.uri}?endpoint={service.endpoint}&region={service.region}",
        f"sqlite:///{tmp_path}/registry/mlflow.db", str(tmp_path / "policy.yaml"),
        str(tmp_path / "config.yaml"))
    for tasks in (range(3), range(3, 4)):
        for task in tasks:
            image = arrive(storage, f"t{task}", (2 * task, 2 * task + 1))
        assert len(retrain(settings).learned) == len(tasks)
    registry = connect(storage, settings.tracking_uri)
    place = registry.shared_place(registry.versions("digits")[0])
    before = len(list(storage.list(f"{place}/objects")))
    chosen = choose(registry, storage, "digits", 1, keep_aliases=False)
    assert [version.version for version in chosen] == [1, 2]
    list(prune(registry, storage, "digits", chosen))
    assert len(list(storage.list(f"{place}/objects"))) < before
    champion = registry.holder("digits", "champion")
    for version in registry.versions("digits"):
        registry.require_sound(version)
    expected = registry.load_predictor(champion.uri)[0].predict([image], "t3")
    loaded = mlflow.pyfunc.load_model(registry.source_of(champion))
    rows = loaded.predict(pd.DataFrame({"image": [image], "task": ["t3"]}))
    assert rows["label"].tolist() == expected.labels

