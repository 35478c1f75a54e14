"""What features will cost is what they cost, and is said before any is computed."""

import dataclasses
import math
import re

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.features.cost import DepthPlan, described, plan
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.store import FeatureStore
from partialhn.networks.cut import CutNetwork
from pipelines.cli.main import run


@pytest.fixture(scope="module")
def trunk(network):
    return CutNetwork.of(network, 4).trunk


@pytest.mark.parametrize(("dtype", "compression"), [
    ("float32", "none"), ("float16", "none"), ("bfloat16", "none"), ("int8", "none"),
    ("float16", "lz4")])
def test_the_bytes_of_every_depth_are_those_that_are_written(tmp_path, with_options, digits, trunk,
                                                             dtype, compression):
    config = with_options(features={"feature_dtype": dtype, "compression": compression,
                                    "shard_rows": 64})
    jobs = feature_jobs(config, digits[:2], trunk, range(5))
    plans = plan(jobs, trunk)
    assert [each.depth for each in plans] == [0, 1, 2, 3, 4]
    assert all(each.images == 2 * (40 + 8 + 32) for each in plans)
    manifests, _ = precompute(FeatureStore(LocalFileSystem(), str(tmp_path)), trunk, jobs)
    for each in plans[:4]:  # at depth 4 a few numbers are kept, and Arrow's own bytes are most
        written = sum(manifest.bytes for job, manifest in zip(jobs, manifests, strict=True)
                      if job.depth == each.depth)
        assert each.bytes == pytest.approx(written, rel=0.2)
        assert each.shape_CHW == next(job.shape_CHW for job in jobs if job.depth == each.depth)
    images = sum(len(image) for experience in digits[:2] for split_ in
                 ("train", "validation", "test") for image in getattr(experience, split_).read())
    assert plans[0].image_bytes == pytest.approx(images, rel=0.05)


def test_the_epochs_after_which_features_pay():
    one = DepthPlan(3, (80, 8, 8), 100, 2, 1000, 500.0, 1.5, once=0.012, again=0.006, read=0.002)
    assert one.epochs == pytest.approx(3)
    never = dataclasses.replace(one, read=0.006)
    assert math.isinf(never.epochs)
    text = "\n".join(described([one, never]))
    assert "3.0 epochs" in text
    assert "never" in text
    assert "100 images, 2 views of each" in text
    assert "1 view of each" in described([dataclasses.replace(one, views=1)])[0]
    assert described([]) == []


def test_a_deeper_trunk_costs_more_again_and_its_features_pay(with_options, digits, trunk):
    torch.set_num_threads(1)
    plans = plan(feature_jobs(with_options(), digits[:1], trunk, range(5)), trunk)
    again = [each.again for each in plans]
    assert again == sorted(again)
    assert all(each.once > each.again > 0 for each in plans)
    assert math.isfinite(plans[4].epochs)
    assert plans[4].seconds > 40 * plans[4].once  # training images, and those of other splits


def test_the_command_prints_every_depth_and_stores_none(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("features: {feature_dtype: int8}\ndata: {input_size: 16}\n")
    for words in ((), ("--feature-dtype", "float32")):
        assert run(["features", "plan", "--config", str(tmp_path / "c.yaml"), "--data", "digits",
                    "--tasks", "5", "--storage", str(tmp_path / "store"), *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "1797 images, 2 views" in lines[0]
        rows = {int(line.split()[0]): line.split() for line in lines[2:7]}
        assert rows.keys() == {0, 1, 2, 3, 4}
        assert rows[1][1] == "20x16x16"
        assert rows[4][1].endswith("x1x1")
        assert all(row[-1] in ("epochs", "never") for row in rows.values())
    assert not (tmp_path / "store" / "features").exists()


def test_images_that_cannot_be_read_are_no_plan(tmp_path, with_options, digits, trunk):
    (tmp_path / "a.png").write_bytes(b"no image")
    table = dataclasses.replace(digits[0].train, files=(str(tmp_path / "a.png"),), file_N=[0],
                                row_N=[-1], label_N=[0])
    broken = dataclasses.replace(digits[0], train=table, validation=table, test=table)
    assert plan(feature_jobs(with_options(), [broken], trunk, [1]), trunk) == []


def test_a_plan_for_what_train_refuses_is_refused(capsys, tmp_path):
    for depth in ("9", "layer9"):
        assert run(["features", "plan", "--data", "digits", "--freeze-depth", depth,
                    "--storage", str(tmp_path)]) == 2
        assert re.search(rf"error: .*{depth}.*allowed: ", capsys.readouterr().err)
