"""The registry against a real MLflow on SQLite, with a small real checkpoint."""

import base64
import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from partialhn.checkpoints.model import Model, TaskInfo, empty_parts
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.predict import Predictor
from pipelines.label_images import predict_to_parquet
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Registry, connect
from pipelines.registry.package import Contents
from pipelines.registry.runs import MAX_PARAM
from pipelines.registry.versions import Registration, task_alias
from pipelines.show import show

TASKS = (TaskInfo("animals", ("cat", "dog")), TaskInfo("more things", ("cup", "hat", "key")))
WORK = "0123456789ab"
MATRIX = [[0.9, None], [0.8, 0.95]]
EPOCHS = [{"task": "animals", "task_index": 0, "epoch": e, "loss": 1 / e, "cross_entropy": 0.5,
           "regulariser": 0.0, "accuracy": 0.8, "validation_accuracy": None, "seconds": 0.1}
          for e in (1, 2, 3)]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def photo(number: int) -> bytes:
    pixels_HWC = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels_HWC).save(encoded, "PNG")
    return encoded.getvalue()


def small_model(tasks: int) -> Model:
    config = Config()
    trunk, strategy = empty_parts(config)
    for index, task in enumerate(TASKS[:tasks]):
        strategy.add_task(len(task.classes))
        strategy.finish(index)
    return Model(config, trunk.eval(), strategy.requires_grad_(False).eval(), TASKS[:tasks])


def registration(index: int, weights_hash: str, work: str = WORK) -> Registration:
    return Registration(stream="demo-1", work=work, task=TASKS[index].name, task_index=index,
                        classes=TASKS[index].classes, trunk_fingerprint="f" * 64,
                        feature_keys=(f"key{index}", "shared"), weights_hash=weights_hash,
                        acc=0.9, learning_accuracy=0.925, forgetting=0.05 * index,
                        storage="/data/store", prefix=f"{work}-{index}-{weights_hash}",
                        parent=(f"{work}-{index - 1}-{small_model(index).weights_hash()}"
                                if index else ""))


