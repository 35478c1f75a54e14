"""A search on a cluster of two unequal nodes, in a process of its own: both are used, and a node
that is killed costs only the trials that ran on it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tune_cluster_job.py")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_nodes_one_is_killed(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, str(tmp_path)], capture_output=True, text=True,
                          timeout=1400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "nodes have room for 1 + 2" in found["text"]
    assert found["nodes_with_trials"] == 2
    assert found["killed"], "no trial ran on the node when it was killed"
    assert found["records"] == found["statuses"].count("finished") == 12 + 4
    assert found["finished_before"] == found["finished_before_kept"]
    assert found["finished_before"] >= 1
