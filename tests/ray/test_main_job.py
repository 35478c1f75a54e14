"""The main job on a real local Ray and MLflow, held against `partialhn.run` without either."""

import json
import math
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.torch
import torch

from partialhn.errors import InputError
from partialhn.predict import Predictor
from partialhn.run import run_stream
from pipelines.execution.on_ray import RayExecution
from pipelines.label_images import predict_to_parquet
from pipelines.platform.progress import Progress
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from tests.processes import script


@pytest.fixture(scope="module")
def oracle(small, tmp_path_factory):
    """Model and result of the same stream without Ray."""
    return run_stream(small, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def registry(learned):
    return connect(open_storage(learned.output.storage))


def epoch_numbers(result, keys=("loss", "cross_entropy", "regulariser", "accuracy",
                                "validation_accuracy")):
    return [[epoch[key] for key in keys] for epoch in result["epochs"]]


# One worker, and no Ray ----------------------------------------------------------------------


def test_same_numbers_as_without_ray(learned, oracle):
    model, fields = oracle.model, oracle.fields
    assert learned.result["accuracy_matrix"] == fields["accuracy_matrix"]
    np.testing.assert_allclose(epoch_numbers(learned.result), epoch_numbers(fields), atol=1e-6,
                               rtol=0)
    assert learned.result["feature_keys"] == fields["feature_keys"]
    assert learned.result["weights_hash"] == fields["weights_hash"] == model.weights_hash()


def test_a_version_for_each_task(learned, registry):
    versions = registry.versions("digits")
    assert [(v.version, v.task) for v in versions] == [(1, "0"), (2, "1"), (3, "2")]
    assert [v.aliases for v in versions] == [("task-0",), ("task-1",), ("champion", "task-2")]
    assert [v.fields() for v in versions] == learned.result["versions"]
    assert versions[-1].tags["weights_hash"] == learned.result["weights_hash"]


def test_a_run_for_each_task_below_one_for_the_stream(learned):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=learned.result["tracking_uri"])
    experiment = client.get_experiment_by_name("digits")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["kind"] == "stream"]
    children = [run for run in runs if run.data.tags["kind"] == "task"]
    assert len(parents) == 1
    assert len(children) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in children:
        losses = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in losses) == [1, 2, 3]
    files = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert files >= {"result.json", "report.html", "config.json", "accuracy_matrix.json",
                     "accuracy_matrix.csv"}


def test_the_result_says_everything(learned):
    result = json.loads(Path(learned.output.result).read_text())
    assert result == learned.result
    for key in ("acc", "learning_accuracy", "forgetting", "bwt"):
        assert math.isfinite(result[key])
    matrix = result["accuracy_matrix"]
    assert [[value is None for value in row] for row in matrix] == [
        [j > i for j in range(3)] for i in range(3)]
    assert result["acc"] == pytest.approx(sum(matrix[-1]) / 3)
    assert [row.keys() for row in result["seconds"]["per_task"]] == [
        {"name", "train", "evaluate", "register"}] * 3
    assert result["seconds"]["stages"].keys() >= {"data", "startup", "trunk", "features", "train",
                                                  "register"}
    for key in ("feature_bytes", "peak_rss_bytes", "checkpoint_bytes", "bytes_per_task",
                "trunk_bytes", "shared_bytes"):
        assert result[key] > 0, key
    features = Path(learned.output.storage) / "features"
    stored = sum(file.stat().st_size for file in features.rglob("*.arrow"))
    assert result["feature_bytes"] == pytest.approx(stored, rel=0.1)
    images = [row[f"{part}_images"] for row in result["tasks"]
              for part in ("train", "validation", "test")]
    assert result["images_decoded"] == sum(images) == 1797
    assert result["model_uri"] == "models:/digits@champion"
    assert result["config"] == learned.config.to_dict()
    assert result["seed"] == learned.config.train.seed
    labels = [label for row in result["tasks"] for label in row["classes"]]
    assert sorted(labels) == list("0123456789")


