"""What each option of the generator is worth: one change at a time, on a pack's stream.

    python tests/bench/ablation.py --pack split-tiny-imagenet --size cpu --data DATA --out OUT

Prints a Markdown table: accuracy and forgetting over seeds, the paired difference to the default,
processor seconds and bytes a task. Finished cells are kept in OUT, which may be that of
`partialhn reproduce`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from partialhn.benchmarks.catalogue import Cell, find_benchmark
from partialhn.benchmarks.reproduce import run_cells
from partialhn.config import ComputeConfig, Config
from partialhn.evaluation.intervals import Interval, paired

CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "no residual: everything generated": {"hypernet": {"generator": "bilinear",
                                                       "residual": False}},
    "columns that all share, drifting": {"hypernet": {"generator": "bilinear"}},
    "additive, as published": {"hypernet": {"generator": "additive", "residual": False}},
    "additive with residual": {"hypernet": {"generator": "additive"}},
    "4 fresh columns": {"hypernet": {"fresh_columns": 4}},
    "8 fresh columns": {"hypernet": {"fresh_columns": 8}},
    "12 fresh columns": {"hypernet": {"fresh_columns": 12}},
    "16 fresh columns": {"hypernet": {"fresh_columns": 16}},
    "32 fresh columns": {"hypernet": {"fresh_columns": 32}},
    "64 fresh columns": {"hypernet": {"fresh_columns": 64}},
    "instance norm": {"hypernet": {"norm": "instance"}},
    "group norm": {"hypernet": {"norm": "group"}},
    "one view": {"features": {"views": 1}},
    "label smoothing 0.1": {"train": {"label_smoothing": 0.1}},
    "constant learning rate": {"train": {"schedule": "constant"}},
    "bfloat16": {"train": {"precision": "bfloat16"}},
}


def changed(config: Config, change: dict[str, dict[str, Any]]) -> Config:
    """The configuration with other options of its sections."""
    return dataclasses.replace(config, **{
        section: dataclasses.replace(getattr(config, section), **options)
        for section, options in change.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pack", required=True)
    parser.add_argument("--size", choices=("smoke", "cpu", "full"), default="cpu")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--only", nargs="+", choices=CHANGES, help="these changes alone")
    options = parser.parse_args()
    pack = find_benchmark(options.pack)
    base = dataclasses.replace(pack.config(options.size, options.data),
                               compute=ComputeConfig(threads=1))
    seeds = range(options.seeds or pack.sizes[options.size].seeds)
    cells = [Cell("partial_hn", base.backbone.freeze_depth, seed) for seed in seeds]
    print("| change | ACC | forgotten, points | against the default, points | processor time | "
          "a task adds |\n|---|---|---|---|---|---|", flush=True)
    reference: dict[int, float] = {}
    for name in options.only or CHANGES:
        change = CHANGES[name]
        found = run_cells(changed(base, change), cells, options.out, lambda line: None)
        accuracies = {cell["seed"]: cell["acc"] for cell in found}
        reference = reference or accuracies
        print(f"| {name} | {percent(Interval.of(list(accuracies.values())))} | "
              f"{percent(Interval.of([cell['forgetting'] for cell in found]))} | "
              + (percent(paired(accuracies, reference)) if change else "")
              + f" | {sum(cell['cpu_seconds'] for cell in found) / len(found):.1f} s | "
              f"{sum(cell['bytes_per_task'] for cell in found) / len(found) / 1000:,.1f} kB |",
              flush=True)


def percent(value: Interval) -> str:
    """In hundredths, with the half-width of the interval."""
    half = "" if value.low is None else f" ± {100 * (value.mean - value.low):.1f}"
    return f"{100 * value.mean:.1f}{half}"


if __name__ == "__main__":
    main()
