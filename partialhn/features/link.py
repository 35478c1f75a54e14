"""The way between the host and the trunk's device: pixels there and features back.

On a GPU both directions have streams of their own, so that copies and kernels run at the same time,
and nothing waits for the host. Legend: B batch, C channels, H W spatial.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from partialhn.networks.precision import sleeping_event


class Link(Protocol):
    """The way to a device."""

    def send(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts to copy tensors to the device; any thread may ask.

        Returns a function that gives them to the thread that uses them there.
        """

    def fetch(self, z_BCHW: Tensor, target_BCHW: Tensor, *, stays: bool) -> Callable[[], None]:
        """Starts to copy a result of the device into a part of a host's tensor of another type.

        stays: whether z_BCHW keeps its numbers; a block may change its input in place. Returns a
        function for another thread; when it returns, the numbers are there.
        """

    def mark(self) -> Any:
        """A point in the device's work."""

    def seconds(self, first: Any, last: Any) -> float:
        """Seconds of the device between two marks, once the work up to the last one is done."""


class Direct:
    """The way to a device that works while the host waits, such as the CPU itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [tensor.to(self._device) for tensor in tensors]

    def fetch(self, z_BCHW: Tensor, target_BCHW: Tensor, *, stays: bool) -> Callable[[], None]:
        def copy() -> None:
            target_BCHW.copy_(z_BCHW)

        if stays:
            return copy
        copy()
        return lambda: None

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first


class Streams:
    """The way to a GPU: pinned buffers, and a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._there: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._back: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def send(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        with torch.cuda.stream(self._there):
            moved = [tensor.pin_memory().to(self._device, non_blocking=True)
                     for tensor in tensors]
            done = self._there.record_event()

        def receive() -> list[Tensor]:
            user = torch.cuda.current_stream(self._device)
            user.wait_event(done)
            for tensor in moved:  # its memory must not be used again before the user is done
                tensor.record_stream(user)
            return moved
        return receive

    def fetch(self, z_BCHW: Tensor, target_BCHW: Tensor, *, stays: bool) -> Callable[[], None]:
        z_BCHW = z_BCHW.to(target_BCHW.dtype, copy=not stays,
                           memory_format=torch.contiguous_format).contiguous()
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            pinned_BCHW = torch.empty(z_BCHW.shape, dtype=z_BCHW.dtype, pin_memory=True)
            pinned_BCHW.copy_(z_BCHW, non_blocking=True)
            done = sleeping_event(self._back)
        z_BCHW.record_stream(self._back)

        def copy() -> None:
            done.synchronize()
            target_BCHW.copy_(pinned_BCHW)
        return copy

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1000


def link_to(device: torch.device) -> Link:
    """The way to a device."""
    return Streams(device) if device.type == "cuda" else Direct(device)
