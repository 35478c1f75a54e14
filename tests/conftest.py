"""For every test: nothing asks the network, and Ray is started at most once.

Under pytest-xdist a worker process takes whole groups of tests: a file is a group, but all tests
that may use the session's Ray are one, and so are all that use the session's servers. So no
second worker starts them again. `tests/README.md` describes tiers and fixtures.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true",
               "DO_NOT_TRACK": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
               "RAY_worker_niceness": "0",  # Ray's 15 starves its workers beside other work
               "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as `start_ray` does for a local Ray
               # seven processes for jobs that nobody gives a test's MLflow server
               "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
# one thread a process, before torch is imported: two test processes share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
# keys of the service under test, or of nobody: no test reaches an account of the developer's
os.environ |= {"AWS_ACCESS_KEY_ID": os.environ.get("PARTIALHN_TEST_S3_ACCESS_KEY", "testing"),
               "AWS_SECRET_ACCESS_KEY": os.environ.get("PARTIALHN_TEST_S3_SECRET_KEY", "testing")}
import pytest

for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
             "AWS_REGION", "AWS_DEFAULT_REGION"):
    os.environ.pop(name, None)

TOGETHER = {"tests/ray": "ray", "tests/golden": "ray", "tests/s3/test_features_found.py": "ray",
            "tests/s3/test_dictionary.py": "ray",
            "tests/servers": "servers"}
"""Folders and files that share what a session starts once, and the group that one worker takes."""
SHARED = {"ray_cluster": "ray", "database": "servers"}
"""What is started once, and the group of the tests that may use it."""
LONG_FIRST = ("ray", "tests/faults/test_retrain_chaos.py", "servers",
              "tests/unit/test_streaming.py", "tests/process/test_train.py",
              "tests/process/test_task_share.py", "tests/security/test_security.py")
"""Groups that take longest: begun first, so that no worker is left alone with one at the end."""
CI_SKIPS = ("no CUDA device", "PARTIALHN_TEST_DATA is not set", "no namespace")
"""What the reasons of tests that may skip in continuous integration begin with."""


def group_of(nodeid):
    """The tests that one worker process takes: those of a file, or of folders that share much."""
    path = nodeid.partition("::")[0]
    return TOGETHER.get(path, TOGETHER.get(path.rpartition("/")[0], path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """pytest-xdist's own marks of groups (3.8) are lost with pytest 9.2."""

        def _split_scope(self, nodeid):
            return group_of(nodeid)
    return Groups(config, log)


def pytest_collection_modifyitems(items):
    """Long groups first. Refuses a test that would start Ray or a server in a second worker."""
    for item in items:
        for fixture, group in SHARED.items():
            if fixture in item.fixturenames and group_of(item.nodeid) != group:
                allowed = ", ".join(path for path in TOGETHER if TOGETHER[path] == group)
                raise pytest.UsageError(f"{item.nodeid} uses {fixture}; allowed in: {allowed}")
    order = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In continuous integration (CI=true) a skip is a failure, unless its reason is in `CI_SKIPS`:
    a GPU is missing, or a right that no installation gives.
    """
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(CI_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} skips, which it may not in CI: {reason}"
    return report


@pytest.fixture(scope="session")
def image_sets():
    """The folder of real image sets that PARTIALHN_TEST_DATA names."""
    if not os.environ.get("PARTIALHN_TEST_DATA"):
        pytest.skip("PARTIALHN_TEST_DATA is not set: the folder of real image sets")
    return Path(os.environ["PARTIALHN_TEST_DATA"])


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with two CPUs, for the whole session."""
    import ray

    from pipelines.platform.cluster import init_ray

    init_ray("local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR")
    yield
    ray.shutdown()


class Tasks:
    """Real small models of a stream of digits, one task more each, registered on demand."""

    NAMES = ("zero-one", "two-three", "four-five")

    def __init__(self, folder):
        from partialhn.config import BackboneConfig, Config, DataConfig
        from partialhn.data.datasets import open_stream

        self.folder = folder
        self.config = Config(DataConfig(data="digits", tasks=5, input_size=16),
                             BackboneConfig(freeze_depth=3))
        self.experiences = [dataclasses.replace(each, name=name) for name, each in
                            zip(self.NAMES, open_stream(self.config.data, folder), strict=False)]
        for count in range(1, len(self.NAMES) + 1):
            self._save(count)

    def _save(self, count):
        import torch

        from partialhn.checkpoints.model import Model, TaskInfo, empty_parts
        from partialhn.evaluation.answer_sample import write_sample
        from partialhn.predict import Predictor

        torch.manual_seed(count)
        known = self.experiences[:count]
        trunk, strategy = empty_parts(self.config)
        for index, experience in enumerate(known):
            strategy.add_task(len(experience.classes))
            strategy.finish(index)
        model = Model(self.config, trunk.eval(), strategy.requires_grad_(False).eval(),
                      tuple(TaskInfo(each.name, each.classes) for each in known))
        model.save(self.folder / f"model-{count}")
        write_sample(self.folder / f"sample-{count}.parquet",
                     Predictor.load(self.folder / f"model-{count}"), known)

    def register(self, registry, name, index, placing=None, work="0123456789ab"):
        """Registers the model after a task as the main job does."""
        from partialhn.checkpoints.checkpoint import load
        from pipelines.registry.package import Contents
        from pipelines.registry.versions import Registration

        experience, folder = self.experiences[index], self.folder / f"model-{index + 1}"
        parent = registry.stream_run(name, work, self.config.to_dict())
        run = registry.task_run(parent, experience.name, index, f"{work}-{index}")
        record = Registration(
            stream=name, work=work, task=experience.name, task_index=index,
            classes=experience.classes, trunk_fingerprint="f" * 64, feature_keys=("key",),
            weights_hash=load(folder, "model")[1]["weights_hash"], acc=0.9 - index / 100,
            learning_accuracy=0.9, forgetting=0.0, storage="/data/store",
            prefix=f"{work}-{index}", parent="")
        return registry.register_task(run, record, Contents(
            folder, experience.name, experience.test.take([0]).read()[0],
            self.folder / f"sample-{index + 1}.parquet"), placing)


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory):
    """Puts an empty MLflow database into a storage folder: MLflow takes seconds to make one."""
    from pipelines.platform.storage import open_storage
    from pipelines.registry.client import connect

    made = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(open_storage(str(made.parent)), f"sqlite:///{made}")

    def put(folder):
        folder.mkdir(parents=True)
        shutil.copy(made, folder)
    return put


@pytest.fixture(scope="session")
def digit_tasks(tmp_path_factory):
    """Three real models of digit tasks with their samples, not registered yet."""
    return Tasks(tmp_path_factory.mktemp("digit-tasks"))


@pytest.fixture(autouse=True)
def own_random_numbers():
    """What a test draws does not depend on the tests that ran before it in its process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_registry_of_another_test():
    """MLflow keeps a tracking URI that was set in the environment, for whatever comes next."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
