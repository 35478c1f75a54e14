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
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
                    reason="needs Debian's PostgreSQL")
def test_the_main_job_runs_through_the_whole_topology():
    pytest.importorskip("flask_wtf", reason="MLflow's login needs mlflow[auth]")
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    # short, and not below pytest's: Ray's sockets lie in it, and PostgreSQL's user must reach it
    folder = Path(tempfile.mkdtemp(prefix="phn-"))
    try:
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "infra" / "local_topology.py"), "--folder", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            cwd=folder)
        try:
            said = run.communicate(timeout=1500)[0]
        finally:
            run.terminate()
            run.wait(120)
        assert run.returncode == 0, said
        result = json.loads((folder / "result.json").read_text())
        assert len(result["versions"]) == 3
        assert result["storage"] == "s3://partialhn-topology/store"
        assert result["tracking_uri"].startswith("http://127.0.0.1:")
        assert "champion" in said
        assert "no secret in any log" in said
    finally:
        shutil.rmtree(folder, ignore_errors=True)
