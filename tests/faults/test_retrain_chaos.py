"""SIGKILL at random moments of a pass, driver and workers alike: every task once, the same weights.

    python -m pytest tests/faults/test_retrain_chaos.py -m slow    50 kills

The seed decides when and whom; the same command is started again each time.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.config import Config
from partialhn.run import run_stream
from pipelines.features import open_store
from pipelines.journal import Journal
from pipelines.lease import Lease
from pipelines.registry import connect
from pipelines.storage import open_storage

pytestmark = pytest.mark.slow

TASKS = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
CONFIG = {
    "data": {"data": "inbox", "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 2, "trunk_batch_size": 32},
    "features": {"views": 1, "augment": "none"}, "hypernet": {"fresh_columns": 4},
    "train": {"epochs": 3, "batch_size": 16}, "compute": {"threads": 1}}
WHOM = ("driver", "RayTrainWorker", "_train_trunk", "MapWorker", "raylet")


def put_tasks(root: Path) -> None:
    digits = load_digits()
    for task, labels in TASKS.items():
        for label in labels:
            pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
            for number in range(40):
                folder = root / "store" / "inbox" / task / ("train" if number % 5 else "test")
                (folder / str(label)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels_NHW[number]).save(folder / str(label) / f"{number}.png")
        (root / "store" / "inbox" / task / "_READY").write_text("")
        os.utime(root / "store" / "inbox" / task / "_READY", (100, 100))
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))


class Started:
    """A `partialhn retrain` process and everything below it."""

    def __init__(self, root: Path) -> None:
        self.log = (root / "log.txt").open("a")
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("partialhn"), "retrain", "--name", "s", "--storage",
             root / "store", "--config", root / "config.yaml"],
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        self.seen: dict[int, psutil.Process] = {}

    def below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {child.pid: child for child in
                          psutil.Process(self.process.pid).children(recursive=True)}
        return [child for child in self.seen.values() if child.is_running()]

    def kill(self, whom: str) -> bool:
        """SIGKILL; says whether there was somebody."""
        if whom == "driver":
            self.process.send_signal(signal.SIGKILL)
            return True
        for child in self.below():
            with contextlib.suppress(psutil.Error):
                if whom in " ".join(child.cmdline()):
                    child.kill()
                    return True
        return False

    def end(self) -> None:
        """Leaves no process behind."""
        for child in [*self.below(), self.process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                child.kill()
        self.process.wait(60)
        self.log.close()


def chaos(root: Path, kills: int, seed: int, quiet: float = 25.0) -> dict[str, int]:
    """Starts the command again and again; `quiet` is about how long an undisturbed pass takes."""
    chance, killed = random.Random(seed), dict.fromkeys(WHOM, 0)
    deadline = time.monotonic() + 60 * kills + 600
    while True:
        run = Started(root)
        try:
            if sum(killed.values()) < kills:
                until = time.monotonic() + chance.uniform(0.1, 1.0) * quiet
                while time.monotonic() < until and run.process.poll() is None:
                    run.below()
                    time.sleep(0.1)
                order = chance.sample(WHOM, len(WHOM))
                whom = next((each for each in order if run.process.poll() is None
                             and run.kill(each)), None)
                if whom:
                    killed[whom] += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(3 * quiet + 60)
            code = run.process.poll()
        finally:
            run.end()
        assert time.monotonic() < deadline, (root / "log.txt").read_text()[-3000:]
        learned = Journal(open_storage(str(root / "store")), "s").decided()
        if code == 0 and len(learned) == len(TASKS):
            return killed


def last_pass(root: Path) -> dict:
    """One undisturbed pass at the end: nothing is left to do."""
    done = subprocess.run(
        [Path(sys.executable).with_name("partialhn"), "retrain", "--name", "s", "--storage",
         root / "store", "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def check(root: Path, weights: str) -> None:
    storage = open_storage(str(root / "store"))
    assert last_pass(root)["nothing_to_do"]
    registry = connect(storage)
    versions = registry.versions("s")
    assert [version.task for version in versions] == list(TASKS), "every task exactly once"
    assert [version.tags["gate"] for version in versions] == ["passed"] * len(TASKS)
    moves = [entry.move.to for entry in registry.aliases.history("s").entries()
             if entry.move.alias == "champion"]
    assert moves == [version.version for version in versions], "the history is complete"
    predictor, champion = registry.load_predictor("models:/s@champion")
    assert champion.version == versions[-1].version
    assert predictor.tasks == list(TASKS)
    assert champion.tags["weights_hash"] == weights
    store = open_store(storage)
    for decided in Journal(storage, "s").decided():
        for manifest in decided.with_features(store).manifests.values():
            assert len(store.open(manifest)) == manifest.rows
    lease = Lease(storage, "s")
    assert lease.acquire() is None, "an orphaned lease"
    lease.release()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights of the same tasks that nothing happens to, learned in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    put_tasks(root)
    config = Config.from_dict(CONFIG | {"data": {"data": str(root / "store" / "inbox"),
                                                 "input_size": 16}})
    return run_stream(config, root / "oracle")[0].weights_hash()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_anywhere(undisturbed, tmp_path, kills):
    """A stream that is learned before all kills were dealt is begun anew with another seed."""
    dealt, seed = dict.fromkeys(WHOM, 0), 0
    while sum(dealt.values()) < kills:
        root = tmp_path / str(seed)
        root.mkdir()
        put_tasks(root)
        for whom, count in chaos(root, kills - sum(dealt.values()), seed).items():
            dealt[whom] += count
        check(root, undisturbed)
        seed += 1
    (tmp_path / "dealt.json").write_text(json.dumps(dealt))
    assert sum(dealt.values()) >= kills
