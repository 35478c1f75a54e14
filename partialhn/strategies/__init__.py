"""Ways to learn a stream, all over the same features and the same head shapes."""

from collections.abc import Callable, Sequence

from torch import Tensor

from partialhn.config import Config
from partialhn.model import Head
from partialhn.strategies.base import Strategy
from partialhn.strategies.naive import Naive
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.strategies.separate_heads import SeparateHeads

Base = Sequence[Tensor] | None

STRATEGIES: dict[str, Callable[[Head, Config, Base], Strategy]] = {
    "partial_hn": lambda head, config, base: PartialHypernet(head, config.hypernet,
                                                             config.train.seed, base),
    "separate_heads": lambda head, config, _: SeparateHeads(head, config.train.seed),
    "naive": lambda head, config, _: Naive(head, config.train.seed),
}

__all__ = ["STRATEGIES", "Naive", "PartialHypernet", "SeparateHeads", "Strategy"]
