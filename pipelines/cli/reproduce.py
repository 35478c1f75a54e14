"""The command `partialhn reproduce`, which runs a benchmark."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from partialhn import __version__
from partialhn.benchmarks.catalogue import SizeName, find_benchmark
from partialhn.config import ComputeConfig
from partialhn.errors import InputError
from pipelines.cli.next_steps import next_steps


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Learn a benchmark by every strategy, at several depths, under several seeds, and compare.

    Benchmarks: noisy-cifar, split-cifar10, split-cifar100, split-tiny-imagenet, and on a trunk
    that was trained elsewhere pretrained-cifar10 and pretrained-tiny-imagenet. Runs in one process;
    finished cells are kept, so the same command goes on where it stopped. Writes report.html,
    table.csv, table.md, plots.svg, result.json and the cells. Exit code 3: an accuracy lies outside
    of the range of the recorded runs.
    """

    benchmark: Positional[str]
    """Name of the benchmark."""
    data: str
    """Images of the benchmark: a folder of Parquet files, or another source that train takes."""
    size: SizeName = "smoke"
    """smoke: minutes, too small to compare strategies. cpu: up to two hours on two cores. full:
    needs a GPU."""
    seeds: int | None = None
    """Number of seeds; default: that of the size."""
    out: str | None = None
    """Folder for all results; default: reproduce/BENCHMARK-SIZE."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    threads: int = 1
    """CPU threads."""
    at_once: int | None = None
    """Number of strategies, depths and seeds that are learned at once, each in a thread, to the
    same accuracies. Default: as many as fit on a GPU, up to 8; on a CPU one."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}; allowed: 1 or more")
        if self.threads < 1:
            raise InputError(f"threads is {self.threads}; allowed: 1 or more")
        if self.at_once is not None and self.at_once < 1:
            raise InputError(f"at_once is {self.at_once}; allowed: 1 or more")
        find_benchmark(self.benchmark)

    def run(self) -> int:
        from partialhn.benchmarks.catalogue import expected
        from partialhn.benchmarks.comparison import rows
        from partialhn.benchmarks.reproduce import run_cells
        from partialhn.networks.table import cut_unit
        from partialhn.numbers import now
        from pipelines.benchmarks.page import benchmark_page, chance_of, kept_fields
        from pipelines.benchmarks.plots import plots_svg
        from pipelines.benchmarks.table import table_csv, table_markdown, verdict

        benchmark = find_benchmark(self.benchmark)
        out = Path(self.out or f"reproduce/{self.benchmark}-{self.size}")
        config = dataclasses.replace(benchmark.config(self.size, self.data),
                                     compute=ComputeConfig(device=self.device,
                                                           threads=self.threads,
                                                           tasks_at_once=self.at_once))
        cells = run_cells(config, benchmark.cells(self.size, self.seeds), out,
                          lambda line: print(line, flush=True))
        table = rows(cells, expected(self.benchmark, self.size))
        result = {"pack": self.benchmark, "size": self.size, "config": config.to_dict(),
                  "partialhn_version": __version__, "finished": now(),
                  "rows": [dataclasses.asdict(row) for row in table],
                  "cells": list(map(kept_fields, cells))}
        unit = cut_unit(config.backbone.backbone)
        chance_T = chance_of(cells)
        texts = {"result.json": json.dumps(result, indent=1), "table.csv": table_csv(table),
                 "table.md": table_markdown(table, unit, sum(chance_T) / len(chance_T)),
                 "plots.svg": plots_svg(table, cells, config.backbone.depth, unit),
                 "report.html": benchmark_page(result)}
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        print(f"\n{texts['table.md']}\n{verdict(table)}")
        print("written: " + ", ".join(str(out / name) for name in texts))
        print("\n".join(self._next()))
        return 3 if any(row.as_expected is False for row in table) else 0


    def _next(self) -> list[str]:
        """The same benchmark in the next size, and its stream learned or searched."""
        data = shlex.quote(self.data)
        larger = {"smoke": "cpu", "cpu": "full"}.get(self.size)
        commands = [f"train --preset {self.benchmark} --data {data} --name STREAM",
                    f"tune --preset {self.benchmark} --data {data}"]
        if larger:
            commands.insert(0, f"reproduce {self.benchmark} --data {data} --size {larger}")
        return next_steps(commands)


COMMANDS: dict[str, Any] = {"reproduce": Reproduce}
