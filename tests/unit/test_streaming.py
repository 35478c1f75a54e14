"""Tasks larger than memory: computed shard by shard, and learned from in an order of the seed's."""

import dataclasses
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.features import store as store_module
from partialhn.features.batches import FeatureBatch, Workers, epoch_batches, prefetched
from partialhn.features.extract import feature_jobs, precompute
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from partialhn.networks.cut import CutNetwork
from partialhn.run import cut_network
from partialhn.training import answers as answers_module
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner

MIB = 1 << 20
LARGE, LITTLE, VIEWS = 128 * MIB, 96 * MIB, 12
"""Features of the large task, less memory than that, and the large task's views of an image."""
CPU = torch.device("cpu")


LIMITED = """
import os, re, resource, struct, sys, traceback
from pathlib import Path
import cloudpickle
import torch
import partialhn.features.extract
import partialhn.training.learner
torch.set_num_threads(1)
layer = torch.nn.Conv2d(3, 8, 3)  # what a first step imports and sets up is no part of the task
optimiser = torch.optim.Adam(layer.parameters(), fused=True)
layer(torch.zeros(64, 3, 16, 16)).sum().backward()
optimiser.step()
while header := sys.stdin.buffer.read(16):
    memory, size = struct.unpack("qq", header)
    content = sys.stdin.buffer.read(size)
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status:
            print(f"ended with {status}", flush=True)
        print("END", flush=True)
        continue
    try:
        work = cloudpickle.loads(content)
        if memory:
            status = Path("/proc/self/status").read_text()
            now = 1024 * int(re.search(r"VmData:\\s+(\\d+)", status)[1])
            resource.setrlimit(resource.RLIMIT_DATA, (now + memory,) * 2)
        said = str(work())
    except BaseException:
        said = traceback.format_exc()
    print(said, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def in_a_process_with():
    """A function (memory, work): what work() returns, as text, from a new process that may take so
    many bytes more than it has (0: any); maps of files do not count.

    The processes are forked from one that has imported the packages. Arrow's own allocator would
    reserve address space that it does not use, and that counts; so do a stack and a heap for each
    of as many threads as the machine has processors, and what is given back inside a heap.
    """
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    server = subprocess.Popen([sys.executable, "-c", LIMITED], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE,
                              env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system",
                                                "ARROW_IO_THREADS": "1", "OMP_NUM_THREADS": "1",
                                                "MALLOC_ARENA_MAX": "1",
                                                "MALLOC_MMAP_THRESHOLD_": f"{MIB}"})

    def run(memory, work):
        content = cloudpickle.dumps(work)
        server.stdin.write(struct.pack("qq", memory, len(content)) + content)
        server.stdin.flush()
        lines = list(itertools.takewhile(lambda line: line not in (b"END\n", b""),
                                         iter(server.stdout.readline, None)))
        assert server.poll() is None, "the process that forks has ended"
        return b"".join(lines).decode().strip()

    yield run
    server.communicate()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert server.returncode == 0


needs_limits = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@needs_limits
def test_a_task_larger_than_memory_is_computed(tmp_path, network, with_options,
                                               in_a_process_with):
    """400 MB of features of real digits, in a process that may take 250 MiB more than it has, 40 of
    them for the stacks of the threads that read and write, which count in full.
    """
    config = with_options(data={"input_size": 96}, backbone={"freeze_depth": 0},
                          features={"shard_rows": 64})
    whole = open_stream(DataConfig(data="digits", tasks=1, input_size=96, validation=0.0,
                                   test=0.01), tmp_path / "datasets")[0]
    trunk = CutNetwork.of(network, 0).trunk
    jobs = feature_jobs(config, [dataclasses.replace(whole, test=whole.test.take([0]),
                                                     validation=whole.train.take([]))], trunk)
    store = FeatureStore(LocalFileSystem(), str(tmp_path / "store"))

    def work():
        manifests, decoded = precompute(store, trunk, jobs)
        return decoded, sum(manifest.bytes for manifest in manifests) // MIB

    done = in_a_process_with(250 * MIB, work)
    decoded, size = map(int, done.strip("()").split(",")) if done.startswith("(") else (done, 0)
    assert decoded == len(whole.train) + 1
    assert size > 350
    too_much = in_a_process_with(250 * MIB, lambda: torch.zeros(350 * MIB, dtype=torch.uint8))
    assert "can't allocate memory" in too_much, "the limit is one"


# Larger than memory to learn from ----------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory, network, tasks):
    """A task of many views (float32, depth 3) in 24 shards, compressed and not."""
    shape_CHW = tasks[0].train.shape_CHW
    rows = LARGE // (4 * VIEWS * int(np.prod(shape_CHW)))
    store = FeatureStore(LocalFileSystem(), str(tmp_path_factory.mktemp("large")))
    manifests = {}
    for compression in ("none", "lz4"):
        recipe = FeatureRecipe("t", "d", "none", 16, VIEWS, "crop", 0, "float32", rows // 24,
                               compression)
        shards = []
        for index, start in enumerate(range(0, rows, recipe.shard_rows)):
            count = min(recipe.shard_rows, rows - start)
            z_NVCHW = torch.randn(count, VIEWS, *shape_CHW,
                                  generator=torch.Generator().manual_seed(index))
            shards.append(store.write_shard(recipe, index, z_NVCHW, np.arange(count) % 2,
                                            list(map(str, range(count))), seconds=0))
        manifests[compression] = store.commit(recipe, shards, (VIEWS, *shape_CHW))
    return store, manifests


def learned_weights(config, network, store, manifest, test, streamed):
    """What an epoch of a small share of steps leads to."""
    if streamed:
        answers_module.RESIDENT_BYTES = store_module.SPILL_BYTES = 16 * MIB
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1,
                                                                   batch_size=512))
    learner = Learner(cut_network(config, network).strategy(config), config.train)
    train = store.open(manifest)
    list(learner.learn([TaskFeatures("a", 2, train, None, test)]))
    return sum(value.double().sum().item() for value in learner.strategy.state_dict().values())


@needs_limits
def test_a_task_larger_than_memory_is_learned_and_to_the_same_weights(
        large, config, network, tasks, in_a_process_with):
    store, manifests = large

    def work(compression, streamed):
        return lambda: learned_weights(config, network, store, manifests[compression],
                                       tasks[0].test, streamed)

    resident = in_a_process_with(0, work("none", streamed=False))
    refused = in_a_process_with(LITTLE, work("none", streamed=False))
    assert "emory" in refused, "the limit is one"
    for compression in manifests:
        assert in_a_process_with(LITTLE, work(compression, streamed=True)) == resident, compression
    assert float(resident) != 0


def test_the_order_is_the_seeds_whatever_the_shards_and_workers(tmp_path):
    z_NVCHW = torch.arange(50 * 2.0).reshape(50, 2, 1, 1, 1)
    orders = []
    for shard_rows in (7, 16, 50):
        for world in (1, 2, 3):
            for ahead in (0, 1, 3):
                store = FeatureStore(LocalFileSystem(), str(tmp_path))
                recipe = FeatureRecipe("t", "d", "none", 8, 2, "flip", 0, "float32", shard_rows)
                shards = [store.write_shard(
                    recipe, index, z_NVCHW[start:start + shard_rows], np.zeros(
                        len(z_NVCHW[start:start + shard_rows])), list(map(str, range(
                            len(z_NVCHW[start:start + shard_rows])))), seconds=0)
                    for index, start in enumerate(range(0, 50, shard_rows))]
                features = store.open(store.commit(recipe, shards, (2, 1, 1, 1)))
                parts = [list(_read(features, Workers(rank, world), ahead))
                         for rank in range(world)]
                whole = []
                for batch in zip(*parts, strict=True):
                    mine = torch.empty(12)
                    for rank, z_BCHW in enumerate(batch):
                        mine[rank::world] = z_BCHW.flatten()
                    whole.append(mine.tolist())
                orders.append(whole)
    assert all(order == orders[0] for order in orders)
    assert len({value for batch in orders[0] for value in batch}) == 48


def _read(features, workers, ahead):
    batches = epoch_batches(features, 12, (3, 1, 4), workers)
    return [batch.z_BCHW for batch in (prefetched(batches, CPU, ahead) if ahead else batches)]


# The thread that reads ahead ---------------------------------------------------------------------


def batches(count, fail=None):
    for index in range(count):
        if index == fail:
            raise OSError("the disk is gone")
        yield FeatureBatch(torch.full((2, 1, 1, 1), float(index)), torch.zeros(2).long(), 1.0,
                           (0,))


def test_reading_goes_on_while_a_batch_is_used():
    read = [threading.Event() for _ in range(8)]

    def noted():
        for event, batch in zip(read, batches(8), strict=True):
            event.set()
            yield batch

    for used, _ in enumerate(prefetched(noted(), CPU)):
        assert read[min(used + 1, 7)].wait(60), "while a batch is used, the next one is read"


def test_it_reads_no_further_ahead_than_asked():
    read = []

    def counted():
        for batch in batches(10):
            read.append(batch)
            yield batch

    ours = prefetched(counted(), CPU, 2)
    next(ours)
    time.sleep(0.3)
    assert len(read) <= 4, "one in use, two waiting, one in the reader's hand"
    assert [thread for thread in threading.enumerate() if thread.name.endswith("(read)")]
    ours.close()
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(read)")]


def test_an_error_of_the_reader_is_the_users():
    reader = prefetched(batches(5, fail=3), CPU)
    assert [next(reader).z_BCHW[0].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(reader)
