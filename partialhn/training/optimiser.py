"""The optimiser of an experience: its learning rates, and its state as named tensors.

Legend: S steps, G parameter groups.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from partialhn.config import Schedule, TrainConfig
from partialhn.strategies import Strategy
from partialhn.training.steps import WARM_UP


class _Plain(torch.optim.Optimizer):
    """torch's methods without their wrappers for compiled programs.

    The first call of such a wrapper imports torch's compiler, which takes four seconds of the
    processor. Nothing here is compiled, and the operations are the same.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _ADD_GROUP(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        _ZERO_GRAD(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return _STEP(self, closure)


class Adam(_Plain, torch.optim.Adam):
    """`torch.optim.Adam`, quick to start."""


class AdamW(_Plain, torch.optim.AdamW):
    """`torch.optim.AdamW`, quick to start."""


_ADD_GROUP: Callable[..., Any] = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_ZERO_GRAD: Callable[..., Any] = inspect.unwrap(torch.optim.Optimizer.zero_grad)
_STEP: Callable[..., Any] = inspect.unwrap(torch.optim.Adam.step)
"""AdamW is an Adam with another decay of weights, and has the same method."""


def optimiser_tensors(optimiser: torch.optim.Optimizer,
                      named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name."""
    return {f"optimiser.{key}.{name}": value for name, parameter in named
            for key, value in optimiser.state.get(parameter, {}).items()}


def load_optimiser(optimiser: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]],
                   tensors: dict[str, Tensor]) -> None:
    """Restores the state that `optimiser_tensors` gave.

    A parameter that has had no gradient yet has no state.
    """
    for name, parameter in named:
        if f"optimiser.step.{name}" not in tensors:
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors[f"optimiser.{key}.{name}"].to(parameter.device)
            optimiser.state[parameter][key] = saved.clone()


SHORT = 30
"""An experience of up to so many steps uses each group's `peak` learning rate; from twice as many
steps on it uses `long_peak`, and in between a mixture of both."""


def make_optimiser(strategy: Strategy, config: TrainConfig) -> torch.optim.Optimizer:
    """A new Adam optimiser over the parameters that the running experience may change.

    Its learning rates are tensors, into which `Steps` writes before each step.
    """
    groups = strategy.parameter_groups(config.learning_rate)
    device = next(value.device for value in strategy.parameters() if value.requires_grad)
    for group in groups:
        group["lr"] = torch.tensor(group["peak"], device=device)
    return Adam(groups, fused=True, capturable=device.type == "cuda")


def learning_rates(optimiser: torch.optim.Optimizer, schedule: Schedule, steps: int) -> Tensor:
    """rates_SG: the learning rate at each step of an experience, for each parameter group.

    The groups are those of `make_optimiser`, with their keys `peak` and `long_peak`.
    """
    long = min(max(steps / SHORT - 1, 0), 1)  # 0: short, use peak; 1: long, use long_peak
    factor_S = torch.tensor(rate_factors(schedule, steps))
    return torch.stack([factor_S * (group["peak"] + long * (group["long_peak"] - group["peak"]))
                        for group in optimiser.param_groups], 1)


def rate_factors(schedule: Schedule, steps: int) -> list[float]:
    """Factor of the peak learning rate at each of S steps: a linear rise, then the schedule."""
    rise = max(1, min(WARM_UP, steps // 10))
    fall = [1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))
            for step in range(steps)]
    return [factor * min(1.0, (step + 1) / rise) for step, factor in enumerate(fall)]
