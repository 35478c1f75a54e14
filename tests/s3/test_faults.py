"""S3 that answers 500, 503 or not at all: what may pass is survived, the rest is said clearly."""

import itertools
import json
import os

import numpy as np
import pytest
import torch

from partialhn.checkpoints import checkpoint
from partialhn.config import ComputeConfig
from partialhn.errors import InputError, IntegrityError
from partialhn.features.manifest import FeatureRecipe
from pipelines.features.produce import open_store
from pipelines.platform import s3

RECIPE = FeatureRecipe(trunk="t" * 64, data="d" * 64, transform="none", input_size=8, views=1,
                       augment="none", seed=0, dtype="float32", shard_rows=4)


def once(kind, method="", part=""):
    """The first request of a method whose path has a part fails; the others pass."""
    count = itertools.count()
    return lambda request, number: (kind if request.method.startswith(method)
                                    and part in request.path and next(count) == 0 else None)


@pytest.mark.parametrize("kind", ["500", "503", "drop", "lost", "cut", "stall"])
def test_every_operation_survives(shaky, proxy, kind):
    path = shaky.path("a", "b")
    large = os.urandom(1 << 20) * 11

    def upload():
        with shaky.filesystem.open_output_stream(shaky.path("large")) as sink:
            sink.write(large)

    def download():
        with shaky.filesystem.open_input_file(shaky.path("large")) as source:
            assert source.readall() == large

    steps = [("PUT", lambda: shaky.write_text(path, "text")),
             ("HEAD", lambda: shaky.exists(path) or pytest.fail("not there")),
             ("GET", lambda: shaky.read_text(path) == "text" or pytest.fail("other text")),
             ("GET", lambda: len(list(shaky.list(shaky.path("a")))) == 1 or pytest.fail("list")),
             ("HEAD", lambda: shaky.stat(path) or pytest.fail("no entry")),
             ("PUT", upload), ("GET", download),
             ("DELETE", lambda: shaky.delete(path))]
    for method, step in steps:
        proxy.fault = once(kind, method)
        before = len(proxy.faults())
        step()
        assert proxy.faults()[before:] == [kind], (method, proxy.requests[-4:])
    assert shaky.stat(path) is None


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_a_claim_whose_answer_was_lost_is_ours(shaky, proxy, kind):
    """The service took it, the client asked again and heard that it is there already."""
    proxy.fault = once(kind, "PUT")
    assert shaky.put_if_absent(shaky.path("claim"), b"me")
    assert proxy.faults() == [kind]
    proxy.fault = once("lost", "PUT")
    assert not shaky.put_if_absent(shaky.path("claim"), b"another")
    assert shaky.read_text(shaky.path("claim")) == "me"


def test_features_are_whole_after_many_faults(shaky, proxy, tmp_path):
    proxy.seeded(7)
    store = open_store(shaky)
    z_NVCHW = torch.arange(8 * 16, dtype=torch.float32).reshape(8, 1, 16, 1, 1)
    shards = [store.write_shard(RECIPE, index, z_NVCHW[rows], np.arange(8)[rows],
                                [f"image-{row}" for row in range(8)[rows]], seconds=0.1)
              for index, rows in enumerate((slice(0, 4), slice(4, 8)))]
    manifest = store.commit(RECIPE, shards, (1, 16, 1, 1))
    found = open_store(shaky, ComputeConfig(cache=str(tmp_path))).open(manifest)
    gathered = found.gather(torch.arange(8), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(gathered, z_NVCHW[:, 0])
    assert len(proxy.faults()) >= 2, "no fault, no test"


def test_checkpoints_are_whole_after_many_faults(shaky, proxy, tmp_path):
    proxy.seeded(3)
    tensors = {"weight": torch.randn(700, 1000)}
    checkpoint.save(tmp_path / "made", "model", tensors, {"note": "n"})
    for number in range(3):
        checkpoint.upload(tmp_path / "made", shaky.filesystem, shaky.path(f"model-{number}"))
        assert checkpoint.fetch(shaky.filesystem, shaky.path(f"model-{number}"),
                                tmp_path / f"read-{number}")
        found, fields = checkpoint.load(tmp_path / f"read-{number}", "model")
        assert torch.equal(found["weight"], tensors["weight"])
        assert fields["note"] == "n"
    assert len(proxy.faults()) >= 2, "no fault, no test"


@pytest.mark.parametrize(("kind", "message"), [
    ("expired", "AWS credentials have expired: .* answers ExpiredToken for bucket .*; renew them"),
    ("denied", r"access denied: .* answers AccessDenied .*the credentials need\s+s3:ListBucket"),
])
def test_what_does_not_pass_is_said(shaky, proxy, kind, message):
    proxy.fault = lambda request, number: kind
    with pytest.raises(InputError, match=message):
        shaky.check()
    with pytest.raises(InputError, match=message), shaky.explained():
        shaky.read_text(shaky.path("a"))  # Arrow gets no reason at all: a HEAD has no body
    assert len(proxy.requests) < 12, "asking again is of no use"


def test_a_bucket_that_may_be_read_only(shaky, proxy):
    proxy.fault = lambda request, number: "denied" if request.method == "PUT" else None
    with pytest.raises(InputError, match=r"access denied: .*\(PutObject\)"):
        shaky.check()
    shaky.check(write=False)


def test_a_service_that_stays_broken_is_an_error_in_the_end(shaky, proxy, monkeypatch):
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    proxy.fault = lambda request, number: "503"
    with pytest.raises(InputError, match=r"answers SlowDown for bucket .*reduce your request rate"):
        shaky.check()
    assert len(proxy.requests) == 3  # at once, then patiently


def test_a_busy_service_is_waited_for(shaky, proxy):
    proxy.fault = once("503")
    shaky.check()
    assert proxy.faults() == ["503"]


def test_a_damaged_answer_is_never_taken_for_a_shard(shaky, proxy, tmp_path):
    """A shard's bytes are held against the manifest whatever S3 says of them."""
    store = open_store(shaky)
    shard = store.write_shard(RECIPE, 0, torch.ones(4, 1, 2, 1, 1), np.arange(4), list("abcd"),
                              seconds=0.1)
    manifest = store.commit(RECIPE, [shard], (1, 2, 1, 1))
    path = f"{store.folder(RECIPE.key)}/{shard.name}"
    whole = shaky.read_bytes(path)
    shaky.write_text(path, "x" * len(whole))
    with pytest.raises(IntegrityError, match="damaged"):
        open_store(shaky, ComputeConfig(cache=str(tmp_path))).open(manifest)
    assert json.loads(shaky.read_text(f"{store.folder(RECIPE.key)}/part-00000.json"))["rows"] == 4
