"""SIGKILL in the middle of a task, of the whole run or of its worker: the same weights at the end.

Every process is a real one, started as a user starts it.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from partialhn.run import run_stream
from tests.support import small_config

CONFIG = small_config(data={"tasks": 4}, train={"epochs": 40, "batch_size": 32},
                      features={"views": 2, "augment": "crop", "shard_rows": 500})
"""A task takes seconds, so that there is a middle to be killed in."""

ON_RAY = ("--ray-address", "local")

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]


class Run:
    """A `partialhn train` process, what it has printed so far, and the processes below it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG.to_dict()))
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("partialhn"), "train", "--config", "run.yaml",
             "--name", "digits", "--storage", "store", "--result", "result.json", *options],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.text = ""
        self._below: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, pattern: str, seconds: float = 600) -> None:
        """Until a line that was printed matches."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.05)

    def below(self) -> list[psutil.Process]:
        """Every process that was seen below the run and is still there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._below |= {child.pid: child for child in children}
        return [child for child in self._below.values() if child.is_running()]

    def finish(self) -> dict:
        """Waits for success; returns the result."""
        code = self.process.wait(900)
        self._reader.join(60)
        assert code == 0, self.text
        return json.loads((self.folder / "result.json").read_text())

    def end(self) -> None:
        """Leaves no process behind, whatever happened."""
        for child in [*self.below(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()


@pytest.fixture
def start():
    """Starts runs; none outlives the test."""
    runs: list[Run] = []

    def start(folder: Path, *options: str) -> Run:
        runs.append(Run(folder, *options))
        return runs[-1]
    yield start
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and result of the same stream that nothing happens to, in one process."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return root, run_stream(CONFIG, root).fields


def middle_of_the_third_task(run: Run) -> None:
    """Waits until the second task is done and the third is being learned."""
    run.wait_for(r"(?m)^task 2 '1' learned")
    time.sleep(1.5)
    assert learned(run) == 2, run.text


def learned(run: Run) -> int:
    """How many tasks are learned."""
    return len(list(run.folder.glob("store/runs/digits/learned/*/model.json")))


def check_result(result: dict, uninterrupted: dict, folder: Path) -> None:
    """The numbers of an uninterrupted run, and every task in the registry exactly once."""
    from mlflow import MlflowClient

    assert result["weights_hash"] == uninterrupted["weights_hash"]
    assert result["accuracy_matrix"] == uninterrupted["accuracy_matrix"]
    losses = [[(row["task"], row["epoch"], row["loss"]) for row in each["epochs"]]
              for each in (result, uninterrupted)]
    assert losses[0] == losses[1]
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'store' / 'mlflow.db'}")
    versions = client.search_model_versions("name = 'digits'")
    assert sorted(version.tags["task"] for version in versions) == ["0", "1", "2", "3"]
    assert client.get_model_version_by_alias("digits", "champion").tags["task"] == "3"
    assert [row["task"] for row in result["versions"]] == ["0", "1", "2", "3"]
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert sorted(run.data.tags.get("task", "stream") for run in runs) == ["0", "1", "2", "3",
                                                                          "stream"]
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize("options", [(), ON_RAY], ids=["in one process", "on Ray"])
def test_the_run_is_killed_and_started_again(start, uninterrupted, tmp_path, options):
    killed = start(tmp_path, *options)
    middle_of_the_third_task(killed)
    left = killed.below()
    assert bool(left) == bool(options), "Ray's processes, or none"
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(60)
    assert not (tmp_path / "result.json").exists()

    again = start(tmp_path, *options)
    result = again.finish()
    check_result(result, uninterrupted[1], tmp_path)
    assert result["images_decoded"] == 0
    assert "trunk: already trained" in again.text
    assert "features: " in again.text
    for done in ("task 1 '0'  epoch", "task 2 '1'  epoch"):
        assert done not in again.text
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive, "processes of the killed run live on"


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_is_killed_and_the_run_goes_on(start, uninterrupted, tmp_path, count):
    """Of two, each has learned a task and is in the middle of another."""
    for kept in ("features", "trunks", "datasets"):  # the same work: nothing to compute again
        shutil.copytree(uninterrupted[0] / kept, tmp_path / "store" / kept)
    run = start(tmp_path, *ON_RAY, "--workers", str(count))
    if count == 1:
        middle_of_the_third_task(run)
    else:
        run.wait_for(r"(?m)^task 2 '1' learned")
        assert 2 <= learned(run) < 4, run.text
    workers = [child for child in run.below() if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == count, [child.cmdline() for child in run.below()]
    workers[-1].send_signal(signal.SIGKILL)
    result = run.finish()
    check_result(result, uninterrupted[1], tmp_path)
    assert result["images_decoded"] == 0
