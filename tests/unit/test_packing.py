"""How many workers and trials run at once: arithmetic, and refusals that show it."""

import pytest

from partialhn.config import ComputeConfig
from partialhn.errors import InputError
from pipelines.platform.cluster import WorkerDevice, worker_device
from pipelines.platform.packing import Room, pack

GB = 10**9

SMALL, LARGE = Room(2, 0, 8 * GB), Room(16, 2, 64 * GB)


@pytest.mark.parametrize(("need", "per_node"), [
    (Room(1, 0, GB), (2, 16)),
    (Room(0.5, 0, GB), (4, 32)),
    (Room(1, 0.25, GB), (0, 8)),
    (Room(1, 0, 5 * GB), (1, 12)),
    (Room(1, 0.4, GB), (0, 4)),
    (Room(0.1, 0, GB), (8, 64))])
def test_the_scarcest_of_cpus_gpus_and_memory_decides(need, per_node):
    packing = pack(need, [SMALL, LARGE])
    assert packing.per_node == per_node
    assert packing.at_once == sum(per_node)


def test_a_limit_is_kept_and_said():
    packing = pack(Room(1, 0, GB), [SMALL, LARGE], 3)
    assert packing.at_once == 3
    assert "2 + 16" in str(packing)
    assert "limited to 3" in str(packing)


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, WorkerDevice("cuda", 1.0)), ({"workers": 2}, WorkerDevice("cuda", 1.0)),
    ({"workers": 3}, WorkerDevice()), ({"device": "cpu", "feature_workers": 9}, WorkerDevice()),
    ({"device": "gpu", "feature_workers": 2}, WorkerDevice("cuda", 1.0))])
def test_the_cluster_decides_which_device_workers_have(options, wanted):
    assert worker_device(ComputeConfig(**options), [SMALL, LARGE]) == wanted


@pytest.mark.parametrize(("options", "nodes", "text"), [
    ({"workers": 3, "device": "gpu"}, [SMALL, LARGE], "workers is 3 with one GPU"),
    ({"feature_workers": 3}, [LARGE], "feature_workers is 3 with one GPU"),
    ({"workers": 2}, [Room(1, 4, GB)], "workers is 2 with one CPU"),
    ({"workers": 19}, [SMALL, LARGE], "room for 18 "), ({"device": "gpu"}, [SMALL], "one GPU")])
def test_workers_that_ray_would_wait_for_are_refused(options, nodes, text):
    with pytest.raises(InputError, match=text):
        worker_device(ComputeConfig(**options), nodes)


@pytest.mark.parametrize("need", [Room(17, 0, GB), Room(1, 4, GB), Room(1, 0, 65 * GB)])
def test_what_fits_nowhere_is_refused_with_the_numbers(need):
    with pytest.raises(InputError) as caught:
        pack(need, [SMALL, LARGE])
    text = str(caught.value)
    assert str(need) in text
    assert "node 1: 2 CPU" in text
    assert "node 2: 16 CPU, 2 GPU, 64.0 GB" in text
