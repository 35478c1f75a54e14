"""Time of a training step: ours against a plain head of the same shape on the same features.

    python tests/bench/step.py [--quick] [--json FILE]

Rounds alternate between the two, so that a machine that slows down slows both; a row is the median
over rounds of the ratio within a round. Milliseconds are of one thread's processor time.

Legend: B batch, C channels, H W spatial.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from partialhn.backbone import build_network, split
from partialhn.config import HypernetConfig, TrainConfig
from partialhn.model import Head, head_start
from partialhn.strategies import PartialHypernet, Strategy
from partialhn.train import Objective, make_optimiser

CLASSES, BATCH = 10, 64


class PlainHead(nn.Module):
    """The stages above the cut and a classifier, as anyone would fine-tune them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        network = build_network("slim_resnet18", CLASSES)
        self.stages = split(network, depth)[1]
        self.classifier = nn.Linear(network.width, CLASSES)

    def forward(self, z_BCHW, y_B):
        logits_BK = self.classifier(self.stages(z_BCHW).mean((2, 3)))
        return nn.functional.cross_entropy(logits_BK, y_B)


def features(depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of real-sized features: what is in them does not matter for time."""
    trunk, _ = split(build_network("slim_resnet18", CLASSES), depth)
    images_BCHW = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    return trunk(images_BCHW), torch.randint(0, CLASSES, (BATCH,))


def ours(depth: int, earlier: int, config: HypernetConfig) -> Strategy:
    """Our strategy as it is while it learns a task after `earlier` others."""
    network = build_network("slim_resnet18", CLASSES)
    head = Head(network, depth, config.norm, config.norm_groups)
    strategy = PartialHypernet(head, head_start(network, depth, config.norm, 0), config, 0)
    for task in range(earlier + 1):
        strategy.add_task(CLASSES)
        if task < earlier:
            strategy.finish(task)
    strategy.begin(earlier)
    return strategy.train()


def stepper(module, optimiser, batch):
    """A function that takes one step."""
    def step() -> None:
        out = module(*batch)
        loss = out[0] if isinstance(out, tuple) else out
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return step


def measure(first, second, rounds: int, steps: int) -> tuple[float, float, float]:
    """Median milliseconds of each, and the median ratio of pairs."""
    def once(step) -> float:
        start = time.process_time()
        for _ in range(steps):
            step()
        return 1e3 * (time.process_time() - start) / steps

    once(first), once(second)
    pairs = [(once(first), once(second)) for _ in range(rounds)]
    return (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
            statistics.median(a / b for a, b in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rounds, steps = (3, 3) if options.quick else (9, 8)
    rows = []
    for depth in (1, 2, 3, 4):
        z_BCHW, y_B = features(depth)
        plain = PlainHead(depth).train()
        base = stepper(plain, torch.optim.Adam(plain.parameters(), 1e-3, fused=True),
                       (z_BCHW, y_B))
        for earlier in (0, 1, 10, 100):
            strategy = ours(depth, earlier, HypernetConfig())
            step = stepper(Objective(strategy, earlier, 0.0),
                           make_optimiser(strategy, TrainConfig()), (z_BCHW, y_B, 1.0))
            mine, theirs, ratio = measure(step, base, rounds, steps)
            goal = 3.0 if depth == 4 else 1.15
            rows.append({"name": f"step/plain-head/depth{depth}/t{earlier}",
                         "baseline": "plain nn.Module head", "ratio": round(ratio, 3),
                         "goal": goal, "holds": ratio <= goal, "median_ms": round(mine, 2),
                         "baseline_ms": round(theirs, 2)})
            print("{name:34} {median_ms:8.2f} ms  {baseline_ms:8.2f} ms  ratio {ratio:.3f}  "
                  "goal {goal}  {holds}".format(**rows[-1]), flush=True)
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(),
                   "torch": torch.__version__, "threads": 1}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
