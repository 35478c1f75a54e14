"""What a second `train` under the same name does to the tasks that the champion knows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.registry.models import roll_back
from pipelines.retrain.journal import Journal
from pipelines.retrain.run import retrain
from pipelines.settings import OutputConfig, RetrainConfig
from pipelines.train import train


def put_task(folder: Path, labels, start: int = 0) -> None:
    """Two digits as image folders, twenty images each."""
    digits = load_digits()
    for label in labels:
        pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
        for number in range(start, start + 20):
            place = folder / ("train" if number % 4 else "test") / f"c{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_NHW[number]).save(place / f"{number}.png")


class Streams:
    """Streams of one storage, each of tasks in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, open_storage(str(root / "store"))
        torch.manual_seed(0)
        save_file({key: value.contiguous() for key, value in
                   build_network("slim_resnet18", 2).state_dict().items()
                   if not key.startswith("fc")}, root / "trunk.safetensors")
        put_task(root / "all" / "alpha", (0, 1))
        put_task(root / "all" / "gamma", (2, 3))
        put_task(root / "all" / "beta", (4, 5))

    def begin(self, name: str, tasks=("alpha", "gamma")) -> Path:
        """A stream that has learned some tasks; returns its folder of tasks."""
        for task in tasks:
            self.add(name, task)
        self.train(name)
        return self.root / name

    def add(self, name: str, task: str, source: str | None = None) -> None:
        shutil.copytree(self.root / "all" / (source or task), self.root / name / task)

    def train(self, name: str, *, replace: bool = False, also=lambda _: None,
              **options) -> tuple[dict, list[str]]:
        """Result and lines of a run; `also` is called with each line as it comes."""
        lines: list[str] = []

        def log(line: str) -> None:
            lines.append(line)
            also(line)

        config = Config.from_dict({
            "data": {"data": str(self.root / name), "input_size": 16},
            "backbone": {"freeze_depth": 4, "trunk": str(self.root / "trunk.safetensors")},
            "train": {"epochs": 1} | options, "compute": {"threads": 1}})
        result = train(config, OutputConfig(name, self.storage.uri, None,
                                            str(self.root / "result.json"), replace), log)
        return result, lines

    def refused(self, name: str, **options) -> str:
        """The message of a run that is refused; nothing of the registry has changed then."""
        before = self.state(name)
        with pytest.raises(InputError, match="this run does not continue") as error:
            self.train(name, **options)
        assert self.state(name) == before, "a refused run changes nothing"
        return str(error.value)

    def state(self, name: str):
        registry = self.registry
        return (registry.versions(name), registry.aliases.history(name).entries(),
                len(registry._client.search_runs([registry._experiment(name)])))

    @property
    def registry(self):
        return connect(self.storage)

    def champion(self, name: str) -> list[str]:
        """The tasks that the champion answers for, in the order of its versions."""
        return self.registry.load_predictor(f"models:/{name}@champion")[0].tasks


@pytest.fixture(scope="module")
def streams(module_without_ray, tmp_path_factory, empty_registry):
    root = tmp_path_factory.mktemp("continuation")
    empty_registry(root / "store")
    return Streams(root)


def test_new_tasks_come_behind_learned_ones_whatever_their_names(streams):
    streams.begin("grows")
    before = streams.registry.versions("grows")
    streams.add("grows", "beta")
    streams.add("grows", "0-first", "beta")
    shutil.rmtree(streams.root / "grows" / "0-first" / "train" / "c4")
    shutil.rmtree(streams.root / "grows" / "0-first" / "test" / "c4")
    put_task(streams.root / "grows" / "0-first", (6,))
    result, lines = streams.train("grows")
    assert "continues models:/grows@champion (version 2): 2 kept, 2 new: 0-first, beta" in lines
    assert not [line for line in lines if "'alpha' learned" in line or "'gamma' learned" in line]
    assert streams.champion("grows") == ["alpha", "gamma", "0-first", "beta"]
    assert [v.tags["prefix"] for v in streams.registry.versions("grows")[:2]] == [
        v.tags["prefix"] for v in before]
    assert result["continues"] == {
        "champion": 2, "kept": ["alpha", "gamma"], "new": ["0-first", "beta"], "left_out": [],
        "known": [], "renamed": {}, "again": {}, "brought_back": []}


