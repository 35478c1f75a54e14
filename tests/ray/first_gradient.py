"""The gradient of a second task's first step, as one worker of several sees it.

Run as: first_gradient.py RANK WORLD PORT FOLDER; writes FOLDER/gradient.safetensors.
"""

import sys
from pathlib import Path

import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import save_file

from partialhn.config import BackboneConfig, Config, DataConfig, HypernetConfig, TrainConfig
from partialhn.data.datasets import open_stream
from partialhn.features.batches import Workers, epoch_batches
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.run import collect, cut_network
from partialhn.training.steps import Objective
from pipelines.execution.on_ray import _data_parallel

CONFIG = Config(
    data=DataConfig(data="digits", task_sizes=(5, 5), input_size=16),
    backbone=BackboneConfig(freeze_depth=3),
    hypernet=HypernetConfig(generator="bilinear", code_dim=8, norm="group", norm_groups=4),
    train=TrainConfig(batch_size=15))


def main(rank: int, world: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    cut = cut_network(CONFIG, build_network("slim_resnet18", 5, seed=1).eval())
    experiences = open_stream(CONFIG.data, folder / "datasets")
    store = FeatureStore(LocalFileSystem(), str(folder))
    jobs = feature_jobs(CONFIG, experiences, cut.trunk)
    manifests, _ = precompute(store, cut.trunk, jobs)
    tasks = collect(store, jobs, manifests, experiences)

    strategy = cut.strategy(CONFIG)
    for index, task in enumerate(tasks):
        strategy.add_task(task.classes)
        strategy.begin(index)
    workers = Workers()
    if world > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank,
                                             world_size=world)
        workers = Workers(rank, world, _data_parallel)
    objective = workers.data_parallel(Objective(strategy.train(), 1, 0.0))
    batch = next(epoch_batches(tasks[1].train, CONFIG.train.batch_size, (0, 1, 1), workers))
    assert len(batch.y_B) == len(range(rank, CONFIG.train.batch_size, world))
    loss, _ = objective(*batch)
    loss.backward()
    save_file({name: value.grad for name, value in strategy.named_parameters()
               if value.grad is not None}, folder / "gradient.safetensors")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
