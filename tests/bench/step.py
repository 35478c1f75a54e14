"""Time and memory of a training step against a plain head, and against the method as published.

    python tests/bench/step.py [--quick] [--json FILE] [--plot FILE]

Milliseconds are processor time of one thread; a ratio is the median over rounds that alternate.

Legend: B batch, C channels, H W spatial.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from published import BETA, PublishedStep
from rows import compare, log, row, write
from torch import nn

from partialhn.config import Config, HypernetConfig, TrainConfig
from partialhn.networks.backbone import build_network, from_map, pooled
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import Head, head_start
from partialhn.networks.precision import configure_torch
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.training.optimiser import make_optimiser
from partialhn.training.steps import Objective

CLASSES, BATCH = 10, 64
TASKS = (0, 1, 10, 100)
DEFAULT = HypernetConfig()
SHARED = HypernetConfig(generator="bilinear", code_dim=128)
"""All tasks share one set of columns, which move for every task, held by the regulariser."""
DICTIONARY = HypernetConfig(dictionary=24, dictionary_after=1)
"""Tasks after the second have the input sides of their columns in the dictionary."""
TASK_BYTES = 20_000
"""What a task may add to the checkpoint at depth 3."""


class Net(NamedTuple):
    """A backbone for images of some size."""

    name: str
    size: int

    def cut(self, depth: int) -> CutNetwork:
        return CutNetwork.of(build_network(self.name, CLASSES, input_size=self.size), depth)


SLIM = Net("slim_resnet18", 32)
TRANSFORMER = Net("timm:vit_small_patch16_224", 112)
"""A transformer of 50 tokens an image; its last two blocks are the head."""


class PlainHead(nn.Module):
    """The blocks above the cut and a classifier, as anyone would fine-tune them."""

    def __init__(self, net: Net, depth: int) -> None:
        super().__init__()
        cut = net.cut(depth)
        self.stages, self.layout = cut.stages, cut.layout
        self.classifier = nn.Linear(cut.width, CLASSES)

    def forward(self, z_BCHW, y_B):
        logits_BK = self.classifier(pooled(self.stages(from_map(z_BCHW, self.layout))))
        return nn.functional.cross_entropy(logits_BK, y_B)


class DirectRegulariser(nn.Module):
    """Our strategy with the regulariser as the sum it stands for: old weights generated twice."""

    def __init__(self, strategy: PartialHypernet, task: int) -> None:
        super().__init__()
        self.strategy, self.task = strategy, task
        with torch.no_grad():
            self.codes = [own.code.clone() for own in strategy.tasks[:task]]

    def forward(self, z_BCHW, y_B, share):
        loss = share * nn.functional.cross_entropy(self.strategy(z_BCHW, self.task), y_B)
        for code in self.codes:
            with torch.no_grad():
                old = self.strategy.hypernet(1, code)
            new = self.strategy.hypernet(1, code)
            loss = loss + BETA / len(self.codes) * sum(
                (mine - theirs).square().sum() for mine, theirs in zip(new, old, strict=True))
        return loss


def images(size: int = SLIM.size) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch: what is in it does not matter for time."""
    return (torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8),
            torch.randint(0, CLASSES, (BATCH,)))


