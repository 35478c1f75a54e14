"""What test_tune_cluster.py runs: a search on two nodes, one of which is killed half way."""

import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true",
               "RAY_worker_niceness": "0"}

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from partialhn.config import (
    BackboneConfig,
    ComputeConfig,
    Config,
    DataConfig,
    FeatureConfig,
    HypernetConfig,
    TrainConfig,
)
from pipelines.platform.storage import open_storage
from pipelines.search.settings import SearchConfig
from pipelines.search.state import SearchState
from pipelines.tune.run import tune

CONFIG = Config(
    data=DataConfig(data="digits", tasks=3, input_size=16),
    backbone=BackboneConfig(trunk_epochs=1, trunk_batch_size=32),
    features=FeatureConfig(views=2, augment="crop", shard_rows=500),
    hypernet=HypernetConfig(fresh_columns=4),
    train=TrainConfig(epochs=20, batch_size=32), compute=ComputeConfig(threads=1))


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1,
                                                           "include_dashboard": True})
    other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    state = SearchState(open_storage(str(folder / "store")), "nodes")
    found = {"killed": [], "nodes": set(), "before": {}}

    def watch() -> None:
        while True:
            time.sleep(1)
            actors = [actor for actor in list_actors(filters=[("state", "=", "ALIVE")])
                      if "ImplicitFunc" in actor.class_name]
            found["nodes"] |= {actor.node_id for actor in actors}
            there = [actor for actor in actors if actor.node_id == other.node_id]
            if len(state.records()) >= 4 and len(found["nodes"]) == 2 and there:
                found["before"] = {each.plan.id: each for each in state.records()}
                found["killed"] = [plan.id for plan in state.interrupted()]
                cluster.remove_node(other, allow_graceful=False)
                return

    threading.Thread(target=watch, daemon=True).start()
    lines: list[str] = []
    tune(CONFIG, SearchConfig(
        name="nodes", depths=(2, 3), budget="12-trials", seeds=1, algorithm="random",
        early_stopping="none", storage=str(folder / "store"), output=str(folder / "advice")),
        lambda text: (lines.append(text), print(text, flush=True)))
    records = {each.plan.id: each for each in state.records()}
    before = found["before"]
    (folder / "found.json").write_text(json.dumps({
        "text": "\n".join(lines), "nodes_with_trials": len(found["nodes"]),
        "killed": found["killed"], "records": len(records),
        "statuses": [each.status for each in records.values()], "finished_before": len(before),
        "finished_before_kept": sum(records[trial] == each for trial, each in before.items())}))
    ray.shutdown()
    cluster.shutdown()


main(Path(sys.argv[1]))
