"""The feature store against what it cannot be faster than: the bare trunk, numpy, the local disk.

    python tests/bench/features.py [--quick] [--device cuda|cpu] [--json FILE]

Real digits at 32x32, slim ResNet-18 frozen through its third stage, one thread. Features are made
on the device, two views of each image, 32 where it is a GPU. S3 is the service
that PARTIALHN_TEST_S3_ENDPOINT names (with PARTIALHN_TEST_S3_ACCESS_KEY and _SECRET_KEY), else
moto's.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import earlier
import numpy as np
import torch
from photographs import photographs
from pyarrow.fs import LocalFileSystem
from rows import clock, compare, log, row, write

from partialhn.config import BackboneConfig, ComputeConfig, Config, DataConfig, FeatureConfig
from partialhn.data.augment import augment
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode
from partialhn.features.batches import Workers, epoch_batches
from partialhn.features.cache import SETTLED_SECONDS
from partialhn.features.extract import feature_jobs, precompute, shard_places
from partialhn.features.shards import compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.precision import configure_torch
from partialhn.networks.trunk import images_together
from partialhn.run import cut_network
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from pipelines.features.produce import open_store
from pipelines.platform.s3 import s3_client
from pipelines.platform.storage import open_storage

CONFIG = Config(DataConfig(tasks=1), BackboneConfig(freeze_depth=3),
                FeatureConfig(shard_rows=256))


PHOTOGRAPHED = (("torchvision:resnet18", 2), ("torchvision:resnet18", 6))
"""Networks and depths for photographs."""


def precomputing(folder: Path, experience, depth: int, rounds: int, device: torch.device):
    """Encoded images to claimed Arrow files, five shards, against the trunk on decoded pixels."""
    views = 32 if device.type == "cuda" else 2
    config = dataclasses.replace(CONFIG, backbone=BackboneConfig(freeze_depth=depth),
                                 features=dataclasses.replace(CONFIG.features, views=views))
    trunk = CutNetwork.of(build_network("slim_resnet18", 2), depth).trunk.to(device)
    few = dataclasses.replace(experience, train=experience.train.take(range(5 * 256)))
    job = feature_jobs(config, [few], trunk)[0]
    images_BCHW = decode(few.train, 32).images_BCHW
    seen = [augment(images_BCHW, np.arange(len(images_BCHW)), len(images_BCHW), view, "crop-flip",
                    0).to(device) for view in range(views)]

    def ours() -> None:
        store = FeatureStore(LocalFileSystem(), str(folder / uuid.uuid4().hex))
        for _ in compute_shards(store, trunk, [(job,)], shard_places([(job,)])):
            pass

    def serial() -> None:
        store = FeatureStore(LocalFileSystem(), str(folder / uuid.uuid4().hex))
        for place in shard_places([(job,)]):
            for _ in compute_shards(store, trunk, [(job,)], [place]):
                pass

    def bare() -> None:
        for view_BCHW in seen:
            for chunk_BCHW in torch.split(view_BCHW, images_together(trunk)):
                trunk(chunk_BCHW)

    wall = functools.partial(clock, device)
    mine, theirs, ratio, spread = compare(ours, serial, rounds, 1, wall)
    yield row(f"features/overlapped/depth{depth}", "the same, a shard after the other (wall clock)",
              ratio, None, median_ms=mine, baseline_ms=theirs, spread=round(spread, 3))
    theirs, mine, ratio, spread = compare(bare, ours, rounds, 1, wall)
    yield row(f"features/precompute/depth{depth}", "the bare trunk on pixels as it sees them; the "
              "ratio is of throughputs (wall clock)", ratio, 0.9, at_least=True, median_ms=mine,
              baseline_ms=theirs, spread=round(spread, 3))
    if device.type == "cpu":
        theirs, mine, ratio, spread = compare(bare, ours, rounds, 1, time.thread_time)
        yield row(f"features/trunk-thread/depth{depth}", "the bare trunk; processor time of the "
                  "thread in which the trunk runs", ratio, 0.9, at_least=True, median_ms=mine,
                  baseline_ms=theirs, spread=round(spread, 3))


def resizing(folder: Path, rounds: int, device: torch.device, name: str, depth: int,
             count: int = 192):
    """JPEGs of 500x375 to stored features, against the way of commit 4084f75 and the bare trunk."""
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, input_size=224),
        features=dataclasses.replace(CONFIG.features, views=1, shard_rows=64))
    experience = photographs(folder, count)
    network = build_network(name, 2, input_size=224)
    trunk = CutNetwork.of(network, depth).trunk.to(device)
    job = feature_jobs(config, [experience], trunk)[0]
    images_BCHW = decode(experience.train, 224).images_BCHW.to(device)

    def store() -> FeatureStore:
        return FeatureStore(LocalFileSystem(), str(folder / uuid.uuid4().hex))

    def ours() -> None:
        for _ in compute_shards(store(), trunk, [(job,)], shard_places([(job,)])):
            pass

    def bare() -> None:
        for chunk_BCHW in torch.split(images_BCHW, images_together(trunk)):
            trunk(chunk_BCHW)

    wall, label = functools.partial(clock, device), f"{name.rpartition(':')[2]}/depth{depth}"
    for kind, about, first, timer, goal in (
            ("earlier", "commit 4084f75's way, in images a second (wall clock)",
             lambda: earlier.features(store(), trunk, job), wall, 1.5),
            ("earlier-processor", "commit 4084f75's way, in images a second of processor time",
             lambda: earlier.features(store(), trunk, job), time.process_time, None),
            ("bare", "the bare trunk (wall clock)", bare, wall, None)):
        theirs, mine, ratio, spread = compare(first, ours, rounds, 1, timer)
        yield row(f"features/jpeg224/{label}/{kind}", about, ratio, goal, at_least=True,
                  median_ms=mine, baseline_ms=theirs, spread=round(spread, 3),
                  images_a_second=round(1e3 * count / mine, 1))


def reading(folder: Path, features, rounds: int):
    """An epoch of batches from the mapped shards, against numpy on one mapped file of the bytes."""
    path = folder / "whole.npy"
    np.save(path, torch.cat(features.shards).numpy())
    whole_NVCHW, y_N = np.load(path, mmap_mode="r"), features.y_N.numpy()

    def ours() -> None:
        for _ in epoch_batches(features, 64, (0, 0, 0), Workers()):
            pass

    def plain() -> None:
        rng = np.random.default_rng((0, 0, 0))
        order_N = rng.permutation(len(y_N))
        view_N = rng.integers(0, features.views, len(y_N))
        for start in range(0, len(y_N) - 63, 64):
            rows_B = order_N[start:start + 64]
            torch.from_numpy(whole_NVCHW[rows_B, view_N[start:start + 64]].astype(np.float32))
            torch.from_numpy(y_N[rows_B])

    mine, theirs, ratio, spread = compare(ours, plain, rounds, 3)
    yield row("features/epoch/mapped-arrow", "numpy on one mapped file of the same bytes", ratio,
              1.1, median_ms=mine, baseline_ms=theirs, spread=round(spread, 3),
              shards=len(features.shards))


def training(folder: Path, experience, rounds: int, epochs: int):
    """Opening features and learning from them: on S3, with copies in the cache, against local."""
    network = build_network("slim_resnet18", 2)
    cut = cut_network(CONFIG, network)
    with s3() as place:
        remote = open_storage(place)
        stores = {"s3": open_store(remote, ComputeConfig(cache=str(folder / "cache"))),
                  "local": FeatureStore(LocalFileSystem(), str(folder / "local"))}
        jobs = feature_jobs(CONFIG, [experience], cut.trunk)
        precompute(stores["local"], cut.trunk, jobs)
        for job in jobs:  # the same bytes, uploaded
            source = Path(stores["local"].folder(job.recipe.key))
            for file in sorted(source.iterdir(), key=lambda file: file.name == "manifest.json"):
                with remote.filesystem.open_output_stream(
                        f"{stores['s3'].folder(job.recipe.key)}/{file.name}") as sink:
                    sink.write(file.read_bytes())
        config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, epochs=epochs))

        def learn(store):
            def step() -> None:
                train, test = (store.open(store.find(job.recipe)) for job in jobs
                               if job.split in ("train", "test"))
                learner = Learner(cut.strategy(config), config.train)
                for _ in learner.learn([TaskFeatures("a", len(experience.classes), train, None,
                                                     test)]):
                    pass
            return step

        learn(stores["s3"])()
        learn(stores["local"])()
        time.sleep(2 * SETTLED_SECONDS)
        mine, theirs, ratio, spread = compare(learn(stores["s3"]), learn(stores["local"]), rounds,
                                              1)
    yield row("features/train/s3-warm-cache", "the same from local files", ratio, 1.05,
              median_ms=mine, baseline_ms=theirs, spread=round(spread, 3))


@contextlib.contextmanager
def s3():
    """The URI of a new bucket, gone afterwards."""
    endpoint = os.environ.get("PARTIALHN_TEST_S3_ENDPOINT")
    keys = {f"AWS_{name}": os.environ.get(f"PARTIALHN_TEST_S3_{short}", "testing") for name, short
            in (("ACCESS_KEY_ID", "ACCESS_KEY"), ("SECRET_ACCESS_KEY", "SECRET_KEY"))}
    os.environ.update(keys)
    with contextlib.ExitStack() as stack:
        if endpoint is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            server = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            stack.callback(server.terminate)
            endpoint = f"http://127.0.0.1:{port}"
            for _ in range(300):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                time.sleep(0.2)
        bucket = f"partialhn-bench-{uuid.uuid4().hex[:12]}"
        place = f"s3://{bucket}/store?endpoint={endpoint}&region=us-east-1"
        client = s3_client(open_storage(place).s3)
        client.create_bucket(Bucket=bucket)
        yield place
        open_storage(place).delete(f"{bucket}/store")
        client.delete_bucket(Bucket=bucket)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    configure_torch(1)
    rounds = 3 if options.quick else 9
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experience = open_stream(CONFIG.data, folder / "datasets")[0]
        trunk = CutNetwork.of(build_network("slim_resnet18", 2), 3).trunk
        store = FeatureStore(LocalFileSystem(), str(folder / "mapped"))
        manifests, _ = precompute(store, trunk, feature_jobs(CONFIG, [experience], trunk)[:1])
        for group in (*(precomputing(folder, experience, depth, rounds, device)
                        for depth in (1, 3)),
                      *(resizing(folder, rounds, device, *cut) for cut in PHOTOGRAPHED),
                      reading(folder, store.open(manifests[0]), 5 * rounds),
                      training(folder, experience, rounds, 1 if options.quick else 3)):
            for made in group:
                rows.append(made)
                log(made)
    write(options.json, rows)


if __name__ == "__main__":
    main()
