"""On a GPU: steps that are recorded, that wait for nothing, and that learn what the CPU learns."""

import json
import subprocess
import sys

import pytest
import torch

from partialhn.features.batches import ResidentBatches, Workers
from partialhn.run import cut_network
from partialhn.training.learner import Learner
from partialhn.training.optimiser import learning_rates, make_optimiser
from partialhn.training.steps import UNRECORDED, CudaGraphs, Objective, Steps

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


def test_the_cpu_and_the_gpu_learn_the_same(learn):
    torch.testing.assert_close(losses(learn(device="cpu")), losses(learn(recorder=CudaGraphs())),
                               rtol=2e-2, atol=1e-2)


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
                  learning_rates(optimiser, "cosine", 20).to("cuda"), CudaGraphs())
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
    words = ["train", "--data", "digits", "--tasks", "2", "--input-size", "16", "--epochs", "2",
             "--trunk-epochs", "2", "--device", "gpu"]
    code = "from pipelines.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert result["acc"] > 0.8
