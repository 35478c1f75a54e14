"""A search on real digits, from the command line to the advice, the registry and `train`."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from pipelines.cli.main import run
from pipelines.platform import cluster
from pipelines.platform.storage import open_storage
from pipelines.search.state import SearchState

pytestmark = pytest.mark.slow

STREAM = ("--data", "digits", "--tasks", "3", "--input-size", "16", "--trunk-epochs", "1",
          "--trunk-batch-size", "32", "--augment", "crop", "--shard-rows", "500", "--epochs", "2",
          "--fresh-columns", "4", "--batch-size", "32", "--threads", "1")
SEARCH = ("--depths", "3", "4", "--budget", "4-trials", "--seeds", "1", "--name", "digits",
          "--algorithm", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ray_cluster):
    """What a search of four trials left."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.yaml").write_text("train.epochs: {choice: [1, 2]}\nhypernet.norm: batch\n",
                                       encoding="utf-8")
    assert run(["tune", *STREAM, *SEARCH, *places(folder), "--price-gpu-hour", "2",
                "--price-gib-month", "0.02"]) == 0
    return folder


def places(folder):
    return ("--storage", str(folder / "store"), "--output", str(folder / "advice"), "--space",
            str(folder / "space.yaml"))


def records(folder):
    return SearchState(open_storage(str(folder / "store")), "digits").records()


