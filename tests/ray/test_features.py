"""Features made by Ray Data: the bytes of a single process, several depths in one pass."""

import numpy as np
import pytest

from partialhn.data.datasets import open_stream
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from pipelines.features.on_ray import on_ray
from pipelines.features.produce import compute_features
from pipelines.platform.storage import open_storage


@pytest.fixture(scope="module")
def trunk():
    return CutNetwork.of(build_network("slim_resnet18", 5, seed=1).eval(), 4).trunk


@pytest.fixture(scope="module")
def experiences(small, tmp_path_factory):
    stream = open_stream(small.data, tmp_path_factory.mktemp("datasets"))[:1]
    assert len(stream[0].train) > 300
    return stream


@pytest.mark.parametrize("actors", [{"workers": 2}, {"workers": 1, "decoders": 1}])
def test_depths_in_one_pass_are_the_bytes_of_a_single_process(ray_cluster, small, changed, trunk,
                                                              experiences, tmp_path, actors):
    """Also where other actors decode."""
    config = changed(small, features={"shard_rows": 100})
    storage = open_storage(str(tmp_path / "ray"))
    jobs = feature_jobs(config, experiences, trunk, [2, 4])
    images = sum(len(getattr(experiences[0], part)) for part in ("train", "validation", "test"))
    seen = []
    manifests, decoded = compute_features(storage, trunk, jobs, on_ray(**actors),
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
    again, decoded = compute_features(storage, trunk, jobs[::-1], on_ray(**actors))
    assert (again[::-1], decoded) == (manifests, 0)
    rows = np.unique([manifest.rows for manifest in manifests[:3]])
    assert rows.sum() <= images
