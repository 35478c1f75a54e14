"""Several trainings at once: threads, their errors, and the room on a device."""

import concurrent.futures
import dataclasses
import functools
import threading

import pytest
import torch

from partialhn.detector.detector import Detector
from partialhn.errors import InputError
from partialhn.networks.draws import seeded
from partialhn.run import cut_network
from partialhn.training import together
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.stream_at_once import learn_at_once
from partialhn.training.together import (
    Lanes,
    Stopped,
    Waiting,
    at_once,
    divided_threads,
    needed_bytes,
)
from tests.unit.learners import measured, weights_hash

CPU = torch.device("cpu")
GIB = 1 << 30


def test_what_learns_at_once_learns_the_same_bits(network, tasks, with_options):
    """Three seeds and three strategies, among them one with batch norm's statistics."""
    configs = [with_options(train={"seed": seed, "strategy": name, "batch_size": 8},
                            hypernet={"norm": norm})
               for seed, name, norm in ((0, "partial_hn", "batch"), (1, "naive", "group"),
                                        (2, "separate_heads", "batch"))]

    def learner(config):
        cut = cut_network(config, network)
        return Learner(cut.apart().strategy(config), config.train)

    alone = [learner(config) for config in configs]
    for each in alone:
        list(each.learn(tasks[:2]))
    at_once = [learner(config) for config in configs]
    with Lanes(3, CPU) as lanes:
        for each in at_once:
            lanes.start(lambda each=each: [lanes.go_on() for _ in each.learn(tasks[:2])])
        lanes.wait()
    for one, other in zip(alone, at_once, strict=True):
        assert weights_hash(one) == weights_hash(other)
        assert measured(one) == measured(other)


@pytest.mark.parametrize(("known", "train", "hypernet"), [
    (0, {"epochs": None, "min_steps": 20}, {}), (1, {"epochs": None, "min_steps": 20}, {}),
    (0, {"epochs": 1}, {"dictionary": 3, "dictionary_after": 1})])
def test_a_stream_learned_at_once_is_the_stream(network, tasks, with_options, known, train,
                                                hypernet):
    """The last task has more data of the second, and so waits for it; tasks that use a dictionary
    wait until it is closed.
    """
    config = with_options(train={"batch_size": 8, **train}, hypernet=hypernet)
    stream = [*tasks[:4], dataclasses.replace(tasks[1], name="1/2", refreshes=1)]
    cut = cut_network(config, network)

    def learner(own, inference=None):
        return Learner(own.strategy(config), config.train, inference=inference)

    def detector():
        return Detector(config.train.detector_features)

    alone, model = (learner(cut.apart(), detector()) for _ in range(2))
    list(alone.learn(stream))
    for _ in range(known):
        list(model.learn_next(stream))
    records = list(learn_at_once(model, stream, [
        functools.partial(learner, cut.apart()) for _ in range(3)], detector))
    assert weights_hash(model) == weights_hash(alone)
    assert measured(model) == measured(alone)
    assert [record.task_index for record in records if isinstance(record, TaskRecord)] == list(
        range(known, 5))
    assert sorted((record.task_index, record.epoch) for record in records
                  if isinstance(record, EpochRecord)) == [
        (record.task_index, record.epoch) for record in alone.epochs if record.task_index >= known]


def test_a_stream_ends_with_the_error_of_a_task(network, tasks, with_options):
    config = with_options(train={"learning_rate": 1e30})
    cut = cut_network(config, network)
    model = Learner(cut.strategy(config), config.train)

    def learner(own):
        return Learner(own.strategy(config), config.train)

    with pytest.raises(InputError, match="the loss of task"):
        list(learn_at_once(model, tasks[:3], [functools.partial(learner, cut.apart())
                                              for _ in range(2)], lambda: None))


def test_draws_follow_from_their_seed_whatever_other_threads_draw():
    def draw(seed):
        with seeded(seed):
            return torch.cat([torch.randn(5) for _ in range(200)])

    wanted, found = [draw(seed) for seed in range(8)], [None] * 8
    before = torch.random.get_rng_state()

    def put(seed):
        found[seed] = draw(seed)

    with Lanes(8, CPU) as lanes:
        for seed in range(8):
            lanes.start(lambda seed=seed: put(seed))
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_error_of_one_thread_ends_the_others():
    ended = []

    def endless(lanes):
        try:
            while True:
                lanes.go_on()
        except Stopped:
            ended.append(True)
            raise

    def fails():
        raise ValueError("this one")

    def together():
        with Lanes(3, CPU) as lanes:
            for _ in range(2):
                lanes.start(lambda: endless(lanes))
            lanes.start(fails)
            lanes.wait()

    with pytest.raises(ValueError, match="this one"):
        together()
    assert ended == [True, True]