def test_a_task_that_is_gone_is_named_and_the_run_refused(streams):
    folder = streams.begin("shrinks", ("alpha", "gamma", "beta"))
    shutil.rmtree(folder / "beta")
    assert "task 'beta' is left out" in streams.refused("shrinks")
    assert streams.champion("shrinks") == ["alpha", "beta", "gamma"]
    result, lines = streams.train("shrinks", replace=True)
    assert result["continues"]["left_out"] == ["beta"]
    assert "  task 'beta' is left out: it is not among the data" in lines
    assert streams.champion("shrinks") == ["alpha", "gamma"]
    assert result["champion"] == streams.registry.resolve("models:/shrinks@champion").version


def test_a_task_with_another_name_is_recognised_by_its_images(streams):
    folder = streams.begin("renames")
    (folder / "alpha").rename(folder / "omega")
    message = streams.refused("renames")
    assert "task 'alpha' is named 'omega' now (the same images)" in message
    assert "task 'gamma' is learned again: a task before it is not the same" in message
    result, _ = streams.train("renames", replace=True)
    assert result["continues"]["renamed"] == {"alpha": "omega"}
    assert streams.champion("renames") == ["omega", "gamma"], "it keeps its place"


def test_other_images_of_a_task_are_refused(streams):
    folder = streams.begin("images")
    put_task(folder / "gamma", (2, 3), start=20)
    assert "task 'gamma' is learned again: its images" in streams.refused("images")
    assert "'alpha'" not in streams.refused("images")


def test_other_options_and_another_trunk_are_refused(streams):
    streams.begin("options")
    message = streams.refused("options", epochs=2, seed=3)
    assert "task 'alpha' is learned again: train.epochs is 2, was 1; train.seed is 3, was 0" in (
        message)
    assert "another --name" in message
    network = build_network("slim_resnet18", 2, 7)
    trunk = streams.root / "trunk.safetensors"
    kept = trunk.read_bytes()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()
               if not key.startswith("fc")}, trunk)
    try:
        assert "the trunk's weights are not the same" in streams.refused("options")
    finally:
        trunk.write_bytes(kept)


def test_while_a_run_replaces_the_champion_the_old_one_stays_until_the_last_task(streams):
    streams.begin("replaces")
    streams.train("replaces", replace=True, epochs=2)
    moves = [(entry.origin, entry.move.to) for entry in
             streams.registry.aliases.history("replaces").entries()
             if entry.move.alias == "champion"]
    assert moves == [(None, 1), (1, 2), (2, 4)]


def test_another_run_that_makes_a_champion_meanwhile_is_not_undone(streams):
    """Both find no champion when they begin, so neither is refused then."""
    streams.add("race", "alpha")
    others = []

    def meanwhile(line: str) -> None:
        if line.startswith("features: ") and not others:
            others.append(streams.train("race", epochs=2)[0])

    with pytest.raises(InputError, match=r"version 1 \(task 'alpha'\) while this run learned"):
        streams.train("race", also=meanwhile)
    assert [version.task for version in streams.registry.versions("race")] == ["alpha"]
    assert streams.train("race", epochs=2)[0]["weights_hash"] == others[0]["weights_hash"]


def test_a_version_that_was_deleted_in_mlflow_is_registered_again(streams):
    streams.begin("deleted")
    streams.registry._client.delete_model_version("deleted", "1")
    result, lines = streams.train("deleted")
    assert "continues models:/deleted@champion (version 2): 2 kept" in lines
    assert [version.task for version in streams.registry.versions("deleted")] == ["gamma", "alpha"]
    assert (result["champion"], streams.champion("deleted")) == (2, ["alpha", "gamma"])


def test_where_a_deleted_version_hides_the_order_the_reason_says_so(streams):
    streams.begin("hidden", ("gamma",))
    streams.add("hidden", "alpha")
    streams.train("hidden")
    streams.registry._client.delete_model_version("hidden", "1")
    assert "versions that it was learned from were deleted in MLflow" in streams.refused("hidden")


def test_a_rollback_is_not_undone_by_training_again(streams):
    streams.begin("back")
    roll_back(streams.registry, "back", None, "gamma is wrong")
    result, lines = streams.train("back")
    assert result["champion"] == 1
    assert any("champion stays version 1 (task 'alpha'): rollback by" in line
               and "'gamma is wrong'" in line for line in lines)
    assert not any(line.strip().startswith("registered") for line in lines)
    streams.add("back", "beta")
    assert "task 'gamma' comes back" in streams.refused("back")
    shutil.rmtree(streams.root / "back" / "gamma")
    streams.train("back")
    assert streams.champion("back") == ["alpha", "beta"]


def test_a_result_that_cannot_be_written_is_refused_before_anything(streams):
    streams.begin("result")
    (streams.root / "a-file").write_text("")
    for path in (streams.root, streams.root / "a-file" / "result.json"):
        with pytest.raises(InputError, match="result is"):
            train(Config(), OutputConfig("result", streams.storage.uri, None, str(path)))


