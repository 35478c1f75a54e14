"""Tasks with few images, default options: ours against simpler strategies on the same trunk.

    PARTIALHN_TEST_DATA=DATA python tests/bench/few.py --out FOLDER --streams tiny cifar characters
        [--images 5 15 50 150] [--seeds 3] [--others separate_heads]

The streams `pretrained-tiny` and `pretrained-cifar` are those of the presets, on a trunk that was
trained elsewhere: a seed changes the training images, first weights and batches. For the others it
changes the division of the classes into tasks, the trunk, first weights and batches, and for
characters the images. All strategies of a seed share trunk and features. Finished cells are kept in
FOLDER, so the same command goes on where it stopped. Prints a Markdown table for each stream: mean
accuracy, ours minus theirs seed by seed with its 95 % interval, and whether the goal is met. The
stream `characters` is drawn here: strokes of black ink on 105 pixels, each image by another shaky
hand.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from partialhn.benchmarks.catalogue import Cell
from partialhn.benchmarks.reproduce import run_cells
from partialhn.config import (
    BackboneConfig,
    ComputeConfig,
    Config,
    DataConfig,
    StrategyName,
    TrainConfig,
)
from partialhn.evaluation.intervals import Interval, paired
from partialhn.presets import preset_sections

OTHERS: tuple[StrategyName, ...] = ("ridge", "ncm", "linear_probe", "separate_heads",
                                    "latent_replay")
BEHIND = -0.005
"""Most that ours may be behind ridge, NCM, linear probe and latent replay."""
AHEAD = {15: 0.03}
"""Least that ours must be ahead of separate heads, by images a class."""
CHARACTERS_GOAL = 0.88
MOST_TESTED = 200
"""Test images a class; Tiny-ImageNet has 50."""
SIDE, DRAWN, TESTED = 105, 15, 20
"""Pixels of a drawn character, and its training and test images a class."""
CLASSES = 80
PRETRAINED = {"pretrained-tiny": "pretrained-tiny-imagenet",
              "pretrained-cifar": "pretrained-cifar10"}
"""The preset of a stream on a trunk that was trained elsewhere."""


def data_of(stream: str, images: int, seed: int, out: Path) -> DataConfig:
    """The data of a stream with so many training images a class."""
    if stream == "characters":
        return DataConfig(data=str(draw_characters(out / f"characters-{seed}", seed)), tasks=8,
                          stream_seed=seed)
    kind = stream.removeprefix("pretrained-")
    source = {"cifar": "cifar10", "tiny": "tiny-imagenet-32"}[kind]
    skipped = seed * images if stream in PRETRAINED else 0
    folder = few_of(Path(os.environ["PARTIALHN_TEST_DATA"]) / source, images,
                    out / f"{kind}-{images}{f'-{skipped}' if skipped else ''}", skipped)
    return DataConfig(data=str(folder), tasks=5, classes={"cifar": 10, "tiny": 50}[kind],
                      stream_seed=seed)


def few_of(source: Path, images: int, folder: Path, skipped: int = 0) -> Path:
    """Writes the first training images of each class after `skipped` ones, and the first test
    images, as Parquet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", skipped, images), ("test", 0, MOST_TESTED)):
        if (folder / f"{split}.parquet").exists():
            continue
        table = pa.concat_tables([pq.read_table(path)
                                  for path in sorted(source.glob(f"{split}*.parquet"))])
        label_N = table["label"].to_numpy()
        rows = np.concatenate([np.flatnonzero(label_N == label)[first:first + count]
                               for label in np.unique(label_N)])
        pq.write_table(table.take(np.sort(rows)), folder / f"{split}.draft")
        (folder / f"{split}.draft").rename(folder / f"{split}.parquet")
    return folder


def draw_characters(folder: Path, seed: int) -> Path:
    """Writes a folder train/CLASS/*.png and test/CLASS/*.png, unless it is complete."""
    done = folder / "test" / f"{CLASSES - 1:02d}" / f"{TESTED - 1:02d}.png"
    if done.exists():
        return folder
    rng = np.random.default_rng(seed)
    for name in range(CLASSES):
        strokes = [rng.uniform(15, 90, (int(rng.integers(3, 6)), 2))
                   for _ in range(int(rng.integers(2, 5)))]
        for split, count in (("train", DRAWN), ("test", TESTED)):
            place = folder / split / f"{name:02d}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                character(strokes, rng).save(place / f"{number:02d}.png")
    return folder


