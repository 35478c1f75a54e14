"""The main job over S3 on two nodes, each of which is killed once: the numbers of a quiet run.

One node is killed while features are computed, the one that learns in the middle of a task.
"""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from partialhn.config import (
    BackboneConfig,
    ComputeConfig,
    Config,
    DataConfig,
    FeatureConfig,
    HypernetConfig,
    TrainConfig,
)
from partialhn.run import run_stream

CONFIG = Config(
    data=DataConfig(data="images", tasks=4, classes=20, input_size=32),
    backbone=BackboneConfig(freeze_depth=3, trunk_epochs=2, trunk_batch_size=64),
    features=FeatureConfig(views=4, augment="crop-flip", shard_rows=128),
    hypernet=HypernetConfig(fresh_columns=4),
    train=TrainConfig(epochs=12, batch_size=64), compute=ComputeConfig(threads=1,
                                                                       feature_workers=2))
SCRIPT = Path(__file__).with_name("cluster_job.py")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def images(folder: Path, image_sets: Path) -> Path:
    """20 classes of Tiny-ImageNet, 100 training and 20 test images each, as Parquet."""
    source = image_sets / "tiny-imagenet-32"
    (folder / "images").mkdir()
    for split, each in (("train", 100), ("test", 20)):
        table = pq.read_table(min(source.glob(f"{split}*.parquet")))
        rows = [table.filter(pc.equal(table["label"], label)).slice(0, each)
                for label in range(20)]
        pq.write_table(pa.concat_tables(rows), folder / "images" / f"{split}.parquet")
    return folder / "images"


def test_two_nodes_over_s3_each_killed_once(service, prefix, image_sets, tmp_path, monkeypatch):
    images(tmp_path, image_sets)
    monkeypatch.chdir(tmp_path)
    quiet = run_stream(CONFIG, tmp_path / "quiet").fields
    Path("run.yaml").write_text(yaml.safe_dump(
        CONFIG.to_dict() | {"compute": {"threads": 1, "feature_workers": 2, "cache": "cache"}}))
    partialhn = str(Path(sys.executable).with_name("partialhn"))
    storage = f"s3://{prefix}?endpoint={service.endpoint}&region={service.region}"
    train = [partialhn, "train", "--config", "run.yaml", "--name", "nodes", "--storage", storage,
             "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--result", "result.json"]

    done = subprocess.run([sys.executable, SCRIPT, tmp_path, *train], capture_output=True,
                          text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(Path("found.json").read_text())
    assert found["code"] == 0, found["text"]
    assert len(set(found["killed"])) == 2
    result = json.loads(Path("result.json").read_text())
    assert result["weights_hash"] == quiet["weights_hash"]
    assert result["accuracy_matrix"] == quiet["accuracy_matrix"]
    assert [row["task"] for row in result["versions"]] == ["0", "1", "2", "3"]

    checked = subprocess.run([partialhn, "features", "verify", "--storage", storage],
                             capture_output=True, text=True, timeout=300, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    sets = [line for line in checked.stdout.splitlines() if " good: " in line]
    assert len(sets) == 12, checked.stdout

    again = subprocess.run(train, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "found, 0 images decoded" in again.stdout
    assert json.loads(Path("result.json").read_text())["weights_hash"] == quiet["weights_hash"]
