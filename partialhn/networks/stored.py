"""A list of modules that are made of stored tensors when they are first used."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

Make = Callable[[int, Mapping[str, Tensor]], nn.Module]
"""Makes the module with a number of its tensors by name."""
_MAKING = threading.Lock()
"""Held while a module is made: several threads of a server may ask for it."""


class StoredModules(nn.ModuleList):
    """As PyTorch's class, but its first modules may wait as tensors.

    A model of a thousand tasks has six thousand parameters, and a pass that learns one more task
    uses those of a few. Waiting tensors are part of `state_dict` and move between devices; they
    are no parameters, so nothing trains them. A module that is made of them has nothing that
    training switches.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, Mapping[str, Tensor]] = {}
        self._make: Make | None = None
        self._stored = 0
        """Number of modules that wait or have waited."""

    def wait(self, states: Sequence[Mapping[str, Tensor]], make: Make) -> None:
        """Fills the empty list. states: the tensors of each module, as its `state_dict` has them.

        make: gives the module with a number; it must not ask for another waiting one.
        """
        assert len(self) == 0, "only an empty list is filled"
        self._waiting, self._make, self._stored = dict(enumerate(states)), make, len(states)

    def waits(self, place: int) -> bool:
        """Whether a module is not made yet."""
        return place in self._waiting

    def made(self) -> Iterator[tuple[int, nn.Module]]:
        """The modules that do not wait, with their numbers."""
        return ((int(place), module) for place, module in list(self._modules.items())
                if module is not None)

    def state_of(self, place: int) -> Mapping[str, Tensor]:
        """The `state_dict` of a module, which is not made for it."""
        waiting = self._waiting.get(place)
        if waiting is not None:
            return waiting
        state: Mapping[str, Tensor] = self[place].state_dict()
        return state

    def __len__(self) -> int:
        return len(self._modules) + len(self._waiting)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[place] for place in range(len(self)))

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return nn.ModuleList(self[each] for each in range(*place.indices(len(self))))
        place = range(len(self))[place]
        if place in self._waiting:
            with _MAKING:
                if place in self._waiting:
                    assert self._make is not None
                    self._modules[str(place)] = self._make(place, self._waiting[place])
                    del self._waiting[place]
        return self._modules[str(place)]

    def state_dict(self, *arguments: Any, destination: Any = None, prefix: str = "",
                   keep_vars: bool = False) -> Any:
        waiting = list(self._waiting.items())
        destination = super().state_dict(*arguments, destination=destination, prefix=prefix,
                                         keep_vars=keep_vars)
        destination.update((f"{prefix}{place}.{name}", value) for place, state in waiting
                           for name, value in state.items())
        return destination

    def train(self, mode: bool = True) -> Self:
        """As PyTorch's method, for the modules that did not wait."""
        self.training = mode
        for place, module in self.made():
            if place >= self._stored:
                module.train(mode)
        return self

    def _apply(self, change: Any, recurse: bool = True) -> Self:
        super()._apply(change, recurse)  # type: ignore[no-untyped-call]
        self._waiting = {place: {name: change(value) for name, value in state.items()}
                         for place, state in self._waiting.items()}
        return self
