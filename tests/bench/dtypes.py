"""Accuracy, bytes and reading time of the number types features may be stored in.

    python tests/bench/dtypes.py --data TINY_IMAGENET_32 --work FOLDER [--epochs 5] [--seeds 0 1]
        [--json FILE]

The first 50 classes as five tasks of 10, depth 3, two views. Every type is trained on for itself;
compression changes no number (asserted), so what is learned from a compressed set is the same.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import time
import typing
from pathlib import Path

import torch
from pyarrow.fs import LocalFileSystem
from rows import compare

from partialhn.config import Compression, Config
from partialhn.data.datasets import open_stream
from partialhn.features.batches import Workers, epoch_batches
from partialhn.features.cache import SETTLED_SECONDS
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.features.table import OWN
from partialhn.networks.precision import configure_torch
from partialhn.presets import preset
from partialhn.run import collect, cut_network
from partialhn.training.learner import Learner
from partialhn.training.pretrain import fit_network, load_network

BASE = ("float16", "none")
"""What the others' reading time is held against: the default."""


def variants(base: Config) -> dict[tuple[str, str], Config]:
    """The configuration with every number type and compression."""
    return {(dtype, compression): dataclasses.replace(base, features=dataclasses.replace(
                base.features, feature_dtype=dtype, compression=compression))
            for dtype in OWN
            for compression in typing.get_args(Compression)}


def reader(store, manifests):
    """A function that opens the features and reads an epoch of batches of them."""
    def read() -> None:
        for manifest in manifests:
            features = store.open(manifest).to(torch.device("cpu"))
            for _ in epoch_batches(features, 64, [0], Workers()):
                pass
    return read


def accuracies(cut, config, tasks) -> float:
    """ACC after the last task."""
    torch.manual_seed(config.train.seed)
    learner = Learner(cut.strategy(config), config.train)
    for _ in learner.learn(tasks):
        pass
    row = learner.finished[-1].accuracy_row
    return sum(row) / len(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--trunk-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    configure_torch(1)
    known = preset("split-tiny-imagenet-5x10")
    base = dataclasses.replace(
        known, data=dataclasses.replace(known.data, data=options.data),
        backbone=dataclasses.replace(known.backbone, trunk_epochs=options.trunk_epochs),
        features=dataclasses.replace(known.features, views=2),
        train=dataclasses.replace(known.train, epochs=options.epochs, compare=()))
    experiences = open_stream(base.data, options.work / "datasets")
    place = (LocalFileSystem(), str(options.work))
    if load_network(base, experiences[0], *place) is None:
        list(fit_network(base, experiences[0], *place))
    cut = cut_network(base, load_network(base, experiences[0], *place))
    store = FeatureStore(*place)
    configs = variants(base)
    jobs = {key: feature_jobs(config, experiences, cut.trunk) for key, config in configs.items()}
    found, decoded = precompute(store, cut.trunk, [job for each in jobs.values() for job in each])
    print(f"{decoded} images decoded for {len(jobs)} variants", flush=True)
    per = len(found) // len(jobs)
    manifests = {key: found[at * per:(at + 1) * per] for at, key in enumerate(jobs)}
    time.sleep(2 * SETTLED_SECONDS)
    for manifest in found:  # so that no reading below hashes anything
        store.open(manifest)
    rows, acc = [], {}
    for (dtype, compression), config in configs.items():
        mine = manifests[dtype, compression]
        train = [m for m, job in zip(mine, jobs[dtype, compression], strict=True)
                 if job.split == "train"]
        base_train = [m for m, job in zip(manifests[BASE], jobs[BASE], strict=True)
                      if job.split == "train"]
        _, _, ratio, spread = compare(reader(store, train), reader(store, base_train), 5, 1)
        if compression == "none":
            tasks = collect(store, jobs[dtype, compression], mine, experiences)
            acc[dtype] = [accuracies(cut, dataclasses.replace(
                config, train=dataclasses.replace(config.train, seed=seed)), tasks)
                for seed in options.seeds]
        else:
            for one, other in zip(mine, manifests[dtype, "none"], strict=True):
                one, other = store.open(one), store.open(other)
                assert all(map(torch.equal, one.shards, other.shards))
        images = sum(manifest.rows * manifest.shape_VCHW[0] for manifest in mine)
        made = {"dtype": dtype, "compression": compression,
                "bytes_per_image_and_view": round(sum(m.bytes for m in mine) / images, 1),
                "acc": [round(value, 4) for value in acc[dtype]],
                "mean_acc": round(sum(acc[dtype]) / len(acc[dtype]), 4),
                "read_time_ratio": round(ratio, 3), "read_time_spread": round(spread, 3)}
        rows.append(made)
        print(made, flush=True)
    if options.json:
        options.json.write_text(json.dumps({
            "command": shlex.join(["python", "tests/bench/dtypes.py", "--data", "TINY_IMAGENET_32",
                                   "--work", "FOLDER", "--epochs", str(options.epochs),
                                   "--trunk-epochs", str(options.trunk_epochs), "--seeds",
                                   *map(str, options.seeds)]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": {"processor": platform.processor() or platform.machine(), "threads": 1,
                        "torch": torch.__version__, "python": sys.version.split()[0]},
            "data": "first 50 classes of Tiny-ImageNet at 32x32, 5 tasks of 10, depth 3, 2 views",
            "epochs": options.epochs, "seeds": options.seeds,
            "read_time_ratio": "processor time of opening the training features of all tasks and "
                               "reading an epoch in batches of 64, against float16 uncompressed",
            "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
