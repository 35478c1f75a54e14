"""Ways to learn a stream, all over the same features and the same head shapes."""

from collections.abc import Callable

from partialhn.config import Config
from partialhn.model import Head, HeadStart
from partialhn.strategies.base import Strategy
from partialhn.strategies.naive import Naive
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.strategies.separate_heads import SeparateHeads

STRATEGIES: dict[str, Callable[[Head, HeadStart, Config], Strategy]] = {
    "partial_hn": lambda head, start, config: PartialHypernet(head, start, config.hypernet,
                                                              config.train.seed),
    "separate_heads": lambda head, start, config: SeparateHeads(head, start, config.train.seed),
    "naive": lambda head, start, config: Naive(head, start, config.train.seed),
}

__all__ = ["STRATEGIES", "Naive", "PartialHypernet", "SeparateHeads", "Strategy"]
