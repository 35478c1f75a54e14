"""For every test: nothing asks the network, and Ray is started at most once."""

import os

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true",
               "DO_NOT_TRACK": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
               "RAY_worker_niceness": "0"}  # Ray's 15 starves its workers beside other work
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with two CPUs, for the whole session."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")
    yield
    ray.shutdown()
