"""Several trainings at once in one process: each in a thread and, on a GPU, on its own stream.

A step of a small head is many short kernels, each of which fills a small part of a GPU. Streams of
one process overlap there, while two processes take turns. Every training runs the operations that
it would run alone on tensors of its own, so its result is the same: on a CPU to the bit.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from partialhn.features.batches import RESIDENT_BYTES
from partialhn.networks.device_memory import DeviceMemoryError, still_free
from partialhn.training.experience import TaskFeatures

AT_ONCE = 8
"""Trainings at once on a GPU where no number is given."""
WORKING_BYTES = 256 << 20
"""Bytes that a training takes on its device beside its features: weights, activations, and the
workspaces of libraries."""
FREE_SHARE = 0.8
"""Share of the free memory of a device that trainings may plan with."""
Item = TypeVar("Item")


class Stopped(Exception):  # noqa: N818 - it is raised to end a thread, not to report an error
    """A thread ends because another one has failed."""


class Earlier(Exception):  # noqa: N818 - it is raised to change the order, not to report an error
    """An item that comes before the one that a lane works on was left by another lane."""


class Lanes:
    """Threads that train at once, each on a stream of its own where the device is a GPU.

    A context manager: when it ends, all its threads have ended. After an error they end at their
    next `go_on`.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device, self._stop = device, threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(count, "training")
        self._running: list[concurrent.futures.Future[None]] = []

    def start(self, work: Callable[[], None]) -> None:
        """Runs `work` in a thread of its own; at most `count` may run."""
        lane = len(self._running)
        self._running.append(self._threads.submit(self._run, work, lane))

    def check(self) -> None:
        """Raises the error of a thread that has failed, if there is one."""
        for running in self._running:
            if running.done():
                running.result()

    def wait(self) -> None:
        """Waits until every thread has ended. Raises: the first error of a thread."""
        for running in concurrent.futures.as_completed(self._running):
            running.result()

    def go_on(self) -> None:
        """Raises: Stopped if the threads are to end. A thread calls it now and then."""
        if self._stop.is_set():
            raise Stopped

    def _run(self, work: Callable[[], None], lane: int) -> None:
        with contextlib.suppress(Stopped), on_stream(self._device, lane):
            work()

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._threads.shutdown(cancel_futures=kind is not None)


_streams: dict[torch.device, list[torch.cuda.Stream]] = collections.defaultdict(list)


@contextlib.contextmanager
def on_stream(device: torch.device, lane: int) -> Iterator[None]:
    """A context in which the work of this thread goes to the stream of a lane; on a GPU only.

    PyTorch has 32 streams a device and gives the same ones again, so a lane keeps its own.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        while len(_streams[device]) <= lane:
            _streams[device].append(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        stream = _streams[device][lane]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


@contextlib.contextmanager
def divided_threads(count: int, given: int | None, device: torch.device) -> Iterator[None]:
    """A context in which `count` trainings on a GPU divide PyTorch's CPU threads, unless their
    number was given. Each training would have all of them, and they would take the processors from
    each other. On a CPU the number is part of the result, so it stays.
    """
    before = torch.get_num_threads()
    if given is None and device.type != "cpu":
        torch.set_num_threads(max(1, before // count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Waiting(Generic[Item]):
    """Work that several lanes divide: each takes the next item when it is done with one."""

    def __init__(self, items: Iterable[Item], lanes: int,
                 say: Callable[[str], None] = lambda _: None) -> None:
        """lanes: the threads that call `work_off`. say: gets a line where memory is short."""
        self._items, self._lanes, self._say = list(enumerate(items)), lanes, say
        self._lock, self._mine = threading.Lock(), threading.local()

    def work_off(self, work: Callable[[Item], None]) -> None:
        """Does `work` on one item after the other until none waits; each lane calls it once.

        A lane that finds no memory on the device leaves its item to the others and ends; the last
        lane tries once more alone. Raises: the error of the device's memory if that fails too.
        """
        while True:
            with self._lock:
                if not self._items:
                    self._lanes -= 1
                    return
                (place, item), alone = self._items.pop(0), self._lanes == 1
            self._mine.place, ends = place, False
            try:
                if self._done(item, work, alone):
                    continue
                ends = True
            except Earlier:
                pass
            with self._lock:
                bisect.insort(self._items, (place, item), key=lambda each: each[0])
                if ends and self._lanes > 1:
                    self._lanes -= 1
                    return

    def let_earlier(self) -> None:
        """A lane calls it while it waits for the result of another item, and does not catch what it
        raises: the lane that had that item may have left it for want of memory.

        Raises: Earlier if an item before this thread's has no lane.
        """
        with self._lock:
            if self._items and self._items[0][0] < self._mine.place:
                raise Earlier

    def _done(self, item: Item, work: Callable[[Item], None], alone: bool) -> bool:
        try:
            work(item)
            return True
        except (torch.OutOfMemoryError, DeviceMemoryError):
            if alone:
                raise
        self._say("the device has too little memory for all trainings at once, so one fewer runs "
                  "from now on")
        gc.collect()  # what the failed training held
        return False


def at_once(wanted: int | None, needs: Sequence[int], device: torch.device,
            say: Callable[[str], None] = lambda _: None) -> int:
    """How many trainings run at once: as many as wanted, as wait, and as fit on the device.

    wanted: None for AT_ONCE on a GPU and one elsewhere. needs: bytes of each training that waits
    (`needed_bytes`). say: gets a line where memory is the reason for fewer.
    """
    count = max(1, min(wanted_at_once(wanted, device), len(needs)))
    free = FREE_SHARE * free_bytes(device)
    largest = sorted(needs, reverse=True)
    fit = count
    while fit > 1 and sum(largest[:fit]) > free:
        fit -= 1
    if fit < count:
        say(f"{fit} of {count} trainings run at once: {count} need up to "
            f"{sum(largest[:count]) / 2**30:.1f} GiB on the device, and {free / 2**30:.1f} GiB "
            "are planned with")
    return fit


def wanted_at_once(number: int | None, device: torch.device) -> int:
    """A given number of trainings at once, or the default of a device."""
    if number is None:
        return AT_ONCE if device.type == "cuda" else 1
    return number


def needed_bytes(task: TaskFeatures) -> int:
    """Bytes that the training of a task takes on its device at most."""
    sets = [each for each in (task.train, task.validation) if each is not None]
    return WORKING_BYTES + sum(each.nbytes for each in sets if each.nbytes <= RESIDENT_BYTES)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that trainings may take: on a GPU what this process may still take,
    elsewhere half of the machine's.
    """
    if device.type == "cuda":
        return still_free(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
