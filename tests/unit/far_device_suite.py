"""Whatever learns and answers does it on a device that is not the host, to the host's bits.

`far_device` has the device: an operation on tensors of both fails there, as it does on a GPU.
"""

import dataclasses
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import BackboneConfig
from partialhn.detector.detector import Detector
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.device_memory import DeviceMemoryError
from partialhn.networks.tensors import hash_tensors
from partialhn.predict import Predictor
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.task_inference import AUTO
from partialhn.training import answers, choice, image_batches
from partialhn.training.image_batches import Labelled
from partialhn.training.learner import Learner
from partialhn.training.optimiser import load_optimiser, optimiser_tensors
from partialhn.training.pretrain import fit_network, network_optimiser, train_network

FAR = runpy.run_path(str(Path(__file__).parents[1] / "far_device.py"))
NAME, MEMORY = FAR["NAME"], FAR["MEMORY"]
LEARNERS = runpy.run_path(str(Path(__file__).with_name("learners.py")))
measured, weights_hash = LEARNERS["measured"], LEARNERS["weights_hash"]
TRUNK = BackboneConfig(trunk_epochs=3, trunk_batch_size=16)
KINDS = {**{generator: {"hypernet": {"generator": generator}}
            for generator in ("columns", "bilinear", "additive")},
         "group norm": {"hypernet": {"norm": "group"}},
         **{name: {"train": {"strategy": name}} for name in STRATEGIES if name != "partial_hn"}}


@pytest.fixture(autouse=True)
def puts_there():
    with FAR["PutsThere"]():
        yield


@pytest.fixture
def learner(network, with_options):
    def make(device=NAME, **sections):
        config = with_options(**sections)
        return Learner(cut_network(config, network).strategy(config), config.train, device,
                       inference=Detector(40, 0.05))
    return make


def stream_of(tasks):
    """Two tasks, the second of which comes again."""
    return [*tasks[:2], dataclasses.replace(tasks[3], name=f"{tasks[1].name}/2", refreshes=1)]


def test_the_device_is_one_of_its_own():
    x_B = torch.ones(3).to(NAME)
    assert x_B.device.type == NAME
    assert (x_B + torch.zeros(3, device=NAME)).cpu().tolist() == [1, 1, 1]
    for mixing in (lambda: x_B + torch.zeros(3), lambda: torch.cat([x_B, torch.ones(1)]),
                   lambda: torch.where(torch.tensor([True, False, True]), x_B, 0)):
        with pytest.raises(RuntimeError, match="far and on the host"):
            mixing()


@pytest.mark.parametrize(("norm", "closed_form"), [
    ("network", "auto"), ("network", "never"), ("batch", "auto")])
def test_heads_that_start_as_the_networks_own(learner, tasks, monkeypatch, norm, closed_form):
    """Solved from what the network's own blocks see, or trained from there; the detector sees them,
    too.
    """
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    found = {}
    for device in ("cpu", NAME):
        made = learner(device, hypernet={"starts_from": "network", "norm": norm}, train={
            "epochs": None, "min_steps": 4, "closed_form": closed_form})
        list(made.learn(tasks[:2]))
        assert made.inference.reference_norm is not None
        earlier_KE = made.strategy.tasks[0].earlier_KE
        assert (earlier_KE is None) == (closed_form == "never")
        assert earlier_KE is None or earlier_KE.device.type == device
        found[device] = answers.answer(made.strategy, 0, tasks[0].test)[0], made.finished
    assert torch.equal(found["cpu"][0], found[NAME][0])
    assert [record.without_id for record in found["cpu"][1]] == [
        record.without_id for record in found[NAME][1]]


