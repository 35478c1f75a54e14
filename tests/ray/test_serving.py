"""`partialhn serve` as a user starts it: answers, refusals, health, metrics, a moving alias."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from partialhn.data.datasets import open_stream
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.serving.live import read_live

pytestmark = pytest.mark.slow

WAITING = 16
BODY = 200_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Running:
    process: subprocess.Popen
    port: int
    storage: str
    lines: Path

    def call(self, path, data=None, **headers):
        """Status, body as text, headers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers

    def ask(self, body, task, **headers):
        status, text, _ = self.call(f"/predict?task={task}", body, **headers)
        return status, json.loads(text)

    def ask_json(self, fields):
        status, text, _ = self.call("/predict", json.dumps(fields).encode(),
                                    **{"Content-Type": "application/json"})
        return status, json.loads(text)

    def health(self):
        return json.loads(self.call("/healthz")[1])

    def wait_for(self, condition, seconds=60):
        for _ in range(int(seconds / 0.2)):
            if condition(self.health()):
                return self.health()
            time.sleep(0.2)
        raise AssertionError(self.health())


@pytest.fixture(scope="module")
def registry(learned):
    return connect(open_storage(learned.output.storage))


@pytest.fixture(scope="module")
def client(registry):
    return mlflow.MlflowClient(tracking_uri=registry.tracking_uri)


@pytest.fixture(scope="module")
def server(learned, registry, tmp_path_factory):
    port, lines = free_port(), tmp_path_factory.mktemp("serve") / "lines"
    command = [sys.executable, "-c", "from pipelines.cli.main import main; main()", "serve",
               "--model", "models:/digits@champion", "--storage", learned.output.storage,
               "--port", str(port), "--reload-seconds", "0.5", "--max-waiting", str(WAITING),
               "--max-body-bytes", str(BODY)]
    with lines.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT,
                                   env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    running = Running(process, port, learned.output.storage, lines)
    try:
        for _ in range(600):
            assert process.poll() is None, lines.read_text()
            if "/predict" in lines.read_text():
                break
            time.sleep(0.2)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def images(learned):
    """A few test images of every task."""
    experiences = open_stream(learned.config.data, Path(learned.output.storage) / "datasets")
    return {each.name: each.test.read()[:12] for each in experiences}


@pytest.fixture(scope="module")
def predictor(registry):
    return registry.load_predictor("models:/digits@champion")[0]


def test_answers_are_the_predictors(server, predictor, images):
    for task, encoded in images.items():
        expected = predictor.predict(encoded, task)
        for row, image in enumerate(encoded[:3]):
            status, found = server.ask(image, task)
            assert status == 200
            assert (found["task"], found["label"]) == (task, expected.labels[row])
            assert found["classes"] == list(expected.classes)
            np.testing.assert_allclose(found["probabilities"], expected.probabilities_BK[row],
                                       atol=1e-4)
            assert found["version"] == "3"


def test_the_example_client(server, predictor, images, tmp_path):
    (tmp_path / "image.png").write_bytes(images["1"][0])
    client = Path(__file__).parents[2] / "examples" / "serve_client.py"

    def ask(task):
        return subprocess.run([sys.executable, client, tmp_path / "image.png", task,
                               f"http://127.0.0.1:{server.port}"], capture_output=True, text=True,
                              check=False)
    label = predictor.predict(images["1"][:1], "1").labels[0]
    assert ask("1").stdout.startswith(f"{label}  (probability ")
    refused = ask("zebra")
    assert refused.returncode == 1
    assert "task is 'zebra'; allowed: 0, 1, 2, auto" in refused.stderr


def test_one_request_may_mix_tasks_and_leave_them_open(server, predictor, images):
    pairs = [(image, task) for task in images for image in images[task][:5]]
    encoded = [base64.b64encode(image).decode() for image, _ in pairs]
    status, found = server.ask_json({"images": encoded, "tasks": [task for _, task in pairs]})
    assert status == 200
    for (image, task), answer in zip(pairs, found["predictions"], strict=True):
        assert answer["task"] == task
        assert answer["label"] == predictor.predict([image], task).labels[0]
    status, found = server.ask_json({"images": encoded, "task": "auto"})
    expected = predictor.predict_auto([image for image, _ in pairs])
    assert [answer["task"] for answer in found["predictions"]] == [e.task for e in expected]
    assert [answer["task_probability"] for answer in found["predictions"]] == pytest.approx(
        [e.task_probability for e in expected], abs=1e-4)
    right = [answer["task"] == task for answer, (_, task) in
             zip(found["predictions"], pairs, strict=True)]
    assert np.mean(right) > 0.6