def children(folder):
    """The parent run, and its children by trial."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    parents = [each for each in runs if each.data.tags["kind"] == "search"]
    assert len(parents) == 1
    mine = [each for each in runs if each.data.tags.get("mlflow.parentRunId")
            == parents[0].info.run_id]
    assert len(mine) == len(runs) - 1 == len({each.data.tags["trial"] for each in mine})
    return parents[0], {each.data.tags["trial"]: each for each in mine}, client


def test_the_advice_is_there(folder):
    advice = json.loads((folder / "advice" / "advice.json").read_text())
    assert [each["depth"] for each in advice["depths"]] == [3, 4]
    chosen = advice["recommendation"]
    assert chosen["reason"].startswith("Freezing ")
    assert all(each["separate_heads"] and each["test_accuracy"] for each in advice["depths"])
    assert len(advice["money"]["rows"]) == 3
    assert advice["fixed"] == {"hypernet.norm": "batch"}
    page = (folder / "advice" / "advice.html").read_text(encoding="utf-8")
    assert chosen["reason"].split(",")[0] in page


def test_every_trial_is_a_record_once(folder):
    found = records(folder)
    search = [each for each in found if each.plan.kind == "search"]
    assert sorted(each.plan.id for each in search) == ["0000", "0001", "0002", "0003"]
    assert {each.plan.depth for each in search} == {3, 4}
    finals = [each for each in found if each.plan.kind != "search"]
    assert len(finals) == 4
    assert all(each.finished and each.measured.test_row for each in finals)
    assert not any(each.measured.test_row or each.measured.right for each in search)
    images = json.loads((folder / "advice" / "advice.json").read_text())["held_out_images"]
    for each in finals:
        right = [float(answers.mean()) for answers in each.measured.answers(images)]
        assert right == pytest.approx(each.measured.rows[-1]), "the answers are those measured"
    assert not list((folder / "store" / "searches" / "digits" / "running").iterdir())


def test_the_registry_has_a_child_for_each_trial(folder):
    parent, found, client = children(folder)
    by_id = {each.plan.id: each for each in records(folder)}
    assert set(found) == set(by_id)
    for trial, child in found.items():
        wanted = {"finished": "FINISHED", "pruned": "KILLED"}[by_id[trial].status]
        assert child.info.status == wanted
        measured = by_id[trial].measured
        assert child.data.metrics["accuracy"] == pytest.approx(measured.accuracy)
        history = client.get_metric_history(child.info.run_id, "accuracy")
        assert [point.step for point in history] == list(range(len(measured.rows)))
        assert child.data.params["backbone.freeze_depth"] == str(by_id[trial].plan.depth)
    assert parent.info.status == "FINISHED"
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"advice.json", "advice.html", "depth-3.yaml", "depth-4.yaml"} <= names


def test_train_takes_the_recommended_configuration(folder, command):
    """The artifact as MLflow gives it back; its features are found, no image is decoded."""
    from mlflow.artifacts import download_artifacts

    parent, _, client = children(folder)
    path = download_artifacts(run_id=parent.info.run_id, artifact_path="depth-4.yaml",
                              dst_path=str(folder / "down"), tracking_uri=client.tracking_uri)
    code, out, err = command("train", "--config", path, "--name", "chosen", "--storage",
                             folder / "store", "--result", folder / "result.json")
    assert code == 0, err
    assert "found, 0 images decoded" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["config"] == yaml.safe_load(Path(path).read_text())


def test_resumed_it_runs_nothing_twice_and_goes_on_with_a_larger_budget(folder, command):
    before = records(folder)
    same = (*places(folder)[:4], "--threads", "1")
    code, out, err = command("tune", "--resume", "digits", *same)
    assert code == 0, err
    assert records(folder) == before
    assert "8 trials of earlier sessions are kept" in out
    code, out, err = command("tune", "--resume", "digits", "--budget", "5-trials", *same)
    assert code == 0, err
    after = records(folder)
    assert after[:8] == before
    assert [each.plan.id for each in after if each.plan.kind == "search"][4:] == ["0004"]
    assert set(children(folder)[1]) == {each.plan.id for each in after}


def test_a_forecast_alone_runs_no_trial(folder, command, tmp_path):
    code, out, err = command("tune", *STREAM, "--forecast-only", "--name", "other", "--depths",
                             "3", "4", "--storage", folder / "store")
    assert code == 0, err
    assert out.count("above chance") == 2
    assert not (folder / "store" / "searches" / "other" / "trials").exists()


@pytest.mark.slow
def test_depths_around_the_best_block_are_added(folder, command, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("defaults: false\nbackbone.freeze_depth: {refine: [layer4.0]}\n")
    code, out, err = command(
        "tune", *STREAM, "--backbone", "partialhn:slim_resnet18", "--epochs", "1", "--budget",
        "3-trials", "--seeds", "1", "--name", "blocks", "--algorithm", "random", "--space", space,
        "--storage", folder / "store", "--output", tmp_path / "advice")
    assert code == 0, err
    assert "freeze depths 8, then depths around the best of them" in out
    assert ("depth 8 is the best so far; next, around it: depth 4 (freezing through layer2.0), "
            "depth 9 (freezing everything but the classifier)") in out
    state = SearchState(open_storage(str(folder / "store")), "blocks")
    depths = {each.plan.id: each.plan.depth for each in state.records()}
    assert [depths[trial] for trial in ("0000", "0001", "0002")] == [8, 4, 9]
    advice = json.loads((tmp_path / "advice" / "advice.json").read_text())
    assert [each["freeze"] for each in advice["depths"]] == [
        "through layer2.0", "through layer4.0", "everything but the classifier"]
    assert all(each["separate_heads"] and each["ridge"] for each in advice["depths"])
    assert [each["depth"] for each in advice["forecast"]["stages"]] == [4, 8, 9]


@pytest.mark.parametrize(("options", "parts"), [
    (("--cpus-per-trial", "64"), ["a trial needs 64 CPU", "node 1: 2 CPU"]),
    (("--gpus-per-trial", "1"), ["1 GPU", "no node has that"]),
    (("--workers", "2"), ["workers is 2", "one process"]),
    (("--validation", "0"), ["validation is 0", "held-out"]),
    (("--depths", "9"), ["freeze_depth is 9"]),
    (("--budget", "1-trial"), ["budget is '1-trial' for 2 grid points"]),
    (("--epochs", "7"), ["exists with another configuration", "--resume digits"]),
    (("--stream-seed", "3"), ["other images"]),
    (("--algorithm", "tpe"), ["algorithm is 'tpe'", "random"]),
    (("--resume", "nothing"), ["no search 'nothing'"]),
    (("--strategy", "naive"), ["strategy is 'naive'"])])
def test_what_cannot_be_is_refused(folder, command, options, parts):
    known = () if options[0] != "--budget" else ("--name", "short")
    code, _, err = command("tune", *STREAM, *SEARCH, *places(folder), *known, *options)
    assert code == 2, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_trials_that_share_a_process_measure_what_those_of_ray_do(folder, tmp_path, monkeypatch,
                                                                 capsys):
    """A whole search in threads, as on a machine with a GPU; here they calculate on the CPU."""
    monkeypatch.setattr(cluster, "GPU", "cpu")
    monkeypatch.setattr("pipelines.tune.run._Search._threads_here", lambda _: 3)
    words = [word if word != "digits" or place == 1 else "threads"
             for place, word in enumerate((*STREAM, *SEARCH))]
    assert run(["tune", *words, "--early-stopping", "none", "--storage", str(folder / "store"),
                "--output", str(tmp_path / "advice"), "--space", str(folder / "space.yaml")]) == 0
    assert "trials: 3 at once share this process and its GPU" in capsys.readouterr().out
    by_ray = {each.plan.id: each for each in records(folder)}
    in_threads = SearchState(open_storage(str(folder / "store")), "threads").records()
    search = [each for each in in_threads if each.plan.kind == "search"]
    assert sorted(each.plan.id for each in search) == ["0000", "0001", "0002", "0003"]
    for each in search:
        other = by_ray[each.plan.id]
        assert each.plan.config == other.plan.config
        assert each.finished
        shown = len(other.measured.rows)  # ASHA may have stopped it there
        assert each.measured.rows[:shown] == other.measured.rows
    finals = [each for each in in_threads if each.plan.kind != "search"]
    assert len(finals) == 4
    assert all(each.finished and each.measured.test_row for each in finals)
    chosen = json.loads((tmp_path / "advice" / "advice.json").read_text())["recommendation"]
    assert chosen["reason"].startswith("Freezing ")
