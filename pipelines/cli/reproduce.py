"""`partialhn reproduce`: the comparisons, by one command."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from partialhn import __version__
from partialhn.benchmarks.catalogue import SizeName, find_benchmark
from partialhn.config import ComputeConfig
from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Learn a pack by every strategy, at several depths, under several seeds, and compare.

    Packs: noisy-cifar, split-cifar10, split-cifar100, split-tiny-imagenet. Runs in one process;
    what is finished is kept, so the same command goes on where it stopped. Writes report.html,
    table.csv, table.md, plots.svg, result.json and the cells. Exit code 3: a row lies outside of
    its recorded range.
    """

    pack: Positional[str]
    """Which comparison."""
    data: str
    """The pack's images: a folder of Parquet files, or whatever train takes."""
    size: SizeName = "smoke"
    """smoke: minutes, says little. cpu: up to two hours on two cores. full: a GPU, or patience."""
    seeds: int | None = None
    """How many seeds; default: what the size says."""
    out: str | None = None
    """Folder for everything it makes; default: reproduce/PACK-SIZE."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU where there is one."""
    threads: int = 1
    """CPU threads."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}; allowed: 1 or more")
        if self.threads < 1:
            raise InputError(f"threads is {self.threads}; allowed: 1 or more")
        find_benchmark(self.pack)

    def run(self) -> int:
        from partialhn.benchmarks.catalogue import expected
        from partialhn.benchmarks.comparison import rows
        from partialhn.benchmarks.reproduce import run_cells
        from pipelines.benchmarks.page import KEPT, benchmark_page
        from pipelines.benchmarks.plots import plots_svg
        from pipelines.benchmarks.table import table_csv, table_markdown, verdict

        pack = find_benchmark(self.pack)
        out = Path(self.out or f"reproduce/{self.pack}-{self.size}")
        config = dataclasses.replace(pack.config(self.size, self.data),
                                     compute=ComputeConfig(device=self.device,
                                                           threads=self.threads))
        cells = run_cells(config, pack.cells(self.size, self.seeds), out,
                          lambda line: print(line, flush=True))
        found = rows(cells, expected(self.pack, self.size))
        result = {"pack": self.pack, "size": self.size, "config": config.to_dict(),
                  "partialhn_version": __version__,
                  "rows": [dataclasses.asdict(row) for row in found],
                  "cells": [{key: cell[key] for key in KEPT} for cell in cells]}
        drawn = plots_svg(found, cells, config.backbone.freeze_depth)
        texts = {"result.json": json.dumps(result, indent=1), "table.csv": table_csv(found),
                 "table.md": table_markdown(found),
                 "plots.svg": drawn, "report.html": benchmark_page(result, drawn)}
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        print(f"\n{texts['table.md']}\n{verdict(found)}")
        print("written: " + ", ".join(str(out / name) for name in texts))
        return 3 if any(row.as_expected is False for row in found) else 0


COMMANDS: dict[str, Any] = {"reproduce": Reproduce}