def test_every_item_is_done_by_one_lane():
    waiting, done, both = Waiting(range(20), 2), [], threading.Barrier(2, timeout=30)
    with Lanes(2, CPU) as lanes:
        for _ in range(2):
            lanes.start(lambda: (both.wait(), waiting.work_off(done.append)))
        lanes.wait()
    assert sorted(done) == list(range(20))


def test_a_lane_without_memory_leaves_its_item_to_the_others():
    """Two do not fit at once: one lane ends, the other does everything."""
    lines, done, running = [], [], threading.Semaphore(1)
    both = threading.Barrier(2, timeout=30)
    waiting = Waiting(range(6), 2, lines.append)

    def work(item):
        if len(done) + len(lines) == 0:
            both.wait()
        if not running.acquire(blocking=len(lines) > 0):
            raise torch.OutOfMemoryError
        if not done:
            while not lines:  # until the other one has tried
                pass
        done.append(item)
        running.release()

    with Lanes(2, CPU) as lanes:
        for _ in range(2):
            lanes.start(lambda: waiting.work_off(work))
        lanes.wait()
    assert sorted(done) == list(range(6))
    assert len(lines) == 1
    assert "too little memory" in lines[0]


def test_a_lane_that_waits_for_a_left_item_takes_it():
    """The second and third items need the first, whose lane finds no memory while they wait."""
    waiting, done, tried, waits = Waiting(range(3), 3), [], [], threading.Semaphore(0)

    def work(item):
        if item == 0 and not tried:
            tried.append(item)
            assert waits.acquire(timeout=30)
            assert waits.acquire(timeout=30)
            raise torch.OutOfMemoryError
        if item:
            waits.release()
        while item and 0 not in done:
            waiting.let_earlier()
        done.append(item)

    with Lanes(3, CPU) as lanes:
        for _ in range(3):
            lanes.start(lambda: waiting.work_off(work))
        lanes.wait()
    assert done[0] == 0
    assert sorted(done) == [0, 1, 2]


def test_what_fits_nowhere_is_an_error():
    def work(_item):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Waiting([1], 1).work_off(work)


@pytest.mark.parametrize(("wanted", "free", "needs", "count"), [
    (None, 100, [1, 1], 1), (4, 100, [1, 1], 2), (4, 100, [1] * 9, 4), (4, 10, [3, 3, 1, 3], 2),
    (3, 1, [5, 5, 5], 1), (2, 100, [], 1)])
def test_only_as_many_as_memory_holds(monkeypatch, wanted, free, needs, count):
    monkeypatch.setattr(together, "free_bytes", lambda device: free * GIB)
    lines = []
    assert at_once(wanted, [need * GIB for need in needs], CPU, lines.append) == count
    assert bool(lines) == (count < min(wanted or 1, len(needs)))


def test_a_gpu_learns_several_at_once_by_itself(monkeypatch):
    monkeypatch.setattr(together, "free_bytes", lambda device: 60 * GIB)
    cuda = torch.device("cuda")
    assert at_once(None, [GIB] * 20, cuda) == together.AT_ONCE
    assert at_once(1, [GIB] * 20, cuda) == 1
    assert at_once(None, [12 * GIB] * 20, cuda) == 4


def test_features_that_stay_on_the_host_take_no_room(tasks, monkeypatch):
    held = needed_bytes(tasks[0])
    assert held > tasks[0].train.nbytes
    monkeypatch.setattr(together, "RESIDENT_BYTES", 0)
    assert needed_bytes(tasks[0]) == together.WORKING_BYTES


@pytest.mark.parametrize(("device", "given", "threads"), [
    ("cuda", None, 2), ("cuda", 7, 7), ("cpu", None, 7)])
def test_trainings_on_a_gpu_divide_the_threads_of_the_cpu(device, given, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        with divided_threads(3, given, torch.device(device)), (
                concurrent.futures.ThreadPoolExecutor(1)) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)
