"""What test_cluster.py runs: `partialhn train` on a Ray cluster whose nodes are killed on the way.

Three raylets: a head that runs no work, and two nodes. One is killed while features are computed
and a new one joins; then the one that learns is killed, and the other has to go on.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true",
               "RAY_worker_niceness": "0"}

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

PATIENCE = 600


def wait_for(found, what):
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, f"no {what} within {PATIENCE} s"
        time.sleep(0.1)
    return value


def kill(node):
    """SIGKILL to the raylet and every worker below it."""
    for process in node.all_processes["raylet"]:
        process.process.send_signal(signal.SIGKILL)


def main(folder: Path, command: list[str]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0,
                                                           "include_dashboard": True})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    job = subprocess.Popen([*command, "--ray-address", cluster.address], cwd=folder, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: list[str] = []

    def read() -> None:
        for line in job.stdout:
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def at_work(name):
        """The nodes where actors of a class are alive, while the job is."""
        assert job.poll() is None, "".join(lines)
        alive = list_actors(filters=[("state", "=", "ALIVE")])
        where = {actor.node_id for actor in alive if name in actor.class_name}
        return [node for node in nodes if node.node_id in where]

    def shards():
        assert job.poll() is None, "".join(lines)
        found = re.findall(r"features.*?(\d+)/(\d+)", "".join(lines))
        return found and 0 < int(found[-1][0]) < int(found[-1][1]) and found[-1]

    before = wait_for(shards, "shard")
    both = wait_for(lambda: len(there := at_work("MapWorker")) == 2 and there, "two featurisers")
    kill(both[0])
    nodes.append(cluster.add_node(num_cpus=1))
    wait_for(lambda: re.search(r"(?m)^task 2 \S+ learned", "".join(lines)), "second task")
    learning = wait_for(lambda: at_work("RayTrainWorker"), "learner")
    time.sleep(1)
    kill(learning[0])
    code = job.wait(PATIENCE)
    reader.join(60)
    (folder / "found.json").write_text(json.dumps({
        "code": code, "text": "".join(lines), "killed_at_shard": before,
        "killed": [node.node_id for node in (both[0], learning[0])]}))
    ray.shutdown()
    cluster.shutdown()


main(Path(sys.argv[1]), sys.argv[2:])