def test_a_model_that_was_renamed_in_mlflow_can_be_renamed_back(streams):
    """The refusal comes first, so that no empty model of the old name stands in the way."""
    streams.begin("old")
    client = streams.registry._client
    client.rename_registered_model("old", "new")
    with pytest.raises(InputError, match=r"is named 'new' in MLflow now.*rename 'new' back"):
        streams.train("old")
    streams.add("new", "alpha")
    with pytest.raises(InputError, match="'new' was named 'old' when its history"):
        streams.train("new", replace=True)
    assert "old" not in streams.registry.streams()
    client.rename_registered_model("new", "old")
    streams.train("old")
    assert json.loads((streams.root / "result.json").read_text())["champion"] == 2


# `retrain` goes on with what `train` began ---------------------------------------------------


def passed(streams, name: str, **settings):
    """One pass of `retrain` with a gate that passes everything."""
    policy = streams.root / "policy.yaml"
    policy.write_text("min_above_chance: null\nmax_loss_on_earlier_task: null\n")
    return retrain(RetrainConfig(name, streams.storage.uri, policy=str(policy), **settings),
                   lambda _: None)


def arrive(streams, task: str, labels, start: int = 0) -> None:
    put_task(streams.root / "store" / "inbox" / task, labels, start)
    (streams.root / "store" / "inbox" / task / "_READY").write_text("")


def test_retrain_goes_on_with_a_stream_that_train_began(streams):
    streams.begin("both")
    before = streams.registry.versions("both")
    arrive(streams, "delta", (6, 7))
    would = passed(streams, "both", dry_run=True).would
    assert would == ["take alpha over, which `partialhn train` learned",
                     "take gamma over, which `partialhn train` learned",
                     "learn delta (26 training images)"]
    assert Journal(streams.storage, "both").events() == [], "a dry run writes nothing"
    done = passed(streams, "both")
    assert (done.adopted, [task["slot"] for task in done.learned]) == (["alpha", "gamma"],
                                                                       ["delta"])
    versions = streams.registry.versions("both")
    assert [v.tags for v in versions[:2]] == [v.tags for v in before], "as they were"
    assert versions[2].tags["parent"] == versions[1].tags["prefix"]
    assert streams.champion("both") == ["alpha", "gamma", "delta"]
    assert passed(streams, "both").did_nothing
    streams.add("both", "delta", "beta")
    shutil.rmtree(streams.root / "both" / "delta")
    shutil.copytree(streams.root / "store" / "inbox" / "delta", streams.root / "both" / "delta")
    (streams.root / "both" / "delta" / "_READY").unlink()
    streams.add("both", "beta")
    result, _ = streams.train("both")
    assert result["continues"]["kept"] == ["alpha", "gamma", "delta"], "and train goes on, too"
    assert passed(streams, "both").adopted == ["beta"]
    shutil.rmtree(streams.root / "store" / "inbox")


def test_a_dry_run_refuses_what_the_pass_refuses(streams):
    streams.begin("refuses")
    arrive(streams, "delta", (6, 7))
    champion = streams.registry.resolve("models:/refuses@champion")
    trunk = streams.root / "trunk.safetensors"
    kept = trunk.read_bytes()

    def same(text: str) -> None:
        for dry_run in (True, False):
            with pytest.raises(InputError, match=text):
                passed(streams, "refuses", dry_run=dry_run)

    save_file({key: value.contiguous() for key, value in
               build_network("slim_resnet18", 2, 7).state_dict().items()
               if not key.startswith("fc")}, trunk)
    try:
        same("but the tasks of the stream were learned on")
    finally:
        trunk.write_bytes(kept)
    folder = streams.root / "store" / "runs" / "refuses" / "learned" / champion.tags["prefix"]
    folder.rename(folder.with_name("elsewhere"))
    try:
        same("of the 2 models up to its champion .version 2., 1 are stored")
    finally:
        folder.with_name("elsewhere").rename(folder)
    client = streams.registry._client
    client.rename_registered_model("refuses", "renamed")
    same("is named 'renamed' in MLflow now")
    assert "refuses" not in streams.registry.streams()
    client.rename_registered_model("renamed", "refuses")
    with pytest.raises(InputError, match="there is no registry at"):
        passed(streams, "refuses", tracking_uri=f"sqlite:///{streams.root}/none.db")
    assert not (streams.root / "none.db").exists()
    shutil.rmtree(streams.root / "store" / "inbox")
