"""Channels last in memory against channels first on a CPU: blocks, and the trunk's training.

    python tests/bench/layouts.py [--quick] [--json FILE]

A ratio of time is the median over rounds that alternate, in one thread. A row has a goal where the
product chooses channels last (`prefers_channels_last`).

Legend: B batch, C channels, H W spatial, N images, K classes.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from rows import compare, log, row, write
from torch import nn

from partialhn.config import Config
from partialhn.networks.backbone import build_network, pooled, prefers_channels_last
from partialhn.networks.cut import CutNetwork
from partialhn.networks.precision import configure_torch
from partialhn.training.image_batches import Labelled
from partialhn.training.pretrain import network_optimiser, train_network

BATCH, CLASSES = 64, 10
NETWORKS = {("slim_resnet18", 32): (0, 1, 2, 3), ("timm:resnet18", 96): (0, 3, 5),
            ("timm:tf_efficientnet_lite0", 128): (5, 12, 16),
            ("torchvision:mobilenet_v3_small", 96): (6,), ("timm:convnext_tiny", 96): (6,)}


def step(blocks: nn.Sequential, z_BCHW: torch.Tensor):
    """A function that runs blocks forward and backward."""
    y_B = torch.randint(0, CLASSES, (len(z_BCHW),))

    def run() -> None:
        for parameter in blocks.parameters():
            parameter.grad = None
        logits_BK = pooled(blocks(z_BCHW))[:, :CLASSES]
        nn.functional.cross_entropy(logits_BK, y_B).backward()
    return run


def steps(rounds: int):
    """The blocks above some cuts of each network."""
    for (name, size), depths in NETWORKS.items():
        network = build_network(name, CLASSES, input_size=size)
        for depth in depths:
            cut = CutNetwork.of(network, depth)
            shape = cut.trunk(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1:]
            z_BCHW, blocks = torch.randn(BATCH, *shape), cut.stages.train()
            last, first, ratio, spread = compare(
                step(blocks, z_BCHW.contiguous(memory_format=torch.channels_last)),
                step(blocks, z_BCHW), rounds, 1)
            yield row(f"layout/{name.split(':')[-1]}/depth{depth}", "channels first", ratio,
                      1.0 if prefers_channels_last(cut.stages) else None, median_ms=last,
                      baseline_ms=first, spread=round(spread, 3))


def trunk(rounds: int):
    """An epoch of the default trunk's training on 512 images of two classes."""
    network, config = build_network("slim_resnet18", 2), Config()
    backbone = dataclasses.replace(config.backbone, trunk_epochs=1)
    images = Labelled(torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8),
                      torch.randint(0, 2, (512,)))

    def epoch(channels_last: bool):
        def run() -> None:
            network._channels_last = channels_last
            list(train_network(network, images, backbone, config.features.augment,
                               network_optimiser(network, backbone)))
        return run

    last, first, ratio, spread = compare(epoch(True), epoch(False), rounds, 1)
    yield row("layout/trunk-training", "channels first", ratio, 0.9, median_ms=last,
              baseline_ms=first, spread=round(spread, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    configure_torch(1)
    rounds, rows = 3 if options.quick else 9, []
    for group in (trunk(rounds), steps(rounds)):
        for made in group:
            rows.append(made)
            log(made)
    write(options.json, rows)


if __name__ == "__main__":
    main()
