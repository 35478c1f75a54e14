"""One thread a test, and a small stream of real digits with the features of an untrained trunk."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.config import (
    BackboneConfig,
    Config,
    DataConfig,
    FeatureConfig,
    HypernetConfig,
    TrainConfig,
)
from partialhn.data.datasets import open_stream
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.run import collect, cut_network

THREADS = int(os.environ.get("PARTIALHN_TEST_THREADS", "1"))
"""`make test-isa` sets it: what holds with one thread must hold with two."""

HERE = str(Path(__file__).parent)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whatever uses this network's numbers `trains`; files that train others say so themselves."""
    for item in items:
        if "network" in item.fixturenames and str(item.path).startswith(HERE):
            item.add_marker("trains")


@pytest.fixture(autouse=True)
def same_arithmetic():
    """Whatever a test before it has set for the whole process."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(False)


TINY = Config(
    data=DataConfig(data="digits", tasks=5, input_size=16),
    backbone=BackboneConfig(freeze_depth=3, trunk_epochs=1),
    features=FeatureConfig(views=2, shard_rows=20, feature_dtype="float32"),
    hypernet=HypernetConfig(code_dim=8, fresh_columns=4, hidden=(6, 5), channel_dim=4),
    train=TrainConfig(epochs=2, batch_size=16, detector_features=16),
)


def part(table, images):
    return table.take(range(images))


@pytest.fixture(scope="session")
def config():
    """Five tasks of two digits, 16 x 16 pixels, freeze depth 3."""
    return TINY


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory):
    """The five experiences of `config`, with every image."""
    return open_stream(TINY.data, tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def digits(all_digits):
    """The same, cut to 40 images for training, 8 and 32 held out."""
    return [dataclasses.replace(e, train=part(e.train, 40), validation=part(e.validation, 8),
                                test=part(e.test, 32)) for e in all_digits]


@pytest.fixture(scope="session")
def images(digits):
    """128 digits as uint8 (128, 3, 16, 16)."""
    from partialhn.data.decode import decode

    return torch.cat([decode(e.test, 16).images_BCHW for e in digits[:4]])


@pytest.fixture(scope="session")
def network(images):
    """An untrained slim ResNet-18 whose BatchNorm statistics fit the digits."""
    network = build_network("slim_resnet18", 2, seed=3).train()
    with torch.no_grad():
        for _ in range(8):
            network(images[::2])
    return network.eval()


@pytest.fixture(scope="session")
def cut(network):
    """Trunk, head and start at depth 3."""
    return cut_network(TINY, network)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, digits, cut):
    """The features of `digits`, in Arrow shards of 20 images."""
    store = FeatureStore(LocalFileSystem(), str(tmp_path_factory.mktemp("store")))
    jobs = feature_jobs(TINY, digits, cut.trunk)
    manifests, _ = precompute(store, cut.trunk, jobs)
    made = collect(store, jobs, manifests, digits)
    shared = [(getattr(task, split), getattr(task, split).y_N.clone())
              for task in made for split in ("train", "validation", "test")]
    yield made
    for features, y_N in shared:
        assert torch.equal(features.y_N, y_N), "a test has changed the labels that all tests share"


@pytest.fixture(scope="session")
def well_tested(tmp_path_factory, tasks, digits, all_digits, cut):
    """`tasks` with the features of every test image, 71 to 73 a task: for measured accuracies."""
    store = FeatureStore(LocalFileSystem(), str(tmp_path_factory.mktemp("well-tested")))
    experiences = [dataclasses.replace(e, test=whole.test)
                   for e, whole in zip(digits, all_digits, strict=True)]
    jobs = feature_jobs(TINY, experiences, cut.trunk)
    manifests, _ = precompute(store, cut.trunk, jobs)
    return collect(store, jobs, manifests, experiences)


@pytest.fixture(scope="session")
def with_options(config):
    """The tiny configuration with other options of its sections: hypernet=dict(...), ..."""
    def change(**sections):
        return dataclasses.replace(config, **{
            name: dataclasses.replace(getattr(config, name), **options)
            for name, options in sections.items()})
    return change
