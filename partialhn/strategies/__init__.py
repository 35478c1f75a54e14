"""Ways to learn a stream, all over the same features and the same head shapes."""

from collections.abc import Callable

from partialhn.config import Config
from partialhn.networks.head import Head, HeadStart
from partialhn.strategies.base import Strategy
from partialhn.strategies.ewc import Ewc
from partialhn.strategies.joint import Joint
from partialhn.strategies.latent_replay import LatentReplay
from partialhn.strategies.linear_probe import LinearProbe
from partialhn.strategies.lwf import Lwf
from partialhn.strategies.naive import Naive
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.strategies.separate_heads import SeparateHeads

STRATEGIES: dict[str, Callable[[Head, HeadStart, Config], Strategy]] = {
    "partial_hn": lambda head, start, config: PartialHypernet(head, start, config.hypernet,
                                                              config.train.seed),
    "separate_heads": lambda head, start, config: SeparateHeads(head, start, config.train.seed),
    "linear_probe": lambda head, start, config: LinearProbe(head, start, config.train.seed),
    "joint": lambda head, start, config: Joint(head, start, config.train.seed),
    "latent_replay": lambda head, start, config: LatentReplay(head, start, config.train.seed,
                                                              config.train.buffer),
    "ewc": lambda head, start, config: Ewc(head, start, config.train.seed,
                                           config.train.ewc_strength),
    "lwf": lambda head, start, config: Lwf(head, start, config.train.seed,
                                           config.train.lwf_strength),
    "naive": lambda head, start, config: Naive(head, start, config.train.seed),
}

__all__ = ["STRATEGIES", "Ewc", "Joint", "LatentReplay", "LinearProbe", "Lwf", "Naive",
           "PartialHypernet", "SeparateHeads", "Strategy"]