def test_progress_is_visible(learned):
    text = "\n".join(learned.lines)
    for part in ("trunk  epoch 2/2", "features: ", "task 1 '0' learned", "task 3 '2' learned",
                 "registered models:/digits/3"):
        assert part in text


# Predictions ---------------------------------------------------------------------------------


def test_an_early_task_asked_of_the_champion(learned, oracle, digit_folder, tmp_path):
    folder = digit_folder(tmp_path / "images", classes=3, train=4, test=1)
    done = predict_to_parquet("models:/digits@champion", "0", str(folder),
                              str(tmp_path / "preds.parquet"), learned.output.storage)
    table = pq.read_table(done.output)
    assert done.images == table.num_rows == 15
    assert done.model_uri == "models:/digits/3"
    wanted = Predictor(oracle.model).predict(
        [(folder / name).read_bytes() for name in table["id"].to_pylist()], "0")
    assert table["label"].to_pylist() == list(wanted.labels)
    assert set(wanted.labels) <= set(learned.result["tasks"][0]["classes"])
    np.testing.assert_allclose(table["probabilities"].to_pylist(), wanted.probabilities_BK,
                               atol=1e-6)


# Bad images, and two workers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(digit_folder, tmp_path_factory):
    """Four classes as two tasks; one training image of each task is cut short."""
    folder = digit_folder(tmp_path_factory.mktemp("damaged") / "images", classes=4)
    for label in range(4):
        image = folder / "train" / f"digit-{label}" / "005.png"
        if label in (0, 3):
            image.write_bytes(image.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def two_workers(damaged, small, changed, run_main_job, outputs, tmp_path_factory):
    """Two workers learn what can be read of the damaged images; every sample normed alone."""
    config = changed(small, data={"data": str(damaged), "tasks": 2, "on_bad_image": "skip"},
                     hypernet={"norm": "group", "norm_groups": 4}, train={"batch_size": 16},
                     compute={"workers": 2, "share": "batches"})
    return run_main_job(config, outputs(tmp_path_factory.mktemp("two"), "two"))


def test_a_bad_image_stops_the_run_and_is_named(damaged, small, changed, run_main_job, outputs,
                                                tmp_path):
    config = changed(small, data={"data": str(damaged), "tasks": 2})
    with pytest.raises(InputError, match=r"train/digit-[03]/005\.png"):
        run_main_job(config, outputs(tmp_path, "damaged"))


def test_a_bad_image_in_a_later_task_is_named(digit_folder, small, changed, run_main_job, outputs,
                                              tmp_path):
    """The trunk, trained on the first task, has not seen it: Ray Data does."""
    for task in ("one", "two"):
        digit_folder(tmp_path / "tasks" / task, classes=2)
    bad = tmp_path / "tasks" / "two" / "test" / "digit-1" / "025.png"
    bad.write_bytes(b"no image")
    config = changed(small, data={"data": str(tmp_path / "tasks"), "tasks": None},
                     backbone={"trunk_epochs": 1})
    with pytest.raises(InputError, match=r"two/test/digit-1/025\.png"):
        run_main_job(config, outputs(tmp_path, "later"))


def test_bad_images_are_left_out_and_listed(two_workers):
    listed = [bad for row in two_workers.result["tasks"] for bad in row["bad_images"]]
    assert sorted(bad["id"].rpartition("images/")[2] for bad in listed) == [
        "train/digit-0/005.png", "train/digit-3/005.png"]
    assert all(bad["reason"] for bad in listed)
    kept = sum(row[f"{part}_images"] for row in two_workers.result["tasks"]
               for part in ("train", "validation", "test"))
    assert kept == 4 * 32 - 2
    assert sum("left out" in line for line in two_workers.lines) == 2


def test_two_workers_learn_tasks_of_their_own_to_the_same_bits(learned, changed, run_main_job,
                                                               outputs):
    """One trunk and one set of features, from the run of one worker; models of its own. The
    second worker learns the bound.
    """
    config = changed(learned.config, compute={"workers": 2}, train={"compare": ("naive",)})
    root = Path(learned.output.storage).parent
    shared = run_main_job(config, outputs(root, "shared"))
    assert shared.result["images_decoded"] == 0
    for key in ("weights_hash", "accuracy_matrix", "without_task_id"):
        assert shared.result[key] == learned.result[key], key
    losses = [[(row["task"], row["epoch"], row["loss"]) for row in each["epochs"]]
              for each in (shared.result, learned.result)]
    assert losses[0] == losses[1]
    assert [row["task"] for row in shared.result["versions"]] == ["0", "1", "2"]
    ended = [line for line in shared.lines if " learned in " in line]
    assert [line.split(" ")[1] for line in ended if line.startswith("task")] == [
        "1", "2", "3"], "put together in order"
    assert [line.split(" ")[0] for line in ended].count("naive") == 3
    assert shared.result["bounds"]["naive"]["acc"] > 0.4
    (run,) = (path for path in (root / "store" / "runs" / "shared").iterdir()
              if path.name != "learned")
    assert [path.name for path in run.rglob("*.json")] == ["naive.json"], "nothing else is left"


def test_what_stops_one_worker_stops_all(learned, changed, run_main_job, outputs):
    """Raised in one worker, a loss that is not finite surfaces as the user's to mend."""
    config = changed(learned.config, compute={"workers": 2}, train={"learning_rate": 1e30})
    with pytest.raises(InputError, match=r"the loss of task '0' became nan .*learning_rate than "
                                         r"1e\+30"):
        run_main_job(config, outputs(Path(learned.output.storage).parent, "diverging"))


def test_an_interrupt_does_not_wait_for_the_workers(ray_cluster, small, tmp_path, monkeypatch):
    ended = threading.Event()

    def fit(_, assignment, events):
        ray.get(events.add.remote("partial_hn", "an epoch"))
        ended.wait(60)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RayExecution, "_fit", fit)
    execution = RayExecution(small, open_storage(str(tmp_path)), "s", Progress(small, interrupt))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execution._learn(None, lambda *_: None)
    assert time.monotonic() - begun < 30
    ended.set()