def character(strokes: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """One drawing of a character: its points shake, and the whole leans, shrinks and moves."""
    image = Image.new("L", (SIDE, SIDE), 255)
    ink, angle = ImageDraw.Draw(image), rng.normal(0, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    lean = turn @ np.array([[1, rng.normal(0, 0.15)], [0, 1]]) * rng.uniform(0.8, 1.1)
    middle, move = SIDE / 2, rng.normal(0, 4, 2)
    for points_N2 in strokes:
        shaken_N2 = points_N2 + rng.normal(0, 3.5, points_N2.shape)
        placed_N2 = (shaken_N2 - middle) @ lean.T + middle + move
        ink.line([(float(x), float(y)) for x, y in curve(placed_N2)], fill=0, width=3,
                 joint="curve")
    return image


def curve(points_N2: np.ndarray) -> np.ndarray:
    """A smooth line from the first point to the last, drawn towards those between (Bezier)."""
    place = np.linspace(0, 1, 24)[:, None, None]
    line = np.repeat(points_N2[None], 24, 0)
    while line.shape[1] > 1:
        line = (1 - place) * line[:, :-1] + place * line[:, 1:]
    return line[:, 0]


def measured(stream: str, images: int, seed: int, out: Path,
             strategies: tuple[StrategyName, ...]) -> dict[str, float]:
    """Accuracy of each strategy after the last task."""
    config = Config(
        data_of(stream, images, seed, out), BackboneConfig(trunk_seed=seed),
        train=TrainConfig(seed=seed), compute=ComputeConfig(threads=1))
    if stream in PRETRAINED:
        sections = preset_sections(PRETRAINED[stream])
        config = Config.of(dataclasses.replace(
            sections, data=dataclasses.replace(sections.data, data=config.data.data),
            train=config.train, compute=config.compute))
    cells = [Cell(name, config.backbone.depth, seed) for name in strategies]
    found = run_cells(config, cells, out, lambda line: print(f"  {line}", flush=True))
    return {cell.strategy: each["acc"] for cell, each in zip(cells, found, strict=True)}


def row(name: str, ours: dict[int, float], theirs: dict[int, float], images: int) -> str:
    """One line of the table."""
    difference = paired(ours, theirs)
    goal = AHEAD.get(images) if name == "separate_heads" else BEHIND
    said = "" if goal is None else ("met" if difference.mean >= goal else "missed")
    return (f"| {images} | {name} | {percent(Interval.of(list(theirs.values())))} | "
            f"{percent(difference, signed=True)} | "
            + ("" if goal is None else f"{100 * goal:+.1f}: {said}") + " |")


def percent(value: Interval, *, signed: bool = False) -> str:
    """In hundredths, with the half-width of the interval."""
    half = "" if value.low is None else f" ± {100 * (value.mean - value.low):.1f}"
    return f"{100 * value.mean:{'+' if signed else ''}.1f}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    streams = ["tiny", "cifar", "characters"]
    parser.add_argument("--streams", nargs="+", choices=(*streams, *PRETRAINED), default=streams)
    parser.add_argument("--images", type=int, nargs="+", default=[5, 15, 50, 150],
                        help="training images a class; characters always have 15")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=OTHERS)
    given = parser.parse_args()
    if given.streams != ["characters"] and not os.environ.get("PARTIALHN_TEST_DATA"):
        parser.error("PARTIALHN_TEST_DATA is not set; allowed: the folder of cifar10 and "
                     "tiny-imagenet-32")
    for stream in given.streams:
        lines = []
        for images in given.images if stream != "characters" else [DRAWN]:
            found: dict[str, dict[int, float]] = {}
            for seed in range(given.seeds):
                for name, accuracy in measured(stream, images, seed, given.out,
                                               ("partial_hn", *given.others)).items():
                    found.setdefault(name, {})[seed] = accuracy
            ours = found.pop("partial_hn")
            goal = (f"{100 * CHARACTERS_GOAL:.0f}: "
                    + ("met" if min(ours.values()) >= CHARACTERS_GOAL else "missed")
                    if stream == "characters" else "")
            lines.append(f"| {images} | **partial_hn** | "
                         f"{percent(Interval.of(list(ours.values())))} | | {goal} |")
            lines += [row(name, ours, theirs, images) for name, theirs in found.items()]
        print(f"\n{stream}\n",
              "| images a class | strategy | ACC | ours minus theirs, points | goal |",
              "|---|---|---|---|---|", *lines, "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
