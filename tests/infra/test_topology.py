"""The topology of compose.yaml as local processes, with the main job through it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
                    reason="needs Debian's PostgreSQL")
def test_the_main_job_runs_through_the_whole_topology():
    pytest.importorskip("flask_wtf", reason="MLflow's login needs mlflow[auth]")
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    # short, and not below pytest's: Ray's sockets lie in it, and PostgreSQL's user must reach it
    folder = Path(tempfile.mkdtemp(prefix="phn-"))
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "infra" / "local_topology.py"), "--folder", str(folder)],
            capture_output=True, text=True, env=environment, timeout=560, check=False, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads((folder / "result.json").read_text())
        assert len(result["versions"]) == 3
        assert result["storage"] == "s3://partialhn-topology/store"
        assert result["tracking_uri"].startswith("http://127.0.0.1:")
        assert "champion" in done.stdout
        assert "no secret in any log" in done.stdout
    finally:
        shutil.rmtree(folder, ignore_errors=True)
