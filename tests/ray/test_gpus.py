"""Training and a search on GPUs that Ray counts and this process does not have."""

import json

import pytest

from pipelines.cli.main import run
from pipelines.platform.storage import open_storage
from pipelines.search.state import SearchState

pytestmark = pytest.mark.slow

STREAM = ("--data", "digits", "--tasks", "3", "--input-size", "16", "--trunk-epochs", "1",
          "--trunk-batch-size", "32", "--augment", "crop", "--shard-rows", "500", "--epochs", "2",
          "--batch-size", "32", "--threads", "1", "--device", "gpu")


def test_one_worker_learns_with_the_gpu(logical_gpus, tmp_path):
    assert run(["train", *STREAM, "--storage", str(tmp_path / "store"), "--result",
                str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["acc"] > 0.7


def test_trials_share_a_gpu_and_one_without_memory_ends_alone(logical_gpus, tmp_path, capsys):
    """A third of the trials asks for more columns than the system gives memory for."""
    space = tmp_path / "space.yaml"
    space.write_text("defaults: false\nbackbone.freeze_depth: {grid: [3, 4]}\n"
                     "hypernet.fresh_columns: {choice: [4, 8, 1000000000]}\n")
    assert run(["tune", *STREAM, "--budget", "12-trials", "--seeds", "1", "--name", "shared",
                "--algorithm", "random", "--early-stopping", "none", "--space", str(space),
                "--cpus-per-trial", "0.25", "--storage", str(tmp_path / "store"), "--output",
                str(tmp_path / "advice")]) == 0
    assert "trials: 4 at once (nodes have room for 0 + 4), each with 0.25 CPU, 0.25 GPU" in (
        capsys.readouterr().out)
    records = SearchState(open_storage(str(tmp_path / "store")), "shared").records()
    search = [record for record in records if record.plan.kind == "search"]
    failed = [record for record in search if record.status == "failed"]
    assert len(search) == 12
    assert {record.plan.config["hypernet"]["fresh_columns"] for record in failed} == {10**9}
    assert all("tried to allocate" in record.reason for record in failed)
    assert sum(record.finished for record in search) == 12 - len(failed) > 4


@pytest.mark.parametrize(("words", "part"), [
    (("train", "--workers", "2"), "workers is 2 with one GPU and one CPU each"),
    (("train", "--feature-workers", "2"), "feature_workers is 2 with one GPU"),
    (("tune", "--depths", "3", "4", "--gpus-per-trial", "2"), "allowed: 0 to 1, since a trial"),
    (("tune", "--depths", "3", "4", "--gpus-per-trial", "0"), "a trial gets no share of one")])
def test_more_than_there_is_is_refused(logical_gpus, tmp_path, command, words, part):
    code, _, err = command(*words, *STREAM, "--storage", tmp_path / "store")
    assert code == 2, err
    assert part in " ".join(err.replace("\u2502", " ").split())
