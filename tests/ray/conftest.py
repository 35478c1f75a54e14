"""One small stream, learned once by the main job, that several test files look at."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partialhn.config import Config
from pipelines.settings import OutputConfig
from tests.support import small_config

SMALL = small_config(data={"tasks": 3}, train={"batch_size": 32},
                     features={"views": 2, "augment": "crop", "shard_rows": 500})



@dataclasses.dataclass(frozen=True)
class Learned:
    """What the main job left behind."""

    config: Config
    output: OutputConfig
    result: dict
    lines: list[str]


@pytest.fixture(scope="session")
def small():
    """Three tasks of digits."""
    return SMALL


@pytest.fixture(scope="session")
def changed():
    """The configuration with other options of its sections: train=dict(epochs=1), ..."""
    def change(config: Config, **sections) -> Config:
        return dataclasses.replace(config, **{
            name: dataclasses.replace(getattr(config, name), **options)
            for name, options in sections.items()})
    return change


@pytest.fixture(scope="session")
def outputs():
    """Where a run below a folder puts everything."""
    def of(folder: Path, name: str = "digits") -> OutputConfig:
        return OutputConfig(name=name, storage=str(folder / "store"),
                            result=str(folder / f"{name}.json"))
    return of


@pytest.fixture(scope="session")
def digit_folder():
    """Makes an image folder of train/<class>/* and test/<class>/* out of real digits."""
    from sklearn.datasets import load_digits

    def make(folder: Path, classes: int, train: int = 24, test: int = 8) -> Path:
        digits = load_digits()
        for label in range(classes):
            pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
            for part, rows in (("train", range(train)), ("test", range(train, train + test))):
                target = folder / part / f"digit-{label}"
                target.mkdir(parents=True)
                for row in rows:
                    Image.fromarray(pixels_NHW[row]).save(target / f"{row:03d}.png")
        return folder
    return make


@pytest.fixture(scope="session")
def run_main_job(ray_cluster):
    """The main job in this process, on the session's Ray."""
    from pipelines.train import train

    def run(config: Config, output: OutputConfig) -> Learned:
        lines: list[str] = []
        return Learned(config, output, train(config, output, lines.append), lines)
    return run


@pytest.fixture(scope="session")
def learned(run_main_job, outputs, tmp_path_factory):
    """Three tasks of digits, learned and registered by one worker."""
    return run_main_job(SMALL, outputs(tmp_path_factory.mktemp("learned")))


@pytest.fixture(scope="module")
def gpu_node(ray_cluster):
    """A second node of the session's Ray, with two CPUs and a GPU that Ray alone counts.

    Tests on it say with `logical_gpus` where its workers calculate. The driver has no GPU.
    """
    import ray

    script = Path(sys.executable).with_name("ray")
    node = subprocess.Popen(
        [script, "start", "--address", ray.get_runtime_context().gcs_address, "--num-cpus", "2",
         "--num-gpus", "1", "--block", "--disable-usage-stats"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: ray.cluster_resources().get("GPU") == 1, node)
        yield
    finally:
        node.terminate()
        node.communicate(timeout=60)
        wait_until(lambda: "GPU" not in ray.cluster_resources(), None)


def wait_until(holds, process):
    """Until something holds; fails with the output of a process that ends first."""
    end = time.monotonic() + 120
    while not holds():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def logical_gpus(gpu_node, monkeypatch):
    """Workers with one of Ray's GPUs calculate on the CPU."""
    from pipelines.platform import cluster

    monkeypatch.setattr(cluster, "GPU", "cpu")


@pytest.fixture
def command(capsys):
    """Runs a command in this process; returns its exit code, stdout and stderr."""
    from pipelines.cli.main import run

    def call(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = run([str(word) for word in words])
        except SystemExit as end:  # help, and the option parser's own errors
            code = end.code
        return code, *capsys.readouterr()
    return call
