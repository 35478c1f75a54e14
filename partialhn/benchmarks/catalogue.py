"""Packs: comparisons that one command reproduces, each in sizes for a check, a CPU and a GPU.

A pack is a preset learned by every strategy, at several depths, under several seeds. What is
expected of a size comes from recorded runs (`expected.json`); where there is none, nothing is.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from partialhn.config import Config, StrategyName
from partialhn.errors import InputError
from partialhn.presets import preset
from partialhn.strategies.table import OWN

SizeName = Literal["smoke", "cpu", "full"]
EVERY: tuple[StrategyName, ...] = tuple(name for name, line in OWN.items() if line.depths)
"""The strategies that benchmarks compare."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a preset is learned."""

    depths: tuple[int, ...]
    seeds: int
    images_per_class: int | None
    epochs: int
    views: int
    trunk_epochs: int
    tasks: int | None = None
    """The first tasks only; default: all."""


FULL = Size((0, 1, 2, 3, 4), 5, None, 100, 8, 60)
"""The paper's number of epochs."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One strategy at one depth under one seed."""

    strategy: StrategyName
    depth: int
    seed: int

    @property
    def label(self) -> str:
        """What the literature calls it: at depth 0 two strategies have names of their own."""
        return {("partial_hn", 0): "full_hn", ("latent_replay", 0): "er"}.get(
            (self.strategy, self.depth), self.strategy)

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f"{self.label}-depth{self.depth}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A preset in three sizes."""

    name: str
    sizes: dict[SizeName, Size]

    def config(self, size: SizeName, data: str) -> Config:
        """What its cells have in common; strategy, depth and seed are each cell's own."""
        config, chosen = preset(self.name), self.sizes[size]
        tasks, classes = config.data.tasks, config.data.classes
        if chosen.tasks is not None and tasks is not None:
            classes = chosen.tasks * (CLASSES[self.name] // tasks)
            tasks = chosen.tasks
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, data=data, tasks=tasks, classes=classes,
                                     images_per_class=chosen.images_per_class),
            backbone=dataclasses.replace(config.backbone, trunk_epochs=chosen.trunk_epochs),
            features=dataclasses.replace(config.features, views=chosen.views),
            train=dataclasses.replace(config.train, epochs=chosen.epochs, compare=()))

    def cells(self, size: SizeName, seeds: int | None = None) -> list[Cell]:
        """In the order they are learned: seed by seed, so that an early stop leaves whole seeds.

        The table of strategies says at which depths each is learned: a linear probe of the pixels
        (depth 0) is left out, for example.
        """
        chosen, own = self.sizes[size], preset(self.name).backbone.freeze_depth
        pairs = [(strategy, depth) for depth in chosen.depths for strategy in EVERY
                 if _learned_at(strategy, depth, own)]
        return [Cell(strategy, depth, seed) for seed in range(seeds or chosen.seeds)
                for strategy, depth in pairs]


def _learned_at(strategy: StrategyName, depth: int, own: int) -> bool:
    """Whether a benchmark, whose preset has the depth `own`, learns a strategy at a depth."""
    depths = OWN[strategy].depths
    if depths == "frozen":
        return depth > 0
    return depths == "all" or depth == own


CLASSES = {"split-cifar10": 10, "split-cifar100": 100, "split-tiny-imagenet": 200,
           "noisy-cifar": 20}
BENCHMARKS = {pack.name: pack for pack in (
    Benchmark("split-cifar10", {"smoke": Size((3, 4), 1, 20, 2, 2, 2),
                           "cpu": Size((0, 2, 3, 4), 3, 400, 8, 2, 15), "full": FULL}),
    Benchmark("split-cifar100", {"smoke": Size((3, 4), 1, 20, 2, 2, 2, 2),
                            "cpu": Size((2, 3, 4), 3, 150, 5, 2, 15, 5), "full": FULL}),
    Benchmark("split-tiny-imagenet", {"smoke": Size((3, 4), 1, 20, 2, 2, 2, 2),
                                 "cpu": Size((3, 4), 3, 60, 5, 2, 15, 5), "full": FULL}),
    Benchmark("noisy-cifar", {"smoke": Size((3, 4), 1, 20, 2, 2, 2),
                         "cpu": Size((3, 4), 3, 100, 5, 2, 15), "full": FULL}))}


def find_benchmark(name: str) -> Benchmark:
    """A pack by name. Raises: InputError listing those there are."""
    if name not in BENCHMARKS:
        raise InputError(f"pack is {name!r}; allowed: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def expected(pack: str, size: str) -> dict[str, tuple[float, float]]:
    """ACC that a recorded run lets expect, lowest and highest, by `label@depth`."""
    found = json.loads(Path(__file__).with_name("expected.json").read_text(encoding="utf-8"))
    return {key: (low, high) for key, (low, high) in found.get(f"{pack}/{size}", {}).items()}