class Stream:
    """A stream of two tasks, registered, that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root / "store")
        self.registry = connect(open_storage(self.uri))
        self.runs = [self.registry.stream_run("demo-1", WORK, {"data": {"data": "digits"}})]
        self.versions = [self.register(index) for index in range(2)]

    def register(self, index: int):
        folder = self.root / f"checkpoint-{index}"
        model = small_model(index + 1)
        model.save(folder)
        record = registration(index, model.weights_hash())
        run_id = self.registry.task_run(self.runs[0], record.task, index, record.prefix)
        if run_id not in self.runs:
            self.runs.append(run_id)
        return self.registry.register_task(run_id, record,
                                           Contents(folder, record.task, photo(index)))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    environment = pytest.MonkeyPatch()
    environment.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield Stream(tmp_path_factory.mktemp("registry"))
    environment.undo()


@pytest.fixture
def client(stream):
    return mlflow.MlflowClient(tracking_uri=stream.registry.tracking_uri)


def test_default_database_and_artifacts_are_in_the_storage(stream, client):
    assert stream.registry.tracking_uri == f"sqlite:///{stream.root}/store/mlflow.db"
    run = client.get_run(stream.runs[0])
    assert run.info.artifact_uri.startswith(f"{stream.root}/store/mlartifacts/demo-1/")


def test_one_version_a_task_with_tags_and_aliases(stream):
    first, second = stream.registry.versions("demo-1")
    assert (first.version, first.aliases) == (1, ("task-animals",))
    assert (second.version, set(second.aliases)) == (2, {"champion", task_alias("more things")})
    assert first.fields() == {"task": "animals", "version": 1, "uri": "models:/demo-1/1",
                              "run_id": stream.runs[1], "aliases": ["task-animals"]}
    tags = second.tags
    assert json.loads(tags["classes"]) == ["cup", "hat", "key"]
    assert json.loads(tags["feature_keys"]) == ["key1", "shared"]
    assert {"stream": "demo-1", "task": "more things", "task_index": "1", "work": WORK,
            "trunk_fingerprint": "f" * 64, "acc": "0.9", "learning_accuracy": "0.925",
            "forgetting": "0.05", "storage": "/data/store"}.items() <= tags.items()


def test_registering_again_changes_nothing(stream):
    runs = list(stream.runs)
    assert stream.registry.stream_run("demo-1", WORK, {"data": {"data": "digits"}}) == runs[0]
    before = stream.registry.versions("demo-1")
    again = [stream.register(index) for index in range(2)]
    assert stream.runs == runs
    assert [v.version for v in again] == [1, 2]
    assert stream.registry.versions("demo-1") == before


def test_aliases_of_a_new_work_and_of_new_weights(tmp_path, stream):
    registry = connect(open_storage(stream.uri))
    folder = stream.root / "checkpoint-0"

    def register(work, index, weights):
        record = Registration(**{**registration(index, weights, work).__dict__, "stream": "moves"})
        run = registry.task_run(registry.stream_run("moves", work, {}), record.task, index,
                                record.prefix)
        return registry.register_task(run, record, Contents(folder, record.task, photo(0)))

    def champion():
        return registry.resolve("models:/moves@champion").version

    assert [register("a", 0, "x").version, champion()] == [1, 1]
    assert [register("a", 1, "x").version, champion()] == [2, 2]
    assert [register("a", 0, "y").version, champion()] == [3, 2], "a later task keeps it"
    assert registry.resolve("models:/moves@task-animals").version == 3
    assert [register("b", 0, "x").version, champion()] == [4, 4], "new work takes it"
    assert [register("a", 1, "x").version, champion()] == [2, 2], "the last to be learned has it"


@pytest.mark.parametrize("task", ["a", "3_dogs", "more things", "v1", "latest", "ü" * 300, "a/b"])
def test_aliases_are_allowed_and_distinct(client, task):
    name = task_alias(task)
    with contextlib.suppress(mlflow.MlflowException):
        client.create_registered_model("aliases")
        client.create_model_version("aliases", source=client.get_model_version_download_uri(
            "demo-1", "1"))
    client.set_registered_model_alias("aliases", name, "1")
    assert name in client.get_registered_model("aliases").aliases
    assert name != task_alias(task + " ")
    assert name != task_alias(task.replace(" ", "-") + "-")


def test_epochs_and_metrics(stream, client):
    run_id = stream.runs[1]
    stream.registry.log_task(run_id, EPOCHS[:2], {})
    stream.registry.log_task(run_id, EPOCHS, {"forgetting": 0.25})  # as after an interruption
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["forgetting"] == 0.25
    assert "validation_accuracy" not in metrics
    stream.registry.log_metrics(stream.runs[0], {"acc": 0.9}, step=1)
    assert client.get_run(stream.runs[0]).data.metrics["acc"] == 0.9


def test_runs_are_parent_and_children(stream, client):
    parent, *children = (client.get_run(run_id) for run_id in stream.runs)
    assert [c.data.tags["mlflow.parentRunId"] for c in children] == [parent.info.run_id] * 2
    assert parent.data.params == {"data.data": "digits"}
    stream.registry.end_run(parent.info.run_id)
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


def test_long_parameters_say_where_the_whole_is(stream, client):
    config = {"data": {"task_transforms": ["blur"] * 2000, "sizes": [1, 2]}}
    for _ in range(2):
        run_id = stream.registry.stream_run("demo-1", "long", config)
    parameters = client.get_run(run_id).data.params
    assert parameters["data.sizes"] == "[1, 2]"
    assert len(parameters["data.task_transforms"]) == MAX_PARAM
    assert parameters["data.task_transforms"].endswith(", whole in config.json")
    path = Path(client.download_artifacts(run_id, "config.json"))
    assert json.loads(path.read_text()) == config


def test_matrix_report_and_result(stream, client, tmp_path):
    run_id, report = stream.runs[0], tmp_path / "report.html"
    report.write_text("<html></html>")
    with pytest.raises(InputError, match="'demo-1' has no result yet"):
        stream.registry.result("demo-1")
    for _ in range(2):
        stream.registry.log_matrix(run_id, MATRIX, [task.name for task in TASKS])
        stream.registry.log_file(run_id, report)
        stream.registry.log_result(run_id, {"name": "demo-1", "accuracy_matrix": MATRIX})
    assert {"accuracy_matrix.csv", "accuracy_matrix.json", "report.html",
            "result.json"} <= {file.path for file in client.list_artifacts(run_id)}
    assert stream.registry.result("demo-1")["accuracy_matrix"] == MATRIX
    table = Path(client.download_artifacts(run_id, "accuracy_matrix.csv")).read_text()
    assert table == "after,animals,more things\nanimals,0.9,\nmore things,0.8,0.95\n"


@pytest.mark.parametrize(("uri", "message"), [
    ("models:/demo-1@nope", r"no alias 'nope'; aliases: champion, task-animals, .* versions: 1, 2"),
    ("models:/demo-1/9", r"no version 9; .*versions: 1, 2"),
    ("models:/other@champion", r"stream is 'other', which is not .* allowed: .*demo-1"),
    ("demo-1", "model is 'demo-1'; allowed: models:/NAME@champion")])
def test_unknown_models(stream, uri, message):
    with pytest.raises(InputError, match=message):
        stream.registry.load_predictor(uri)


def test_no_registry_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="no registry at sqlite:///"):
        connect(open_storage(str(tmp_path / "typo")), create=False)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "sqlite:////proc/x/mlflow.db", "foo://x"])
def test_unusable_tracking_uri(tmp_path, uri):
    with pytest.raises(InputError, match=r"does not answer: .*; allowed: "):
        connect(open_storage(str(tmp_path)), uri)


def test_flag_before_environment_before_default(stream, monkeypatch, tmp_path):
    here, other = stream.registry.tracking_uri, open_storage(str(tmp_path))
    assert connect(other, here).tracking_uri == here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here)
    assert connect(other).tracking_uri == here
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/absent.db")
    assert connect(other, here).tracking_uri == here
    assert list(tmp_path.iterdir()) == []


def expected(index: int, task: str, images: list[bytes]):
    return Predictor.load(Path(f"checkpoint-{index}")).predict(images, task)


def test_predictor_of_a_version(stream, monkeypatch):
    monkeypatch.chdir(stream.root)
    predictor, version = stream.registry.load_predictor("models:/demo-1@champion")
    assert version.version == 2
    assert list(predictor.tasks) == ["animals", "more things"]
    images = [photo(1), photo(2)]
    np.testing.assert_array_equal(predictor.predict(images, "1").probabilities_BK,
                                  expected(1, "more things", images).probabilities_BK)


LOAD = """
import sys, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/demo-1@champion")
assert not any(name.split(".")[0] in ("pipelines", "ray") for name in sys.modules)
print(model.metadata.signature.to_dict())
example = model.input_example
rows = pd.concat([example, example.assign(task="animals"), example.assign(task="1")])
assert list(model.predict(rows[:0]).columns) == ["label", "probability", "classes", "probabilities"]
for row, column, value, said in ((1, "image", b"no image", "image number 1 is no readable"),
                                 (2, "task", None, "the task of image number 2 is"),
                                 (2, "task", "7", "task is '7'; allowed: animals, more things")):
    bad = rows.reset_index(drop=True)
    bad.at[row, column] = value
    try:
        model.predict(bad)
    except mlflow.exceptions.MlflowException as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
