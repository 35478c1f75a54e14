"""A library's environment does not overrule an explicit option: values that arrive, or refusals."""

import http.server
import os
import threading

import pytest

from partialhn.config import BackboneConfig, ComputeConfig, Config
from partialhn.environment import (
    VARIABLES,
    check_threads,
    keep_float32,
    let_streams_overlap,
    set_variables,
)
from partialhn.errors import InputError
from partialhn.run import check
from pipelines.doctor import check_machine
from pipelines.platform import s3
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect


@pytest.mark.parametrize(("variables", "threads", "message"), [
    ({"OMP_THREAD_LIMIT": "1"}, 2, "threads is 2, but OMP_THREAD_LIMIT is 1"),
    ({"OMP_THREAD_LIMIT": "1"}, 1, None), ({"OMP_THREAD_LIMIT": "1"}, None, None),
    ({"OMP_THREAD_LIMIT": "8"}, 2, None), ({"OMP_DYNAMIC": "TRUE"}, 2, "OMP_DYNAMIC is true"),
    ({"OMP_DYNAMIC": "false"}, 2, None), ({"OMP_NUM_THREADS": "1"}, 2, None),
])
def test_a_limit_on_threads_is_refused_where_the_option_asks_for_more(monkeypatch, variables,
                                                                      threads, message):
    if message is None:
        check_threads(threads, variables)
        return
    with pytest.raises(InputError, match=message):
        check_threads(threads, variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check(Config(compute=ComputeConfig(threads=threads)))


def test_tf32_that_the_environment_forbids_is_refused(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    check(Config())
    with pytest.raises(InputError, match="trunk_arithmetic is 'tf32', but NVIDIA_TF32_OVERRIDE is"):
        check(Config(backbone=BackboneConfig(trunk_arithmetic="tf32")))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    check(Config(backbone=BackboneConfig(trunk_arithmetic="tf32")))


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("0", "0"), ("1", None),
                                                 ("", None)])
def test_float32_stays_float32(monkeypatch, value, expected):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if value is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    keep_float32()
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == expected


@pytest.mark.parametrize(("value", "expected"), [(None, "32"), ("4", "4")])
def test_streams_of_a_process_get_queues_of_their_own(monkeypatch, value, expected):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
    let_streams_overlap()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == expected


def test_a_database_gets_no_workspaces(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team")
    with pytest.raises(InputError, match="MLFLOW_ENABLE_WORKSPACES is set"):
        connect(open_storage(str(tmp_path)), f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not (tmp_path / "mlflow.db").exists()


class _Asked(http.server.BaseHTTPRequestHandler):
    """Writes down who is asked for which address and region, and has nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        region = self.headers.get("Authorization", "").partition("Credential=")[2].split("/")[2]
        self.server.asked.append((self.path, region))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD


@pytest.fixture
def services():
    """Two addresses that answer, each with a list of what it was asked."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Asked) for _ in range(2)]
    for server in servers:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [(f"http://127.0.0.1:{server.server_port}", server.asked) for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(monkeypatch, services):
    """Asks both S3 clients for an object, in an environment, and gives what the two heard."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)

    def asked(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        s3.s3_client.cache_clear()
        storage = open_storage(f"s3://bucket/a?endpoint={services[0][0]}&region=us-west-2")
        storage.filesystem.get_file_info(["bucket/a/x"])
        assert storage.stat("bucket/a/x") is None
        s3.s3_client.cache_clear()
        return [{(path, region) for path, region in heard if path.endswith("/x")}
                for _, heard in services]

    return asked


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_and_region_of_the_storage_win(services, ask, name):
    heard, other = ask(**{name: services[1][0], "AWS_REGION": "eu-west-1",
                          "AWS_DEFAULT_REGION": "eu-west-1", "AWS_USE_DUALSTACK_ENDPOINT": "true"})
    assert (heard, other) == ({("/bucket/a/x", "us-west-2")}, set())


def test_both_clients_go_through_the_proxy_or_neither(services, ask):
    service, proxy = (address for address, _ in services)
    heard, other = ask(http_proxy=proxy)
    assert (heard, other) == (set(), {(f"{service}/bucket/a/x", "us-west-2")})
    services[1][1].clear()
    heard, other = ask(http_proxy=proxy, no_proxy="127.0.0.1")
    assert (heard, other) == ({("/bucket/a/x", "us-west-2")}, set())


def test_doctor_shows_the_variables_that_matter(tmp_path, monkeypatch):
    for variable in VARIABLES:
        for name in variable.names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    assert [name for name, _, _ in set_variables()] == ["MLFLOW_TRACKING_URI", "OMP_THREAD_LIMIT"]
    storage = open_storage(str(tmp_path))
    for threads, passed in ((None, True), (4, False)):
        (line,) = [found for found in check_machine("driver", storage,
                                                    ComputeConfig(threads=threads))
                   if found.what == "environment"]
        assert line.passed == passed
        assert ("postgresql://me:***@host/db counts where" if passed else "threads is 4") in \
            line.found
