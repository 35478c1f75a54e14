"""Where stages are done, and what a worker in this process tells and keeps."""

import socket
import sys
import types
from unittest import mock

import pytest
import torch

from partialhn.checkpoints import checkpoint
from partialhn.config import ComputeConfig, Config
from partialhn.errors import InputError
from pipelines.execution import choose as stages
from pipelines.execution.choose import open_execution
from pipelines.execution.local import LocalExecution, ProcessHost
from pipelines.platform import cluster
from pipelines.platform.cluster import needs_ray
from pipelines.platform.progress import Progress
from pipelines.platform.storage import open_storage


@pytest.mark.parametrize(("options", "needed"), [
    ({}, False), ({"device": "cpu", "threads": 3}, False), ({"workers": 2}, True),
    ({"feature_workers": 2}, True), ({"ray_address": "local"}, True),
    ({"ray_address": "auto"}, True), ({"ray_address": "ray://head:10001"}, True)])
def test_what_needs_ray(options, needed):
    assert needs_ray(ComputeConfig(**options)) == needed


def test_ray_that_is_there_is_used(monkeypatch):
    monkeypatch.undo()  # the fixture that hides it
    there = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", there)
    assert needs_ray(ComputeConfig())
    there.is_initialized = lambda: False
    assert not needs_ray(ComputeConfig())


def opened(folder, **options):
    config = Config(compute=ComputeConfig(**options))
    return open_execution(config, open_storage(str(folder)), "s", Progress(config, lambda _: None))


def test_only_what_needs_ray_starts_it(tmp_path, monkeypatch):
    started = []

    def start(address):
        started.append(address)
        raise InputError("here a cluster would be")

    monkeypatch.setattr(stages, "start_ray", start)
    assert isinstance(opened(tmp_path), LocalExecution)
    assert not started
    for options in ({"workers": 2}, {"ray_address": "local"}):
        with pytest.raises(InputError, match="here a cluster would be"):
            opened(tmp_path, **options)
    assert started == [None, "local"]


def test_a_local_ray_is_asked_for_by_its_name(monkeypatch):
    ray = pytest.importorskip("ray")
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "init_ray", lambda address, **_: asked.append(address))
    for address in (None, "local", "auto"):
        cluster.start_ray(address)
    assert asked == ["local", "local", "auto"]


def test_a_cluster_that_wants_a_token(monkeypatch):
    """Something listens and does not let us in; and without any token Ray has an error of its own.
    """
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for error in (ConnectionError("Failed to connect"), ray.exceptions.RayError("no token")):
            monkeypatch.setattr(cluster, "init_ray", mock.Mock(side_effect=error))
            with pytest.raises(InputError, match="RAY_AUTH_MODE=token"):
                cluster.start_ray(address)
    for nobody in (address, None):
        with pytest.raises(InputError, match=r"no cluster answers .*or leave it out$"):
            cluster.start_ray(nobody)


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device is 'gpu'.*allowed: auto, cpu"):
        opened(tmp_path, device="gpu")
    assert opened(tmp_path).device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_that_is_there(tmp_path):
    assert opened(tmp_path).device.type == "cuda"
    assert opened(tmp_path, device="cpu").device.type == "cpu"


# The host ------------------------------------------------------------------------------------


def host(folder, follow=lambda *_: None):
    storage = open_storage(str(folder))
    return ProcessHost(storage, storage.path("runs", "s", "run"), torch.device("cpu"), follow,
                       lambda _: None)


def state(folder, value):
    checkpoint.save(folder / "made", "learner", {"t": torch.tensor([value])}, {})
    return folder / "made"


def fetched(made, folder):
    return checkpoint.load(folder, "learner")[0]["t"].item() if made.fetch(folder) else None


def test_the_newest_whole_state_counts(tmp_path):
    run = tmp_path / "store" / "runs" / "s" / "run"
    with host(tmp_path / "store") as made:
        assert fetched(made, tmp_path / "a") is None
        made.keep(state(tmp_path, 1))
        made.keep(state(tmp_path, 2))
        assert [path.name for path in run.iterdir()] == ["state-00000001"]
        assert fetched(made, tmp_path / "b") == 2
        # a writer that was killed: the fields, written last, are missing or half there
        (run / "state-00000002").mkdir()
        (run / "state-00000002" / "model.safetensors").write_bytes(b"half")
        (run / "state-00000002" / "model.json.draft").write_text("{")
        assert fetched(made, tmp_path / "c") == 2
        made.keep(state(tmp_path, 3))
        assert [path.name for path in run.iterdir()] == ["state-00000003"]
        assert fetched(made, tmp_path / "d") == 3


def learn(follow, numbers, error=None):
    """What a worker does: sends records, perhaps fails."""
    with host("unused", follow) as made:
        for number in numbers:
            made.send("s", number)
            made._thread.submit(lambda: None).result()  # it has been followed
        if error:
            raise error


def test_every_record_is_followed_in_order():
    followed = []
    with host("unused", lambda *record: followed.append(record)) as made:
        for number in range(50):
            made.send("s", number)
    assert followed == [("s", number) for number in range(50)]


def test_what_follows_fails_and_so_does_the_run():
    followed = []

    def follow(strategy, number):
        followed.append(number)
        if number == 1:
            raise OSError("the registry is gone")

    for numbers in (range(1000), [0, 1]):  # on the way, and by the last of all
        followed.clear()
        with pytest.raises(OSError, match="the registry is gone"):
            learn(follow, numbers)
        assert followed == [0, 1]


def test_what_was_learned_before_an_error_is_followed():
    followed = []
    with pytest.raises(InputError, match="diverged"):
        learn(lambda *record: followed.append(record), [1], InputError("diverged"))
    assert followed == [("s", 1)]
