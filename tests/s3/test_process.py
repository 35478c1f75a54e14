"""The main job in one process over S3: states are kept there, and a run that broke off goes on."""

import json
from pathlib import Path

import pytest

from partialhn.config import Config
from partialhn.run import run_stream
from pipelines.execution import worker
from pipelines.execution.local import ProcessHost
from pipelines.platform import cluster
from pipelines.settings import OutputConfig
from pipelines.train import train

CONFIG = {
    "data": {"data": "digits", "tasks": 2, "task_sizes": [2, 2], "classes": 4, "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 1},
    "features": {"views": 2, "augment": "crop", "shard_rows": 200},
    "hypernet": {"fresh_columns": 4}, "train": {"epochs": 3}}


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