@pytest.mark.parametrize("kind", KINDS)
def test_learning_stopping_and_going_on(learner, tasks, tmp_path, kind):
    wanted = learner("cpu", **KINDS[kind])
    list(wanted.learn(stream_of(tasks)))
    made = learner(**KINDS[kind])
    for record in made.learn(stream_of(tasks)):
        if (record.task_index, getattr(record, "epoch", 0)) == (2, 1):
            checkpoint.save(tmp_path / "state", "learner", *made.state())
    assert {value.device.type for value in made.strategy.state_dict().values()} == {NAME}
    assert (weights_hash(made), measured(made)) == (weights_hash(wanted), measured(wanted))
    again = learner(**KINDS[kind])
    again.restore(*checkpoint.load(tmp_path / "state", "learner"))
    list(again.learn(stream_of(tasks)))
    assert weights_hash(again) == weights_hash(wanted)


@pytest.mark.parametrize("kind", ["columns", "separate_heads"])
def test_tasks_learned_apart(learner, tasks, kind):
    wanted = learner("cpu", **KINDS[kind])
    list(wanted.learn(tasks[:3]))
    made, state = learner(**KINDS[kind]), None
    for index in range(3):
        one = learner(**KINDS[kind])
        if state:
            one.restore(*state)
            one.skip_to(tasks[:3], index)
        list(one.fit_next(tasks[:3]))
        owned = {name: value.cpu() for name, value in one.strategy.task_state(index).items()}
        made.load_task_state(tasks[:3], owned, one.epochs[-2:], 0.0)
        state = state or made.state()
    assert weights_hash(made) == weights_hash(wanted)


def test_features_that_are_larger_than_memory(learner, tasks, monkeypatch):
    wanted = learner("cpu")
    list(wanted.learn(tasks[:2]))
    monkeypatch.setattr(answers, "RESIDENT_BYTES", 0)
    made = learner()
    list(made.learn(tasks[:2]))
    assert weights_hash(made) == weights_hash(wanted)