def bomb() -> bytes:
    """A PNG whose header promises 12,000 x 12,000 pixels."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


@pytest.mark.parametrize(("path", "body", "kind", "status", "words"), [
    ("?task=0", b"no image", "image/png", 400, "no readable PNG, JPEG"),
    ("?task=0", b"", "image/png", 400, "is empty"),
    ("?task=0", bomb(), "image/png", 400, "too large: 12000 x 12000"),
    ("?task=zebra", b"x", "image/png", 404, "task is 'zebra'; allowed: 0, 1, 2, auto"),
    ("", b"x", "image/png", 400, "names no task"),
    ("?task=0", b"x" * (BODY + 1), "image/png", 413,
     f"has {BODY + 1} bytes; allowed: up to {BODY}"),
    ("", b"{", "application/json", 400, "is not JSON"),
    ("", b"{", "Application/JSON", 400, "is not JSON"),
    ("?task=0", b'{"images": []}', "text/plain", 400,
     "looks like JSON, but its Content-Type is text/plain; allowed: application/json"),
    ("?task=0", b"--x", "multipart/form-data; boundary=x", 400, "is a form with parts; allowed: "),
    ("", b"[" * 100_000, "application/json", 400, "is not JSON"),
    ("", b'{"task": "0"}', "application/json", 400, "no list of images"),
    ("", b'{"images": [], "task": "0"}', "application/json", 400, "has 0 images; allowed: 1 to 16"),
    ("", b'{"images": ["eA=="]}', "application/json", 400, "has no task for every image"),
    ("", b'{"images": ["!"], "task": "0"}', "application/json", 400, "number 0 is not base64"),
    ("", b'{"images": ["eA=="], "task": "0"}', "application/json", 400,
     "image number 0: the image"),
])
def test_refusals_say_what_is_wrong(server, path, body, kind, status, words):
    found, text, _ = server.call(f"/predict{path}", body, **{"Content-Type": kind})
    assert (found, words in json.loads(text)["error"]) == (status, True), text
    assert server.call("/healthz")[0] == 200


def test_a_body_without_a_length_is_bounded_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def chunks():
        for _ in range(40):
            yield b"x" * 10_000
    try:
        connection.request("POST", "/predict?task=0", chunks(), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})
        answer = connection.getresponse()
        assert (answer.status, b"allowed: up to" in answer.read()) == (413, True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server had enough before we had sent it all
    finally:
        connection.close()
    assert server.call("/healthz")[0] == 200


def test_a_full_queue_says_when_to_come_again(server):
    side = Image.fromarray(np.random.default_rng(0).integers(0, 256, (220, 220), np.uint8))
    encoded = io.BytesIO()
    side.save(encoded, "PNG")
    body = json.dumps({"images": [base64.b64encode(encoded.getvalue()).decode()] * 3,
                       "task": "0"}).encode()
    statuses = set()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(20):
            answers = list(pool.map(lambda _: server.call(
                "/predict", body, **{"Content-Type": "application/json"}), range(16)))
            for status, _, headers in answers:
                statuses.add(status)
                assert status == 200 or headers["Retry-After"] == "1"
            if 503 in statuses:
                break
    assert statuses == {200, 503}


def test_metrics_count_what_happened(server, images):
    server.ask(images["1"][0], "1")
    text = server.call("/metrics")[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['partialhn_images_total{task="1"}']) >= 1
    assert float(values['partialhn_errors_total{kind="unknown task"}']) >= 1
    assert float(values["partialhn_model_version"]) == 3
    assert float(values["partialhn_request_seconds_count"]) <= float(
        values["partialhn_requests_total"])
    assert float(values["partialhn_batch_images_sum"]) >= float(
        values["partialhn_batch_images_count"])


class Load:
    """Asks without pause until told to stop, and keeps every status and version."""

    def __init__(self, server, images):
        self.server, self.images = server, images
        self.seen, self.stop = [], threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(4)]

    def run(self):
        asked = 0
        while not self.stop.is_set() and asked < 20_000:
            task = ("0", "1", "auto")[asked % 3]
            status, found = self.server.ask(self.images["0"][asked % 12], task)
            self.seen.append((status, found.get("version"), found.get("error")))
            asked += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join()


def test_a_moving_champion_loses_no_request(server, client, images):
    with Load(server, images) as load:
        for version in ("2", "3", "1", "3"):
            client.set_registered_model_alias("digits", "champion", version)
            server.wait_for(lambda health, v=version: health["version"] == v)
            time.sleep(0.5)
    assert len(load.seen) > 20
    assert failures(load) == set()
    assert {version for _, version, _ in load.seen if version} == {"1", "2", "3"}


def failures(load):
    """Everything but task 1, which version 1 does not know yet and says so."""
    return {(status, error) for status, version, error in load.seen
            if status != 200 and not (status == 404 and "task is '1'" in error)}


def test_a_damaged_version_never_serves(server, registry, client, images):
    folder = Path(client.get_model_version_download_uri("digits", "2").removeprefix("file://"))
    parts = json.loads(next(folder.rglob("model.json")).read_text())["parts"]
    tensors = folder.parents[2] / "objects" / f"{parts[-1]['sha256']}.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    client.set_registered_model_alias("digits", "champion", "2")
    try:
        health = server.wait_for(lambda health: health["reload"]["state"] == "failed")
        assert "damaged" in health["reload"]["error"]
        assert health["version"] == "3"
        assert server.ask(images["0"][0], "0")[0] == 200
    finally:
        tensors.write_bytes(content)
        client.set_registered_model_alias("digits", "champion", "3")
    server.wait_for(lambda health: health["reload"]["state"] == "current")


def test_stops_when_told_and_keeps_what_it_recorded(server, learned, predictor, images):
    """The last test of this server: ends it, in the middle of a request."""
    image = images["0"][0]
    started = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    started.putrequest("POST", "/predict?task=0")
    started.putheader("Content-Length", str(len(image)))
    started.endheaders(image[:20])
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda health: health["status"] == "stopping")
    status, found = server.ask(image, "0")
    assert (status, "the server stops" in found["error"]) == (503, True)
    started.send(image[20:])
    answer = started.getresponse()
    assert answer.status == 200
    assert json.loads(answer.read())["task"] == "0"
    started.close()
    assert server.process.wait(60) == 0, server.lines.read_text()
    said = server.lines.read_text()
    assert "(raylet)" not in said, said
    assert "stopping" in said
    assert "task auto finds the right task for" in said
    assert "now serving version 2 instead of 3" in said
    assert "still serving version 3, because checking for a new one failed" in said
    assert "Traceback" not in said
    live = read_live(open_storage(server.storage), "digits",
                     predictor.model.trunk.fingerprint(), hours=1)
    assert {"0", "1", "2"} <= live.keys()
    assert len(live["0"].z_BC) == min(live["0"].seen, 512)


@pytest.mark.slow
def test_mlflow_serves_the_model_with_and_without_a_task(learned, predictor, images, tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits@champion",
         "--env-manager", "local", "-p", str(port)], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"MLFLOW_TRACKING_URI": learned.result["tracking_uri"],
                          "MLFLOW_DISABLE_TELEMETRY": "true",
                          "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    served = Running(process, port, "", tmp_path)
    try:
        for _ in range(240):
            assert process.poll() is None
            with contextlib.suppress(OSError):
                if served.call("/ping")[0] == 200:
                    break
            time.sleep(0.5)
        asked = [(images["0"][0], "0"), (images["1"][0], "1"), (images["1"][1], "auto")]
        body = {"dataframe_split": {"columns": ["image", "task"], "data": [
            [base64.b64encode(image).decode(), task] for image, task in asked]}}
        status, text, _ = served.call("/invocations", json.dumps(body).encode(),
                                      **{"Content-Type": "application/json"})
        assert status == 200, text
        labels = [row["label"] for row in json.loads(text)["predictions"]]
        assert labels == [predictor.predict([images["0"][0]], "0").labels[0],
                          predictor.predict([images["1"][0]], "1").labels[0],
                          predictor.predict_auto([images["1"][1]])[0].label]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
