"""`partialhn doctor`: what it finds on a sound machine, and what it says where something is not."""

import json
import os
import time

from pipelines.doctor import DoctorCheck, check_versions, lines
from pipelines.platform.storage import Storage


def test_a_sound_machine_passes_and_nothing_is_left_behind(ray_cluster, command, tmp_path):
    store = tmp_path / "store"
    code, out, _ = command("doctor", "--storage", store, "--json")
    found = json.loads(out)
    assert code == 0, out
    assert found["passed"]
    seen = {(each["place"].split()[0], each["what"]) for each in found["checks"]}
    machine = {"storage", "clock", "packages", "environment", "GPUs", "cache", "/dev/shm"}
    assert seen >= {(place, what) for place in ("driver", "node") for what in machine}
    assert ("driver", "MLflow") in seen
    assert not (store / "mlflow.db").exists(), "looking makes no registry"
    assert [path for path in store.rglob("*") if path.is_file()] == []


def test_failures_are_named_with_what_to_do(ray_cluster, command, tmp_path, monkeypatch):
    """A server that is not there, a device that is not there, and a clock an hour ahead."""
    monkeypatch.setattr(Storage, "now", lambda self: time.time() - 3600)
    code, out, _ = command("doctor", "--storage", tmp_path / "store", "--tracking-uri",
                           "http://127.0.0.1:9", "--device", "gpu")
    assert code == 1
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert any("MLflow" in line and "127.0.0.1:9" in line for line in failed)
    assert any("device" in line and "workers is 1 with one GPU" in line for line in failed)
    assert any("clock" in line and "ahead of the storage's" in line for line in failed)
    assert "driver, clock: set the clock (chrony, ntpd)" in out
    assert "driver, MLflow: start the server" in out
    assert f"{len(failed)} of " in out.splitlines()[-1]


def test_a_storage_that_cannot_be_written(ray_cluster, command, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, out, _ = command("doctor", "--storage", file)
    assert code == 1
    assert any("storage" in line and "FAILED" in line and os.fspath(file) in line
               for line in out.splitlines())


def test_a_node_with_other_packages_is_told_apart():
    driver = DoctorCheck("driver", "packages", True, "ray 2.0, torch 2.1")
    nodes = [DoctorCheck("node a", "packages", True, "ray 2.0, torch 2.1"),
             DoctorCheck("node b", "packages", True, "ray 2.0, torch 2.2")]
    same, other = check_versions([driver, *nodes])
    assert same.passed
    assert not other.passed
    assert other.found == "torch 2.2 where the driver has torch 2.1"
    assert "1 of 2 checks failed" in lines([same, other])[-1]
