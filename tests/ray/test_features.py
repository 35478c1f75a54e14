"""Features made by Ray Data: the bytes of a single process, several depths in one pass."""

import copy

import numpy as np
import pytest
import torch

from partialhn.data.datasets import open_stream
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from pipelines.features.on_ray import decoding_actors, on_ray
from pipelines.features.produce import compute_features
from pipelines.platform.cluster import cluster_nodes, worker_device
from pipelines.platform.storage import open_storage


@pytest.fixture(scope="module")
def trunk():
    return CutNetwork.of(build_network("slim_resnet18", 5, seed=1).eval(), 4).trunk


@pytest.fixture(scope="module")
def experiences(small, tmp_path_factory):
    stream = open_stream(small.data, tmp_path_factory.mktemp("datasets"))[:1]
    assert len(stream[0].train) > 300
    return stream


def test_depths_in_one_pass_are_the_bytes_of_a_single_process(ray_cluster, small, changed, trunk,
                                                              experiences, tmp_path):
    compare(small, changed, trunk, experiences, tmp_path, on_ray(2))


def test_cpus_decode_for_a_trunk_on_a_gpu(logical_gpus, small, changed, trunk, experiences,
                                          tmp_path):
    device = worker_device(small.compute, cluster_nodes())
    assert (device.gpus, decoding_actors(device, 1)) == (1, 3)
    compare(small, changed, trunk, experiences, tmp_path, on_ray(1, device, decoders=1))


def test_what_a_worker_says_reaches_the_user(ray_cluster, small, trunk, experiences, tmp_path):
    """Its device has memory for 32 images at once."""
    def look(_, inputs):
        if len(inputs[0]) > 32:
            raise torch.OutOfMemoryError("far out of memory. Tried to allocate 8 bytes.")

    short = copy.deepcopy(trunk)
    short.stages[0].register_forward_pre_hook(look)
    jobs, said = feature_jobs(small, experiences, short, [2]), []
    compute_features(open_storage(str(tmp_path)), short, jobs, on_ray(1), say=said.append)
    assert len(said) == 1
    assert said[0].startswith("too little memory for features of 64 images")
    assert said[0].endswith("computing the rest with half as many images at once")


def compare(small, changed, trunk, experiences, tmp_path, run):
    config = changed(small, features={"shard_rows": 100})
    storage = open_storage(str(tmp_path / "ray"))
    jobs = feature_jobs(config, experiences, trunk, [2, 4])
    images = sum(len(getattr(experiences[0], part)) for part in ("train", "validation", "test"))
    seen = []
    manifests, decoded = compute_features(storage, trunk, jobs, run,
                                          progress=lambda *counts: seen.append(counts))
    assert decoded == images
    assert seen[-1] == (sum(job.shards for job in jobs[:3]),) * 2
    alone = FeatureStore(storage.filesystem, str(tmp_path / "alone"))
    for depth in (2, 4):
        wanted, _ = precompute(alone, trunk.upto(depth),
                               feature_jobs(config, experiences, trunk.upto(depth)))
        found = [m for job, m in zip(jobs, manifests, strict=True) if job.depth == depth]
        assert [[s.sha256 for s in m.shards] for m in found] == [
            [s.sha256 for s in m.shards] for m in wanted]
    again, decoded = compute_features(storage, trunk, jobs[::-1], run)
    assert (again[::-1], decoded) == (manifests, 0)
    rows = np.unique([manifest.rows for manifest in manifests[:3]])
    assert rows.sum() <= images
