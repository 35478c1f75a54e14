"""Features on S3 are computed once: later runs and a search over the same data decode no image."""

import json

import pytest

from pipelines.cli.main import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STREAM = ("--data", "digits", "--tasks", "2", "--task-sizes", "2", "2", "--classes", "4",
          "--input-size", "16", "--trunk-epochs", "1", "--trunk-batch-size", "32", "--augment",
          "crop", "--shard-rows", "200", "--fresh-columns", "4", "--batch-size", "32", "--threads",
          "1")


def test_a_second_run_and_a_search_decode_no_image(storage, service, tmp_path, capsys, ray_cluster,
                                                   monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"{storage.uri}?endpoint={service.endpoint}&region={service.region}"
    common = ("--storage", uri, "--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}",
              "--cache", str(tmp_path / "cache"))

    def train(name, *words):
        assert run(["train", *STREAM, *common, "--name", name, "--result",
                    str(tmp_path / "result.json"), *words]) == 0
        return (json.loads((tmp_path / "result.json").read_text())["images_decoded"],
                capsys.readouterr().out)

    def stored():
        return {entry.path: (entry.size, entry.modified, entry.etag)
                for entry in storage.list(storage.path("features"))}

    decoded, out = train("first", "--freeze-depth", "3", "--epochs", "1")
    assert decoded > 500
    assert f"({decoded} images decoded)" in out
    assert "cheaper after" in out, "what features will cost is said before they are computed"
    assert train("deeper", "--freeze-depth", "4", "--epochs", "1")[0] == decoded
    before = stored()
    again, out = train("second", "--freeze-depth", "3", "--epochs", "2")
    assert again == 0
    assert "(found, 0 images decoded)" in out
    assert "cheaper after" not in out
    assert run(["tune", *STREAM, *common, "--name", "search", "--depths", "3", "4", "--budget",
                "2-trials", "--seeds", "1", "--algorithm", "random", "--epochs", "1", "--output",
                str(tmp_path / "advice")]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("features: ")]
    assert lines
    assert all("(found, 0 images decoded)" in line for line in lines)
    assert stored() == before, "nothing was written again"
    assert not list(storage.list(storage.path("in-use"))), "nothing is in use any more"
