"""Pruning on S3: by the service's clock, what a job uses stays, the rest goes, manifest first."""

import dataclasses

import numpy as np
import pytest
import torch

from partialhn.config import ComputeConfig
from partialhn.errors import IntegrityError
from partialhn.features.manifest import FeatureRecipe
from pipelines.cli.main import run
from pipelines.features.in_use import InUse, records
from pipelines.features.produce import open_store

RECIPE = FeatureRecipe(trunk="t" * 64, data="d" * 64, transform="none", input_size=8, views=1,
                       augment="none", seed=0, dtype="int8", shard_rows=4, compression="lz4")


@pytest.fixture
def store(storage, tmp_path):
    return open_store(storage, ComputeConfig(cache=str(tmp_path / "cache")))


def add(store, seed):
    recipe = dataclasses.replace(RECIPE, seed=seed)
    shard = store.write_shard(recipe, 0, torch.full((4, 1, 3, 2, 2), float(seed)), np.zeros(4),
                              list("abcd"), seconds=1)
    return store.commit(recipe, [shard], (1, 3, 2, 2))


def test_what_a_job_uses_stays_and_the_rest_goes(storage, store, service, capsys, tmp_path,
                                                 monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"{storage.uri}?endpoint={service.endpoint}&region={service.region}"
    used, gone, late = add(store, 1), add(store, 2), add(store, 3)
    opened = store.open(gone)
    with InUse(storage, "stream pets", seconds=30) as job:
        job.add([used.key])
        assert run(["features", "prune", "--storage", uri, "--no-registry", "--unreferenced"]) == 0
        out = capsys.readouterr().out
        assert gone.key in out
        assert used.key not in out
        assert run(["features", "prune", "--storage", uri, "--no-registry", "--older-than", "1h",
                    "--delete"]) == 0
        assert len(storage.folders(storage.path("features"))) == 3, "none is an hour old"
        assert run(["features", "prune", "--storage", uri, "--no-registry", "--unreferenced",
                    "--delete"]) == 0
        assert storage.folders(storage.path("features")) == (used.key,)
        rows_B = torch.arange(4)
        assert torch.allclose(opened.gather(rows_B, torch.zeros_like(rows_B)),
                              torch.full((4, 3, 2, 2), 2.0))
        with pytest.raises(IntegrityError, match=rf"{late.shards[0].name} is missing"):
            store.open(late)
        assert store.find(late.recipe) is None
    assert list(records(storage)) == []