model.predict(rows).to_json(sys.argv[2], orient="records", double_precision=15)
"""


def test_loads_in_a_clean_process_without_pickle(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(stream.root)
    done = subprocess.run([sys.executable, "-c", LOAD, stream.registry.tracking_uri,
                           str(tmp_path / "rows.json")], cwd=tmp_path, env=CLEAN,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    wanted = [expected(1, task, [photo(1)]) for task in ("more things", "animals", "more things")]
    assert [row["label"] for row in rows] == [w.labels[0] for w in wanted]
    assert [tuple(row["classes"]) for row in rows] == [tuple(w.classes) for w in wanted]
    for row, w in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row["probabilities"], w.probabilities_BK[0], rtol=1e-5)
        assert row["probability"] == max(row["probabilities"])
    for column in ('"image"', '"task"', '"label"', '"probability"'):
        assert column in done.stdout


def test_version_holds_no_pickle(stream, client):
    source = client.get_model_version_download_uri("demo-1", "2")
    files = {path.name for path in Path(source).rglob("*") if path.is_file()}
    files.discard("registered_model_meta")  # MLflow writes it when the version is loaded
    assert files == {"MLmodel", "pyfunc_model.py", "model.safetensors", "model.json", "conda.yaml",
                     "python_env.yaml", "requirements.txt", "input_example.json",
                     "serving_input_example.json"}
    assert "partialhn==" in (Path(source) / "requirements.txt").read_text()


@pytest.mark.slow
def test_served_over_http(stream, tmp_path, monkeypatch):
    monkeypatch.chdir(stream.root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = CLEAN | {"MLFLOW_TRACKING_URI": stream.registry.tracking_uri,
                           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/demo-1@champion",
         "--env-manager", "local", "-p", str(port)],
        env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_served(port, server)
        image = base64.b64encode(photo(7)).decode()
        status, answer = post(port, [[image, "animals"], [image, "more things"]])
        assert status == 200
        for row, task in zip(answer["predictions"], ("animals", "more things"), strict=True):
            wanted = expected(1, task, [photo(7)])
            assert row["label"] == wanted.labels[0]
            np.testing.assert_allclose(row["probabilities"], wanted.probabilities_BK[0], rtol=1e-5)
        status, answer = post(port, [[image, "birds"]])
        assert status == 400
        assert "birds" in answer["message"]
        assert "animals" in answer["message"]
    finally:
        os.killpg(server.pid, 9)
        server.wait()
        log.close()


def post(port: int, rows: list[list[str]]) -> tuple[int, dict]:
    body = json.dumps({"dataframe_split": {"columns": ["image", "task"], "data": rows}}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body,
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_until_served(port: int, server: subprocess.Popen) -> None:
    for _ in range(240):
        assert server.poll() is None, "the server died"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def images_folder(root: Path) -> Path:
    (root / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "deep/c.png")):
        (root / "in" / name).write_bytes(photo(number))
    return root / "in"


def test_predict_an_image_folder(stream, tmp_path, monkeypatch):
    seen = []
    done = predict_to_parquet("models:/demo-1@champion", "0", str(images_folder(tmp_path)),
                              str(tmp_path / "new" / "preds.parquet"), storage=stream.uri,
                              progress=lambda done, total: seen.append((done, total)))
    table = pq.read_table(done.output)
    assert table.column("id").to_pylist() == ["a.png", "b.png", "deep/c.png"]
    assert table.column("task").to_pylist() == ["animals"] * 3
    monkeypatch.chdir(stream.root)
    wanted = expected(1, "animals", [photo(1), photo(0), photo(2)])
    assert table.column("label").to_pylist() == list(wanted.labels)
    assert table.column("classes").to_pylist() == [["cat", "dog"]] * 3
    np.testing.assert_allclose(table.column("probabilities").to_pylist(), wanted.probabilities_BK)
    np.testing.assert_allclose(table.column("probability"), wanted.probabilities_BK.max(axis=1))
    assert table.schema.metadata[b"model_uri"] == b"models:/demo-1/2"
    assert (done.images, done.task, done.model_uri) == (3, "animals", "models:/demo-1/2")
    assert sum(done.labels.values()) == 3
    assert seen == [(3, 3)]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["preds.parquet"]


@pytest.mark.parametrize("packed", [True, False])
def test_predict_parquet_over_several_batches(stream, tmp_path, monkeypatch, packed):
    monkeypatch.setattr("pipelines.label_images.BATCH", 4)
    monkeypatch.setattr("partialhn.data.image_table.READ_BYTES", 1)
    images = [photo(number) for number in range(10)]
    column = [{"bytes": image, "path": "x"} for image in images] if packed else images
    pq.write_table(pa.table({"image": column}), tmp_path / "in.parquet", row_group_size=3)
    output = tmp_path / "preds.parquet"
    output.write_bytes(b"an older file")
    predict_to_parquet("models:/demo-1/2", "more things", str(tmp_path / "in.parquet"),
                       str(output), storage=stream.uri)
    frame = pq.read_table(output).to_pandas()
    assert list(frame["id"]) == [f"in.parquet#{row}" for row in range(10)]
    monkeypatch.chdir(stream.root)
    wanted = expected(1, "more things", images)
    assert list(frame["label"]) == list(wanted.labels)
    np.testing.assert_allclose(np.stack(frame["probabilities"]), wanted.probabilities_BK, rtol=1e-5)


def test_predict_one_image(stream, tmp_path):
    image = images_folder(tmp_path) / "a.png"
    done = predict_to_parquet("models:/demo-1@task-animals", "animals", str(image),
                              str(tmp_path / "p.parquet"), storage=stream.uri)
    assert pq.read_table(done.output).column("id").to_pylist() == ["a.png"]
    assert done.model_uri == "models:/demo-1/1"


def test_predict_bad_input(stream, tmp_path):
    folder = images_folder(tmp_path)

    def predict(task="animals", images=folder, output="p.parquet", version=1):
        predict_to_parquet(f"models:/demo-1/{version}", task, str(images),
                           str(tmp_path / output), storage=stream.uri)

    with pytest.raises(InputError, match=r"task is 'more things'.*animals"):
        predict(task="more things")
    with pytest.raises(InputError, match=r"task is '2'.*animals.*more things"):
        predict(task="2", version=2)
    with pytest.raises(InputError, match="nowhere"):
        predict(images=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"output .*in' is a folder; allowed: a file"):
        predict(output="in")
    (folder / "deep" / "c.png").write_bytes(photo(2)[:200])
    with pytest.raises(InputError, match=r"image deep/c\.png is truncated"):
        predict()
    assert not (tmp_path / "p.parquet").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["in"], "no draft is left"


def test_predict_leaves_out_bad_images(stream, tmp_path):
    folder = images_folder(tmp_path)
    (folder / "b.png").write_bytes(b"")
    done = predict_to_parquet("models:/demo-1/1", "animals", str(folder), str(tmp_path / "p"),
                              storage=stream.uri, on_bad_image="skip")
    assert pq.read_table(done.output).column("id").to_pylist() == ["a.png", "deep/c.png"]
    assert done.images == 2
    assert [(bad.id, bad.reason) for bad in done.bad] == [("b.png", "is empty")]
    for name in ("a.png", "deep/c.png"):
        (folder / name).write_bytes(b"")
    done = predict_to_parquet("models:/demo-1/1", "animals", str(folder), str(tmp_path / "p"),
                              storage=stream.uri, on_bad_image="skip")
    assert (done.images, len(done.bad), pq.read_table(done.output).num_rows) == (0, 3, 0)


def test_show(stream):
    text = show("demo-1", storage=stream.uri)
    assert "models:/demo-1@champion = version 2 (2 tasks)" in text
    assert stream.registry.tracking_uri in text
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("1 "))
    assert row.split() == ["1", "more", "things", "cup,", "hat,", "key", "2", "0.900", "0.925",
                           "0.050", "champion,", task_alias("more things")]
    assert [line for line in lines if "/features/" in line] == [
        "  /data/store/features/key0", "  /data/store/features/shared",
        "  /data/store/features/key1"]
    with pytest.raises(InputError, match=r"stream is 'demo-2', which is not .* allowed: .*demo-1"):
        show("demo-2", storage=stream.uri)


def test_large_examples_are_made_small():
    from pipelines.registry.package import MAX_EXAMPLE_BYTES, _small

    assert _small(photo(0)) == photo(0)
    encoded = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(encoded, "PNG")
    small = _small(encoded.getvalue())
    assert len(small) <= MAX_EXAMPLE_BYTES
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (48, 64)


def test_connecting_is_quiet(tmp_path):
    code = ("import sys; from pipelines.registry.client import connect, Registry\n"
            "from pipelines.platform.storage import open_storage\n"
            "assert isinstance(connect(open_storage(sys.argv[1])), Registry)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], cwd=tmp_path,
                          env=CLEAN, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "nothing lands in the working folder"


def test_registry_class_is_imported_without_mlflow():
    code = ("import sys, pipelines.registry.client\n"
            "print('mlflow' in sys.modules, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert Registry.__doc__


def test_a_metric_of_infinity_is_no_large_number(stream, client):
    """MLflow 3.17 turns infinity into 1.797e308 without an error."""
    run = stream.registry.stream_run("demo-1", "infinite", {})
    stream.registry.log_metrics(run, {"loss": float("inf"), "acc": 0.5})
    values = {key: client.get_metric_history(run, key)[0].value for key in ("loss", "acc")}
    assert math.isnan(values["loss"])
    assert values["acc"] == 0.5