def test_two_workers_learn_what_one_learns(two_workers, tmp_path):
    """Equal but for the rounding of the gradients' mean, which grows from step to step."""
    fields = run_stream(two_workers.config, tmp_path).fields
    keys = ("loss", "cross_entropy", "regulariser")
    ours, wanted = (epoch_numbers(result, keys) for result in (two_workers.result, fields))
    np.testing.assert_allclose(ours[0], wanted[0], atol=1e-4)
    np.testing.assert_allclose(ours, wanted, atol=0.02)
    assert two_workers.result["accuracy_matrix"][0][0] == pytest.approx(
        fields["accuracy_matrix"][0][0], abs=0.1)


def test_two_workers_have_the_gradient_of_one(tmp_path):
    """The first step of the second task: the mean of both workers' gradients."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(__file__).with_name("first_gradient.py")
    ranks = [(0, 1), (0, 2), (1, 2)]
    running = [script(path, rank, world, port, tmp_path / f"{rank}-of-{world}", cwd=tmp_path)
               for rank, world in ranks]
    ends = [process.wait(300) for process in running]
    assert [ended.returncode for ended in ends] == [0, 0, 0], ends
    alone, first, second = (
        safetensors.torch.load_file(tmp_path / f"{rank}-of-{world}" / "gradient.safetensors")
        for rank, world in ranks)
    assert sum(bool(value.abs().max() > 0) for value in alone.values()) > 5
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(first[name], value, atol=1e-6 * scale, rtol=0, msg=name)
        torch.testing.assert_close(second[name], first[name], atol=0, rtol=0, msg=name)
