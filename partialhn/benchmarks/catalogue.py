"""Benchmarks that one command reproduces, each in sizes for a check, a CPU and a GPU.

A benchmark is a preset learned by every strategy, at several depths, under several seeds. Recorded
runs give the expected accuracy of a size (`expected.json`); a size without a recorded run has none.
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
    """Use only so many first tasks; default: all."""
    strategies: tuple[StrategyName, ...] = EVERY
    """The strategies to compare."""


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
        """Its name in the literature: at depth 0 two strategies have other names."""
        return {("partial_hn", 0): "full_hn", ("latent_replay", 0): "er"}.get(
            (self.strategy, self.depth), self.strategy)

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return f"{self.label}-depth{self.depth}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A preset in three sizes."""

    name: str
    sizes: dict[SizeName, Size]

    def config(self, size: SizeName, data: str) -> Config:
        """The options that all cells share; strategy, depth and seed belong to a cell."""
        config, scale = preset(self.name), self.sizes[size]
        tasks, classes = config.data.tasks, config.data.classes
        if scale.tasks is not None and tasks is not None:
            classes = scale.tasks * (CLASSES[self.name] // tasks)
            tasks = scale.tasks
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, data=data, tasks=tasks, classes=classes,
                                     images_per_class=scale.images_per_class),
            backbone=dataclasses.replace(config.backbone, trunk_epochs=scale.trunk_epochs),
            features=dataclasses.replace(config.features, views=scale.views),
            train=dataclasses.replace(config.train, epochs=scale.epochs, compare=()))

    def cells(self, size: SizeName, seeds: int | None = None) -> list[Cell]:
        """The cells in the order of learning: seed by seed, so an early stop leaves whole seeds.

        The table of strategies says at which depths each is learned: a linear probe of the pixels
        (depth 0) is left out, for example.
        """
        scale, own = self.sizes[size], preset(self.name).backbone.depth
        pairs = [(strategy, depth) for depth in scale.depths for strategy in EVERY
                 if strategy in scale.strategies
                 and _learned_at(strategy, depth, own)]
        return [Cell(strategy, depth, seed) for seed in range(seeds or scale.seeds)
                for strategy, depth in pairs]


def _learned_at(strategy: StrategyName, depth: int, own: int) -> bool:
    """Whether a benchmark, whose preset has the depth `own`, learns a strategy at a depth."""
    depths = OWN[strategy].depths
    if depths == "frozen":
        return depth > 0
    return depths == "all" or depth == own


CLASSES = {"split-cifar10": 10, "split-cifar100": 100, "split-tiny-imagenet": 200,
           "noisy-cifar": 20, "pretrained-tiny-imagenet": 50, "pretrained-cifar10": 10}
ON_ONE_TRUNK: tuple[StrategyName, ...] = (
    "partial_hn", "separate_heads", "linear_probe", "ridge", "ncm")
"""The strategies that forget nothing: what anybody could put on a trunk that is trained already."""
PRETRAINED: dict[SizeName, Size] = {
    "smoke": Size((12, 18), 1, 20, 2, 1, 1, 2, ("partial_hn", "ridge", "ncm")),
    "cpu": Size((12, 17), 3, None, 10, 2, 1, None, ON_ONE_TRUNK),
    "full": Size((5, 8, 12, 16, 17, 18), 5, None, 30, 8, 1)}
"""Depths are blocks of EfficientNet-Lite0; a trunk that is trained already has no epochs here."""
BENCHMARKS = {benchmark.name: benchmark for benchmark in (
    Benchmark("split-cifar10", {"smoke": Size((3, 4), 1, 20, 2, 2, 2),
                           "cpu": Size((0, 2, 3, 4), 3, 400, 8, 2, 15), "full": FULL}),
    Benchmark("split-cifar100", {"smoke": Size((3, 4), 1, 20, 2, 2, 2, 2),
                            "cpu": Size((2, 3, 4), 3, 150, 5, 2, 15, 5), "full": FULL}),
    Benchmark("split-tiny-imagenet", {"smoke": Size((3, 4), 1, 20, 2, 2, 2, 2),
                                 "cpu": Size((3, 4), 3, 60, 5, 2, 15, 5), "full": FULL}),
    Benchmark("noisy-cifar", {"smoke": Size((3, 4), 1, 20, 2, 2, 2),
                         "cpu": Size((3, 4), 3, 100, 5, 2, 15), "full": FULL}),
    Benchmark("pretrained-tiny-imagenet", PRETRAINED),
    Benchmark("pretrained-cifar10", PRETRAINED | {"cpu": dataclasses.replace(
        PRETRAINED["cpu"], images_per_class=500)}))}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by name. Raises: InputError listing the known names."""
    if name not in BENCHMARKS:
        raise InputError(f"benchmark is {name!r}; allowed: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def expected(benchmark: str, size: str) -> dict[str, tuple[float, float]]:
    """The lowest and highest expected ACC by `label@depth`, from a recorded run."""
    recorded = json.loads(Path(__file__).with_name("expected.json").read_text(encoding="utf-8"))
    ranges = recorded.get(f"{benchmark}/{size}", {})
    return {key: (low, high) for key, (low, high) in ranges.items()}
