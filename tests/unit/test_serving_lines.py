"""`serve` writes a line for each model that it loads, asked over HTTP as its user would."""

import http.server
import json
import socket
import threading

import pytest

from partialhn.errors import InputError
from pipelines.serving.app import _check_port
from pipelines.serving.watcher import Watcher, healthz

ACCURACY = {"task": 0.615, "right": 0.302, "given": 0.556}
FIRST = {"version": "3", "auto": True, "auto_accuracy": ACCURACY, "reload": {"state": "current"},
         "recording": None}


@pytest.fixture
def server():
    """An HTTP server whose /healthz is what the test sets; None for a server that is busy."""
    class Handler(http.server.BaseHTTPRequestHandler):
        health = None

        def do_GET(self):
            self.send_response(503 if Handler.health is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(Handler.health).encode())

        def log_message(self, *_):
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield Handler, healthz("0.0.0.0", listening.server_port)
    listening.shutdown()
    listening.server_close()


def test_each_reload_and_each_new_failure_is_one_line(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the server is asked without it
    handler, uri = server
    lines = []
    watcher = Watcher(uri, "3", lines.append)
    failed = {"reload": {"state": "failed", "error": "no registry"}}
    for health in (FIRST, FIRST, None, FIRST | {"version": "4", "auto": False},
                   FIRST | {"version": "4"} | failed, FIRST | {"version": "4"} | failed,
                   FIRST | {"version": "4"}, FIRST | {"version": "4"} | failed):
        handler.health = health
        watcher.look()
    failure = ("still serving version 4, because checking for a new one failed: no registry")
    assert [line.partition(" ")[2] for line in lines] == [
        "now serving version 4 instead of 3", failure, failure]


def test_the_accuracy_without_the_task_is_said_at_start_and_after_a_reload(server):
    handler, uri = server
    lines = []
    watcher = Watcher(uri, "3", lines.append)
    handler.health = FIRST
    watcher.say_accuracy()
    handler.health = FIRST | {"version": "4", "auto_accuracy": None}
    watcher.look()
    handler.health = FIRST | {"auto_accuracy": ACCURACY | {"rejected": 0.244}}
    watcher.say_accuracy()
    assert lines[0] == ("task auto finds the right task for 61.5 % of this stream's test images "
                        "and the right class for 30.2 %; with the task given, 55.6 %")
    assert lines[2] == "task auto: how often it is right was not measured for this model"
    assert lines[3] == (lines[0] + "; these shares count every image, but it takes 24.4 % of them "
                        "for images of no known task and gives those no label")


@pytest.mark.parametrize(("host", "uri"), [
    ("", "http://127.0.0.1:80/healthz"), ("0.0.0.0", "http://127.0.0.1:80/healthz"),
    ("::", "http://[::1]:80/healthz"), ("fe80::1", "http://[fe80::1]:80/healthz"),
    ("gpu-1", "http://gpu-1:80/healthz")])
def test_where_a_machine_reaches_its_own_server(host, uri):
    assert healthz(host, 80) == uri


def test_a_port_is_looked_for_where_the_server_will_listen():
    families = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
    tried = 0
    for host, family in families.items():
        with socket.socket(family) as taken:
            try:
                taken.bind((host, 0))
            except OSError:
                assert host == "::1", "a machine may be without IPv6 alone"
                continue
            taken.listen()
            with pytest.raises(InputError, match=f"of {host} cannot be used: Address already"):
                _check_port(host, taken.getsockname()[1])
            tried += 1
        _check_port(host, 0)
    assert tried