@pytest.mark.parametrize("resident", [True, False])
def test_a_trunk_is_trained_there(images, monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(image_batches, "RESIDENT_BYTES", 0)

    def trained(device, stop=3):
        network = build_network("slim_resnet18", 2, 0).to(device)
        optimiser = network_optimiser(network, TRUNK)
        done = 0
        while done < 3:
            records = train_network(network, Labelled(images[:48], torch.arange(48) % 2), TRUNK,
                                    "crop-flip", optimiser, epochs_done=done)
            done += len([next(records) for _ in range(stop)])
            state = {name: value.cpu() for name, value in
                     optimiser_tensors(optimiser, network.named_parameters()).items()}
            weights = {name: value.cpu() for name, value in network.state_dict().items()}
            network = build_network("slim_resnet18", 2, 5).to(device)
            network.load_state_dict(weights)
            optimiser = network_optimiser(network, TRUNK)
            load_optimiser(optimiser, network.named_parameters(), state)
        return hash_tensors(network.state_dict())

    assert trained(NAME, stop=1) == trained("cpu")


def test_features_are_computed_there(digits, config, tmp_path):
    keys = {}
    for device in ("cpu", NAME):
        trunk = CutNetwork.of(build_network("slim_resnet18", 2, 3).to(device), 3).trunk
        store = FeatureStore(LocalFileSystem(), str(tmp_path / device))
        manifests, _ = precompute(store, trunk, feature_jobs(config, digits[:2], trunk, (2, 3)))
        keys[device] = [shard.sha256 for each in manifests for shard in each.shards]
    assert keys[NAME] == keys["cpu"]


def test_features_where_memory_is_short(digits, config, tmp_path):
    """Half as many images at once are tried; where they are too many, the numbers are told."""
    trunk = CutNetwork.of(build_network("slim_resnet18", 2, 3).to(NAME), 2).trunk
    jobs = feature_jobs(config, digits[:1], trunk)[1:2]  # one batch: threads change no peak
    assert len(jobs[0].table) <= 32

    def computed(name, room):
        store = FeatureStore(LocalFileSystem(), str(tmp_path / name))
        with warnings.catch_warnings(record=True) as said, MEMORY.limited_to(room):
            warnings.simplefilter("always")
            ((manifest,), _) = precompute(store, trunk, jobs)
        halved = [each for each in said if "half as many images at once" in str(each.message)]
        return store.open(manifest).shards[0].float(), len(halved)

    ample, halved = computed("ample", 1 << 30)
    assert not halved
    peak = MEMORY.peak
    short, halved = computed("short", int(0.8 * peak))
    assert halved == 1
    torch.testing.assert_close(short, ample, rtol=1e-2, atol=1e-2)
    with pytest.raises(DeviceMemoryError, match="features of 32 images of 16 x 16 pixels at "
                       r"once on device far.*Tried to allocate \d+ bytes.*free; allowed: "):
        computed("nothing", int(0.2 * peak))


def test_learning_where_memory_is_short(learner, tasks):
    made = learner()
    list(made.learn(tasks[:1]))
    with MEMORY.limited_to(100_000), pytest.raises(
            DeviceMemoryError, match=rf"training task '{tasks[1].name}' at batch_size 16 with .* "
            r"MB of features on device far: far out of memory.*free; allowed: a smaller batch"):
        list(made.learn(tasks[:2]))


def test_a_trunk_where_memory_is_short(digits, config, tmp_path):
    with MEMORY.limited_to(100_000), pytest.raises(
            DeviceMemoryError, match=r"training the trunk at trunk_batch_size \d+.*far out of "
            "memory.*allowed: a smaller trunk_batch_size"):
        list(fit_network(config, digits[0], LocalFileSystem(), str(tmp_path), NAME))


def test_a_model_where_memory_is_short(learner, tasks, cut, config, images, tmp_path):
    """On its way to the device, in the trunk, and in a task's head."""
    made = learner("cpu")
    list(made.learn(tasks[:1]))
    infos = (TaskInfo(tasks[0].name, ("a", "b")),)
    Model(config, cut.trunk, made.strategy, infos, inference=made.inference).save(tmp_path / "m")
    told = r": far out of memory.*free; allowed: .*device cpu, or a device with more memory$"
    with MEMORY.limited_to(1000), pytest.raises(
            DeviceMemoryError, match="^too little memory for the model on device far" + told):
        Predictor.load(tmp_path / "m", NAME)
    there = Predictor.load(tmp_path / "m", NAME)
    for exact in (True, False):
        with MEMORY.limited_to(100_000), pytest.raises(
                DeviceMemoryError, match="features of 40 images of 16 x 16 pixels at once on "
                "device far" + told):
            there.features(images[:40], exact)
    z_BCHW = there.features(images[:40])
    for task in (tasks[0].name, AUTO):
        with MEMORY.limited_to(10_000), pytest.raises(
                DeviceMemoryError, match=r"answering 40 images.*fewer images at once"):
            there.answers(z_BCHW, [task] * 40)


def test_measuring_where_memory_is_short(learner, tasks):
    made = learner()
    list(made.fit_next(tasks[:1]))
    with MEMORY.limited_to(1000), pytest.raises(
            DeviceMemoryError, match=f"measuring the tasks after {tasks[0].name!r} on device far"):
        made._conclude(tasks[:1])


@pytest.mark.parametrize("sections", [{}, {
    "hypernet": {"starts_from": "network", "norm": "network"},
    "train": {"epochs": None, "min_steps": 4}}], ids=["trained", "solved"])
def test_a_model_answers_there(learner, tasks, cut, with_options, images, tmp_path, monkeypatch,
                               sections):
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    made, config = learner(**sections), with_options(**sections)
    list(made.learn(tasks[:3]))
    infos = tuple(TaskInfo(task.name, ("a", "b")) for task in tasks[:3])
    Model(config, cut.trunk, made.strategy, infos, inference=made.inference).save(tmp_path / "m")
    there, here = (Predictor.load(tmp_path / "m", device) for device in (NAME, "cpu"))
    for exact in (True, False):
        z_BCHW = there.features(images[:40], exact)
        assert z_BCHW.device.type == NAME
        asked = [AUTO, *(task.name for task in tasks[:3])] * 10
        assert there.answers(z_BCHW, asked) == here.answers(here.features(images[:40], exact),
                                                            asked)
