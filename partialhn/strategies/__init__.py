"""Strategies: ways to learn a stream, all over the same features and the same head shapes.

Importing this package imports no strategy and no PyTorch; `STRATEGIES` loads a class when it is
asked for.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from partialhn.errors import InputError
from partialhn.strategies.table import TABLE, register_strategy

if TYPE_CHECKING:
    from partialhn.strategies.base import Strategy

__all__ = ["STRATEGIES", "Strategy", "register_strategy"]


class _Classes(Mapping[str, "type[Strategy]"]):
    """The class of each strategy in the table, imported and checked when it is asked for."""

    def __getitem__(self, name: str) -> "type[Strategy]":
        """Raises: KeyError for an unknown name, InputError for a class that is no strategy."""
        from partialhn.strategies.base import Strategy

        strategy = TABLE[name].load(name)
        if not issubclass(strategy, Strategy):
            raise InputError(f"strategy {name!r} is {strategy.__name__}; allowed: a subclass of "
                             "partialhn.Strategy")
        missing = [method for method in ("new_task", "weights")
                   if getattr(strategy, method) is getattr(Strategy, method)]
        if missing:
            raise InputError(f"strategy {name!r} ({strategy.__name__}) does not define "
                             f"{' and '.join(missing)}; every strategy must")
        return strategy

    def __iter__(self) -> Iterator[str]:
        return iter(TABLE)

    def __len__(self) -> int:
        return len(TABLE)


STRATEGIES: Mapping[str, "type[Strategy]"] = _Classes()


def __getattr__(name: str) -> Any:
    if name == "Strategy":
        from partialhn.strategies.base import Strategy

        return Strategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