def features(depth: int, net: Net = SLIM) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of stored features."""
    images_BCHW, y_B = images(net.size)
    return net.cut(depth).trunk(images_BCHW).contiguous(), y_B


def strategy_at(depth: int, earlier: int, config: HypernetConfig,
                net: Net = SLIM) -> PartialHypernet:
    """Our strategy as it is while it learns a task after `earlier` others."""
    cut = net.cut(depth)
    whole = Config(hypernet=config)
    norm = whole.hypernet.norm
    head = Head(cut, norm, config.norm_groups)
    strategy = PartialHypernet(head, head_start(cut, norm, 0), whole)
    for task in range(earlier + 1):
        strategy.add_task(CLASSES)
        if task < earlier:
            if config.dictionary:  # columns without an update would leave no directions
                for value in strategy.hypernet.columns.parameters():
                    nn.init.normal_(value)
            strategy.finish(task)
            strategy.conclude(task)
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


def plain(depth: int, batch, net: Net = SLIM):
    """A step of the plain head."""
    head = PlainHead(net, depth).train()
    return stepper(head, torch.optim.Adam(head.parameters(), 1e-3, fused=True), batch)


def ours(depth: int, earlier: int, batch, config: HypernetConfig = DEFAULT, net: Net = SLIM):
    """A step of ours."""
    strategy = strategy_at(depth, earlier, config, net)
    return stepper(Objective(strategy, earlier, 0.0), make_optimiser(strategy, TrainConfig()),
                   (*batch, 1.0, ()))


def direct(depth: int, earlier: int, batch):
    """A step of ours with the direct regulariser."""
    strategy = strategy_at(depth, earlier, SHARED)
    return stepper(DirectRegulariser(strategy, earlier), make_optimiser(strategy, TrainConfig()),
                   (*batch, 1.0))


def published(depth: int, earlier: int):
    """A step of the method as published, on images."""
    module = PublishedStep(depth, earlier, CLASSES)
    return stepper(module, torch.optim.Adam(module.hypernet.parameters(), 1e-3), images())


def against_a_plain_head(rounds: int, steps: int):
    """Goal 1, and goal 2 of the same numbers."""
    for depth in (1, 2, 3, 4):
        batch = features(depth)
        base = plain(depth, batch)
        for earlier in TASKS:
            mine, theirs, ratio, spread = compare(ours(depth, earlier, batch), base, rounds, steps)
            yield row(f"step/plain-head/depth{depth}/t{earlier}", "plain nn.Module head", ratio,
                      3.0 if depth == 4 else 1.15, median_ms=mine, baseline_ms=theirs,
                      spread=round(spread, 3))
        late, early, ratio, spread = compare(ours(depth, 100, batch), ours(depth, 1, batch), rounds,
                                             steps)
        yield row(f"step/flat/depth{depth}/t100", "the same step after 1 task", ratio, 1.05,
                  median_ms=late, baseline_ms=early, spread=round(spread, 3))
    batch = features(3)
    base = plain(3, batch)
    for name, config in (("shared-columns", SHARED), ("dictionary", DICTIONARY)):
        for earlier in (10, 100):
            mine, theirs, ratio, spread = compare(ours(3, earlier, batch, config), base, rounds,
                                                 steps)
            yield row(f"step/plain-head/{name}/depth3/t{earlier}", "plain nn.Module head",
                      ratio, 1.15, median_ms=mine, baseline_ms=theirs, spread=round(spread, 3))


def of_a_transformer(rounds: int, steps: int):
    """The step of a generated transformer head against a plain one of the same shape."""
    depth = 11
    batch = features(depth, TRANSFORMER)
    base = plain(depth, batch, TRANSFORMER)
    for earlier in (1, 100):
        mine, theirs, ratio, spread = compare(ours(depth, earlier, batch, net=TRANSFORMER), base,
                                              rounds, steps)
        yield row(f"step/plain-head/vit-small/depth{depth}/t{earlier}", "plain nn.Module head",
                  ratio, 1.15, median_ms=mine, baseline_ms=theirs, spread=round(spread, 3))


def against_the_published(rounds: int):
    """Goal 3."""
    for depth, goal in ((1, 1.0), (2, 1.0), (3, 25.0), (4, 100.0)):
        theirs, mine, ratio, spread = compare(published(depth, 19),
                                              ours(depth, 19, features(depth)), rounds, 1)
        yield row(f"step/published/depth{depth}/t19", "ours; the ratio is how much slower the "
                  "published method is", ratio, goal, at_least=True, median_ms=mine,
                  baseline_ms=theirs, spread=round(spread, 3))


def memory():
    """Peak resident memory of ten steps, each in a process of its own, libraries included."""
    late, early = _peak("ours", 3, 100), _peak("ours", 3, 1)
    theirs = _peak("published", 3, 19)
    yield row("memory/flat/depth3/t100", "the same after 1 task", late / early, 1.05,
              bytes=late, baseline_bytes=early)
    yield row("memory/published/depth3/t19", "ours after 100 tasks; the ratio is how much more the "
              "published method takes", theirs / late, 1.0, at_least=True, bytes=late,
              baseline_bytes=theirs)


def _peak(what: str, depth: int, earlier: int) -> int:
    done = subprocess.run([sys.executable, __file__, "--peak", what, str(depth), str(earlier)],
                          capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_peak(what: str, depth: int, earlier: int) -> None:
    """Takes ten steps and prints this process's peak resident memory in bytes."""
    step = {"ours": lambda: ours(depth, earlier, features(depth)),
            "published": lambda: published(depth, earlier)}[what]()
    for _ in range(10):
        step()
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def growth():
    """Bytes that a task of ten classes adds, against a whole head and against what it may."""
    for fresh in (DEFAULT.fresh_columns, 32, 64):
        strategy = strategy_at(3, 2, HypernetConfig(fresh_columns=fresh))
        strategy.finish(2)
        added = strategy.task_bytes(2)
        head = 4 * (strategy.head.weight_count + strategy.head.norm_length
                    + CLASSES * (strategy.head.width + 1))
        yield row(f"bytes/task/depth3/fresh{fresh}", "a head of its own", added / head, 0.02,
                  bytes=added, baseline_bytes=head)
        if fresh == DEFAULT.fresh_columns:
            yield row("bytes/task/depth3", f"{TASK_BYTES} bytes", added / TASK_BYTES, 1.0,
                      bytes=added)


def plot(path: Path, rounds: int) -> None:
    """Step time at depth 3 against the number of earlier tasks, of all four: times a plain head's,
    so that a machine that slows down draws no slope.
    """
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot

    batch, lines = features(3), {}
    base = plain(3, batch)
    for name, make, tasks in (
            ("per sample, as published", lambda t: published(3, t), (1, 5, 10, 19)),
            ("ours, direct regulariser", lambda t: direct(3, t, batch), (10, 19, 50)),
            ("ours, shared columns", lambda t: ours(3, t, batch, SHARED), (10, 19, 50, 100)),
            ("ours", lambda t: ours(3, t, batch), (1, 5, 10, 19, 50, 100))):
        lines[name] = [(t, compare(make(t), base, rounds, 1)[2]) for t in tasks]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1.0, color="0.4", linestyle="--", label="plain head")
    axes.set(yscale="log", xlabel="earlier tasks", ylabel="times a plain head's processor time",
             title="A training step at depth 3, batch 64, one CPU thread")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="draw step time against earlier tasks, as SVG")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure_torch(1)
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), int(options.peak[2]))
        return
    rounds, steps = (3, 3) if options.quick else (9, 8)
    rows = []
    for group in (against_a_plain_head(rounds, steps), of_a_transformer(rounds, 2),
                  against_the_published(2 if options.quick else 5), memory(), growth()):
        for made in group:
            rows.append(made)
            log(made)
    write(options.json, rows)
    if options.plot:
        plot(options.plot, rounds)


if __name__ == "__main__":
    main()
