"""What a dictionary of directions is worth to the tasks after the first ten.

    python tests/bench/dictionary.py --data TINY_IMAGENET_32 --work FOLDER --images 150

Every seed learns the first tasks once, with columns of their own. Then each row learns the tasks
after them from that state. What is learned is kept in FOLDER, where the next call finds it. Prints
a Markdown table: mean accuracy on the later tasks, the paired difference to columns of their own,
and what the last task stores. Directions that are drawn at random are the control: what they reach
is not learned from earlier tasks.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import pyarrow.fs as pafs
import torch

from partialhn.config import ComputeConfig
from partialhn.data.datasets import open_stream
from partialhn.evaluation.intervals import Interval, paired
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.precision import configure_torch
from partialhn.presets import preset
from partialhn.run import collect, cut_network
from partialhn.training.learner import Learner
from partialhn.training.pretrain import fit_network, load_network

OPENERS = 10


def stream(config, work):
    """Network and features of every task, computed once below `work`."""
    filesystem, experiences = pafs.LocalFileSystem(), open_stream(config.data, work / "datasets")
    network = load_network(config, experiences[0], filesystem, str(work))
    if network is None:
        for _ in fit_network(config, experiences[0], filesystem, str(work), "cpu"):
            pass
        network = load_network(config, experiences[0], filesystem, str(work))
    cut, store = cut_network(config, network), FeatureStore(filesystem, str(work))
    jobs = feature_jobs(config, experiences, cut.trunk)
    manifests, _ = precompute(store, cut.trunk, jobs)
    return cut, collect(store, jobs, manifests, experiences)


def first_tasks(cut, config, tasks, work):
    """The state after the first tasks."""
    name = f"{config.work_hash()}.pt"
    if (work / name).exists():
        return torch.load(work / name, weights_only=False)
    learner = Learner(cut.strategy(config), config.train)
    for _ in learner.learn(tasks[:OPENERS + 1]):
        pass
    torch.save(learner.state(), work / name)
    return learner.state()


def later_tasks(cut, config, tasks, state, kind, work):
    """Mean accuracy on the later tasks, and the bytes of the last one."""
    kept = work / f"{config.work_hash()}-{len(tasks)}{kind}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    learner = Learner(cut.strategy(config), config.train)
    learner.restore(*state)
    learner.strategy.conclude(OPENERS)
    if kind == "random":
        draw = torch.Generator().manual_seed(config.train.seed)
        dictionary = learner.strategy.hypernet.dictionary
        dictionary.fill([len(own_Dd) ** 0.5 * torch.linalg.qr(
            torch.randn(own_Dd.shape, generator=draw))[0] for own_Dd in dictionary()])
    for _ in learner.learn(tasks):
        pass
    found = [statistics.mean(learner.finished[-1].accuracy_row[OPENERS + 1:]),
             learner.strategy.task_bytes(len(tasks) - 1)]
    kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True, help="training images a class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--columns", type=int, default=64, help="of the first tasks")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=["16", "24", "32", "24:random"],
                        help="numbers of directions; N:random draws them")
    options = parser.parse_args()
    base = preset("split-tiny-imagenet")
    base = dataclasses.replace(
        base, compute=ComputeConfig(threads=1),
        data=dataclasses.replace(base.data, data=options.data, images_per_class=options.images),
        features=dataclasses.replace(base.features, views=2),
        train=dataclasses.replace(base.train, epochs=options.epochs))
    configure_torch(1)
    options.work.mkdir(parents=True, exist_ok=True)
    cut, tasks = stream(base, options.work)
    print("| tasks after the tenth | ACC | against their own columns, points | the last stores |\n"
          "|---|---|---|---|", flush=True)
    reference: dict[int, float] = {}
    for row in ["0", *options.rows]:
        count, _, kind = row.partition(":")
        found, stored = {}, 0
        for seed in range(options.seeds):
            train = dataclasses.replace(base.train, seed=seed)
            own = dataclasses.replace(base, train=train, hypernet=dataclasses.replace(
                base.hypernet, fresh_columns=options.columns))
            state = first_tasks(cut, own, tasks, options.work)
            config = dataclasses.replace(own, hypernet=dataclasses.replace(
                own.hypernet, dictionary=int(count), dictionary_after=OPENERS))
            found[seed], stored = later_tasks(cut, config, tasks[:options.tasks], state, kind,
                                              options.work)
        label = f"{count} {kind or 'shared'} directions" if count != "0" else (
            f"{options.columns} columns of their own")
        reference = reference or found
        print(f"| {label} | {percent(Interval.of(list(found.values())))} | "
              + (percent(paired(found, reference)) if count != "0" else "")
              + f" | {stored / 1000:.1f} kB |", flush=True)


def percent(value: Interval) -> str:
    """In hundredths, with the half-width of the interval."""
    half = "" if value.low is None else f" ± {100 * (value.mean - value.low):.1f}"
    return f"{100 * value.mean:.1f}{half}"


if __name__ == "__main__":
    main()
