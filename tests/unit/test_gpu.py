"""On a GPU: steps that are recorded, that wait for nothing, and that learn what the CPU learns."""

import functools

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.config import BackboneConfig, Config, DataConfig, TrainConfig
from partialhn.features.batches import ResidentBatches, Workers
from partialhn.features.extract import feature_jobs, group_jobs, precompute, shard_places
from partialhn.features.shards import compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.run import StreamRun, cut_network
from partialhn.training.image_batches import Labelled
from partialhn.training.learner import Learner
from partialhn.training.optimiser import learning_rates, make_optimiser
from partialhn.training.pretrain import network_optimiser, train_network
from partialhn.training.steps import UNRECORDED, CudaGraphs, Objective, Steps
from partialhn.training.stream_at_once import learn_at_once

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
KINDS = {"columns": {}, "bilinear": {"hypernet": {"generator": "bilinear"}},
         "additive": {"hypernet": {"generator": "additive"}},
         **{name: {"train": {"strategy": name}} for name in ("separate_heads", "ewc", "lwf")}}


@pytest.fixture
def learn(network, tasks, with_options):
    def learn(kind="columns", device="cuda", recorder=None, **train):
        sections = {name: dict(values) for name, values in KINDS[kind].items()}
        sections.setdefault("train", {}).update({"batch_size": 8, **train})
        config = with_options(**sections)
        learner = Learner(cut_network(config, network).strategy(config), config.train, device,
                          recorder=recorder)
        list(learner.learn(tasks[:3]))
        return learner
    return learn


def losses(learner):
    return [record.loss for record in learner.epochs]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_learn_what_unrecorded_ones_do(learn, kind):
    """Kernels may add in another order, so not to the bit."""
    torch.testing.assert_close(losses(learn(kind, recorder=CudaGraphs())), losses(learn(kind)),
                               rtol=1e-2, atol=5e-3)


def test_the_cpu_and_the_gpu_begin_the_same_and_learn_as_well(learn):
    """Rounding grows with the steps: early ones must agree, and later ones be as good."""
    there, here = learn(recorder=CudaGraphs()), learn(device="cpu")
    torch.testing.assert_close(losses(there)[:1], losses(here)[:1], rtol=5e-3, atol=1e-4)
    torch.testing.assert_close(losses(there), losses(here), rtol=0.15, atol=0.05)
    for one, other in zip(there.finished, here.finished, strict=True):
        assert one.accuracy_row == pytest.approx(other.accuracy_row, abs=0.15)


def test_tasks_at_once_learn_what_they_learn_alone(network, tasks, with_options):
    """Three threads on streams of their own, each of which records its steps."""
    config = with_options(train={"batch_size": 8})
    cut = cut_network(config, network)

    def learner(own):
        return Learner(own.strategy(config), config.train, "cuda", recorder=CudaGraphs())

    alone, model = learner(cut.apart()), learner(cut.apart())
    list(alone.learn(tasks))
    list(learn_at_once(model, tasks, [functools.partial(learner, cut.apart()) for _ in range(3)],
                       lambda: None))
    torch.testing.assert_close(losses(model), losses(alone), rtol=1e-2, atol=5e-3)


def test_bfloat16_learns_too(learn):
    torch.testing.assert_close(losses(learn(recorder=CudaGraphs(), precision="bfloat16")),
                               losses(learn(recorder=CudaGraphs())), rtol=0.1, atol=0.05)


def test_a_step_waits_for_nothing(network, tasks, with_options):
    config = with_options(train={"batch_size": 8})
    strategy = cut_network(config, network).strategy(config).to("cuda")
    for task in range(2):
        strategy.add_task(2)
        strategy.to("cuda")
        strategy.begin(task)
        if task == 0:
            strategy.finish(task)
    read = ResidentBatches(tasks[1].train.to(torch.device("cuda")), 8, Workers())
    optimiser = make_optimiser(strategy, config.train)
    steps = Steps(Objective(strategy.train(), 1, 0.0), optimiser,
                  learning_rates(optimiser, "cosine", 20).to("cuda"), CudaGraphs(), read.steps_1)
    read.begin((0, 1, 1))
    for _ in range(UNRECORDED + 1):
        steps.run_next(read)
    read.begin((0, 1, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            steps.run_next(read)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(steps.terms_3).all()


def test_a_run_on_the_gpu(tmp_path):
    config = Config(DataConfig(data="digits", tasks=2, input_size=16),
                    BackboneConfig(trunk_epochs=2), train=TrainConfig(epochs=2))
    run = StreamRun(config, tmp_path, "cuda")
    assert [record.task for record in run.records()][:2] == ["trunk", "trunk"]
    assert run.fields()["acc"] > 0.8


def test_a_recorded_trunk_is_the_unrecorded_one(images):
    """Kernels may add in another order, so not to the bit."""
    found, config = [], BackboneConfig(trunk_epochs=3, trunk_batch_size=16)
    for recorder in (None, CudaGraphs()):
        network = build_network("slim_resnet18", 2, 0).to("cuda")
        records = train_network(network, Labelled(images[:96], torch.arange(96) % 2), config,
                                "crop-flip", network_optimiser(network, config),
                                recorder=recorder)
        found.append([record.loss for record in records])
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_come_whole_and_without_waiting(digits, with_options, tmp_path, dtype):
    """Streams and pinned buffers lose and mix nothing: the features are the CPU's, up to rounding,
    and no call in between waits for the GPU.
    """
    config, found = with_options(features={"feature_dtype": dtype, "shard_rows": 40}), []
    for device in ("cpu", "cuda"):
        trunk = CutNetwork.of(build_network("slim_resnet18", 2, 3).to(device), 3).trunk
        store = FeatureStore(LocalFileSystem(), str(tmp_path / device))
        jobs = feature_jobs(config, digits[:1], trunk, (2, 3))
        groups = group_jobs(jobs)
        places = shard_places(groups)
        list(compute_shards(store, trunk, groups, places[:1]))  # what libraries set up at first
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            list(compute_shards(store, trunk, groups, places[1:]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        manifests, _ = precompute(store, trunk, jobs)
        opened = [store.open(manifest) for manifest in manifests]
        found.append([torch.cat([features.gather(torch.arange(len(features)),
                                                 torch.full((len(features),), view))
                                 for view in range(features.views)]) for features in opened])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=0.02, atol=0.02 * here.abs().max().item())
