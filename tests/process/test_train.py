"""The main job in one process: the numbers of the oracle, no Ray, and SIGKILL on the way."""

import base64
import io
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.run import run_stream
from partialhn.training.review import EXAMPLES
from pipelines.execution import local
from pipelines.features.in_use import records
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.retrain.run import retrain
from pipelines.settings import OutputConfig, RetrainConfig
from pipelines.train import train
from tests.processes import Ended, partialhn

CONFIG = Config.from_dict({
    "data": {"data": "digits", "tasks": 2, "task_sizes": [2, 2], "classes": 4, "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 2},
    "features": {"views": 2, "augment": "crop", "shard_rows": 200},
    "hypernet": {"fresh_columns": 4}, "train": {"epochs": 3, "compare": ["naive"]},
    "compute": {"threads": 1}})
KILL = """
from pipelines.execution import local, worker
worker.SECONDS = 0.0  # a state after every epoch
sends = local.ProcessHost.send
def killed(self, strategy, record):
    sends(self, strategy, record)
    if (strategy, record.task_index, getattr(record, "epoch", 0)) == {place}:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
local.ProcessHost.send = killed
"""
FAR_DEVICE = """
import runpy, torch
from pipelines.execution.local import LocalExecution
made = LocalExecution.__init__
def moved(self, *arguments):
    made(self, *arguments)
    self.device = torch.device("far")
LocalExecution.__init__ = moved
runpy.run_path({path!r})["PutsThere"]().__enter__()
"""
SHOW = """
import sys
from pipelines.execution import local
send = local.ProcessHost.send
def shown(self, strategy, record):
    line = f"SENT {strategy} {record.task_index} {getattr(record, 'epoch', 'end')};"
    sys.stdout.write(line)  # one write: the thread that follows prints meanwhile
    sys.stdout.flush()  # before the process may be killed
    send(self, strategy, record)
local.ProcessHost.send = shown
"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return run_stream(CONFIG, tmp_path_factory.mktemp("oracle")).fields


@pytest.fixture
def place(tmp_path, empty_registry):
    """A folder with the configuration and an empty registry: MLflow takes seconds to make one."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG.to_dict()))
    empty_registry(tmp_path / "store")
    return tmp_path


def command(folder: Path, change: str = "") -> Ended:
    """`partialhn train` in a process of its own, changed a little."""
    return partialhn("train", "--config", "run.yaml", "--name", "digits", "--storage", "store",
                     cwd=folder, change=change).wait()


def check(folder: Path, oracle: dict) -> dict:
    """What the run left behind is what the oracle found."""
    result = json.loads((folder / "result.json").read_text())
    assert result["weights_hash"] == oracle["weights_hash"]
    for key in ("accuracy_matrix", "feature_keys", "images_decoded", "notes"):
        assert result[key] == oracle[key], key
    for ours, wanted in ((result, oracle), (result["bounds"]["naive"], oracle["bounds"]["naive"])):
        assert ours["accuracy_matrix"] == wanted["accuracy_matrix"]
    losses = [[(row["task"], row["epoch"], row["loss"]) for row in each["epochs"]]
              for each in (result, oracle)]
    assert losses[0] == losses[1]
    versions = connect(open_storage(str(folder / "store"))).versions("digits")
    assert [version.task for version in versions] == ["0", "1"]
    assert [version.fields() for version in versions] == result["versions"]
    assert versions[-1].tags["weights_hash"] == result["weights_hash"]
    assert not list(records(open_storage(str(folder / "store")))), "features are given back"
    return result


def check_review(result: dict) -> None:
    """Right answers, wrong ones, confused classes and examples are those of the accuracies."""
    assert [each["task"] for each in result["review"]] == ["0", "1"]
    for each, task, accuracy in zip(result["review"], result["tasks"],
                                    result["accuracy_matrix"][-1], strict=True):
        wrong = sum(pair["images"] for pair in each["confused"])
        assert each["images"] == task["test_images"]
        assert 1 - wrong / each["images"] == pytest.approx(accuracy), "two classes: all is kept"
        shown = each["examples"]
        assert {shot["label"] for shot in shown} <= set(task["classes"])
        rights = [shot["label"] == shot["answer"] for shot in shown]
        assert sum(rights) == min(EXAMPLES, each["images"] - wrong)
        assert len(rights) - sum(rights) == min(EXAMPLES, wrong)
        assert all(Image.open(io.BytesIO(base64.b64decode(shot["image"]))).size == (64, 64)
                   for shot in shown)
        ridge = each["ridge"]
        ahead = ridge["only_ours"] - ridge["only_ridge"]
        assert accuracy - ridge["accuracy"] == pytest.approx(ahead)


def test_the_numbers_of_the_oracle_without_ray(place, oracle):
    done = command(place)
    assert done.returncode == 0, done.stderr
    result = check(place, oracle)
    check_review(result)
    assert done.stderr.splitlines()[-1] == "RAY []"
    for part in ("trunk  epoch 2/2", "times the images  seconds  cheaper after", "features  shard ",
                 "task 2 '1' learned", "registered models:/digits/2"):
        assert part in done.stdout, part
    assert len(list((place / "store" / "runs" / "digits").glob("*/state-*"))) == 1, (
        "only the last state is kept, for the bounds' sake")


def test_killed_in_the_middle_of_a_task_it_goes_on_from_there(place, oracle):
    """In the hypernetwork's second task first, then in the second task of a baseline."""
    killed = command(place, KILL.format(place=("partial_hn", 1, 2)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = command(place, SHOW + KILL.format(place=("naive", 1, 2)))
    assert again.returncode == -signal.SIGKILL, again.stderr
    assert sent(again)[:4] == ["partial_hn 0 end", "partial_hn 1 3", "partial_hn 1 end",
                               "naive 0 1"]
    assert "trunk: already trained" in again.stdout
    last = command(place, SHOW)
    assert last.returncode == 0, last.stderr
    assert sent(last) == ["partial_hn 0 end", "partial_hn 1 end", "naive 0 end", "naive 1 3",
                          "naive 1 end"]
    assert "trunk: already trained" in last.stdout
    result = check(place, oracle | {"images_decoded": 0})
    assert result["images_decoded"] == 0


def sent(ended: Ended) -> list[str]:
    """What the learner sent: strategy, task, and the epoch or `end`."""
    return re.findall(r"SENT (\w+ \d+ \w+);", ended.stdout)


def test_on_a_device_that_is_not_the_host(place, oracle):
    """As on a GPU: an operation on tensors of both would fail (`tests/far_device.py`)."""
    far = FAR_DEVICE.format(path=str(Path(__file__).parents[1] / "far_device.py"))
    done = command(place, far)
    assert done.returncode == 0, done.stderr
    check(place, oracle)


def test_an_unreachable_server_fails_before_the_trunk_is_trained(tmp_path, monkeypatch):
    epochs = []
    fit = local.fit_network

    def counted(*arguments):
        for record in fit(*arguments):
            epochs.append(record)
            yield record

    monkeypatch.setattr(local, "fit_network", counted)
    config = Config.from_dict(CONFIG.to_dict() | {
        "backbone": CONFIG.to_dict()["backbone"] | {"trunk_epochs": 200}})
    output = OutputConfig("digits", str(tmp_path / "store"), "http://127.0.0.1:1",
                          str(tmp_path / "result.json"))
    with pytest.raises(InputError, match=r"http://127.0.0.1:1' does not answer"):
        train(config, output, lambda _: None)
    assert len(epochs) < 10


def test_a_pass_of_retrain(tmp_path, digit_tasks, empty_registry):
    """Two tasks in the inbox become what the oracle learns of the same folders."""
    from PIL import Image
    from sklearn.datasets import load_digits

    empty_registry(tmp_path / "store")
    digits, inbox = load_digits(), tmp_path / "store" / "inbox"
    for task, labels in (("a", (0, 1)), ("b", (2, 3))):
        for label in labels:
            pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
            for number in range(40):
                folder = inbox / task / ("train" if number % 4 else "test") / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels_NHW[number]).save(folder / f"{number}.png")
        (inbox / task / "_READY").write_text("")
        os.utime(inbox / task / "_READY", (100, 100))
    values = CONFIG.to_dict() | {"train": CONFIG.to_dict()["train"] | {"compare": []}}
    values["data"] |= {"data": "inbox", "tasks": None, "task_sizes": None, "classes": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "policy.yaml").write_text("min_above_chance: null\ninbox: {min_test_images: 4}\n")
    said = []
    done = retrain(RetrainConfig("digits", str(tmp_path / "store"),
                                 policy=str(tmp_path / "policy.yaml"),
                                 config=str(tmp_path / "config.yaml")), said.append)
    assert [each["slot"] for each in done.learned] == ["a", "b"], done
    few = "the trunk learned from 60 images of task 'a' alone"
    assert sum(few in line for line in said) == 1
    assert [few in note for note in done.notes] == [True]
    champion = connect(open_storage(str(tmp_path / "store"))).resolve("models:/digits@champion")
    values["data"]["data"] = str(inbox)
    fields = run_stream(Config.from_dict(values), tmp_path / "oracle").fields
    assert champion.tags["weights_hash"] == fields["weights_hash"]
    kept = sorted(path.name for path in (tmp_path / "store" / "runs" / "digits").iterdir())
    assert kept == ["learned"], "states on the way are gone"
