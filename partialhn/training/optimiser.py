"""The optimiser of an experience: its learning rates over the steps, and its state as tensors.

Legend: S steps, G parameter groups.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from partialhn.config import Schedule, TrainConfig
from partialhn.strategies import Strategy
from partialhn.training.steps import WARM_UP


def optimiser_tensors(optimiser: torch.optim.Optimizer,
                      named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name."""
    return {f"optimiser.{key}.{name}": value for name, parameter in named
            for key, value in optimiser.state.get(parameter, {}).items()}


def load_optimiser(optimiser: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]],
                   tensors: dict[str, Tensor]) -> None:
    """Takes back `optimiser_tensors`; a parameter without a gradient so far has none."""
    for name, parameter in named:
        if f"optimiser.step.{name}" not in tensors:
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors[f"optimiser.{key}.{name}"].to(parameter.device)
            optimiser.state[parameter][key] = saved.clone()


SHORT = 30
"""Steps of an experience up to which groups learn with their `peak`; from twice as many on it is
their `long_peak`."""


def make_optimiser(strategy: Strategy, config: TrainConfig) -> torch.optim.Optimizer:
    """A fresh Adam over what the running experience may change, and nothing else.

    Its learning rates are tensors: `Steps` writes them.
    """
    groups = strategy.parameter_groups(config.learning_rate)
    device = next(value.device for value in strategy.parameters() if value.requires_grad)
    for group in groups:
        group["lr"] = torch.tensor(group["peak"], device=device)
    return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")


def learning_rates(optimiser: torch.optim.Optimizer, schedule: Schedule, steps: int) -> Tensor:
    """rates_SG: what `make_optimiser`'s groups learn with at each step of an experience."""
    long = min(max(steps / SHORT - 1, 0), 1)
    factor_S = torch.tensor(rate_factors(schedule, steps))
    return torch.stack([factor_S * (group["peak"] + long * (group["long_peak"] - group["peak"]))
                        for group in optimiser.param_groups], 1)


def rate_factors(schedule: Schedule, steps: int) -> list[float]:
    """What the peak learning rate is multiplied with at each of S steps."""
    rise = max(1, min(WARM_UP, steps // 10))
    fall = [1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))
            for step in range(steps)]
    return [factor * min(1.0, (step + 1) / rise) for step, factor in enumerate(fall)]
