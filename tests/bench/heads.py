"""All tasks' heads over one batch of features: one after the other, or stacked under vmap.

    python tests/bench/heads.py

What `partialhn.task_inference.entropies` does for a batch whose tasks are not known. Milliseconds
of one thread, median of rounds that alternate; the ratio is stacked to looped.
"""

import statistics
import time

import torch

from partialhn.config import BackboneConfig, Config
from partialhn.networks.backbone import build_network
from partialhn.run import cut_network

CLASSES, IMAGES = 10, 256


def stacked(head, weights):
    """Logits of every task by vmap over the stacked weights, (T, B, K)."""
    skeleton = head.__dict__["_skeleton"]
    tensors = {}
    for own in weights:
        parts = own.norm.split(head._vector_sizes)
        named = own.convolutions | dict(zip(head._vector_names, parts, strict=True))
        if head._statistic_names:
            halves = torch.cat([torch.zeros_like(head.epsilons), 1 - head.epsilons])
            named |= dict(zip(head._statistic_names, halves.split(head._statistic_widths * 2),
                              strict=True))
        for name, value in named.items():
            tensors.setdefault(name, []).append(value)
    stacks = {name: torch.stack(values) for name, values in tensors.items()}
    classifier = torch.stack([own.classifier_KF for own in weights])
    bias = torch.stack([own.bias_K for own in weights])

    def one(tensors, classifier_KF, bias_K, z_BCHW):
        out = torch.func.functional_call(skeleton, tensors, (z_BCHW,), strict=True)
        return torch.nn.functional.linear(out.mean((2, 3)), classifier_KF, bias_K)

    mapped = torch.vmap(one, in_dims=(0, 0, 0, None))
    return lambda z_BCHW: mapped(stacks, classifier, bias, z_BCHW)


def case(depth, tasks, images):
    config = Config(backbone=BackboneConfig(freeze_depth=depth))
    cut = cut_network(config, build_network("slim_resnet18", CLASSES))
    strategy = cut.strategy(config)
    for task in range(tasks):
        strategy.add_task(CLASSES)
        strategy.finish(task)
    strategy.requires_grad_(False).eval()
    weights = [strategy.weights(task) for task in range(tasks)]
    z_BCHW = cut.trunk(torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8))
    together = stacked(strategy.head, weights)
    looped = torch.stack([strategy.head(z_BCHW, own) for own in weights])
    torch.testing.assert_close(together(z_BCHW), looped, rtol=1e-3, atol=1e-4)
    middle = medians(looped=lambda: [strategy.head(z_BCHW, own) for own in weights],
                     stacked=lambda: together(z_BCHW))
    print(f"depth {depth}, {tasks:3d} tasks, {images:3d} images: "
          f"looped {middle['looped']:8.1f} ms, "
          f"stacked {middle['stacked']:8.1f} ms, ratio "
          f"{middle['stacked'] / middle['looped']:.2f}")


def medians(**ways):
    """Milliseconds of each way, in rounds that alternate."""
    times = {name: [] for name in ways}
    for _ in range(9):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        for depth in (2, 3, 4):
            for tasks in (5, 20):
                for images in (1, 16, 64):
                    case(depth, tasks, images)
