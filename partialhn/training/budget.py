"""Budgets: how many steps a training takes, and when it stops before they are used up.

A training needs steps, not passes: ten passes over 150 images are 24 steps, in which nothing is
learned. Unless passes are given, a task with many images gets the usual number of passes and one
with few as many as a floor of steps needs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from partialhn.config import BackboneConfig, TrainConfig
from partialhn.features.closed_form import sharpness

TASK_PASSES, TRUNK_PASSES = 10, 15
"""Passes over the images, between the floor and the ceiling of steps."""
MOST_EPOCHS = 20
"""A record and a held-out measurement follow every epoch. More passes than these are put
together, several to an epoch, so that small tasks do not spend their time on measurements."""
PATIENCE = 0.35
"""Share of the epochs without a smaller held-out loss after which training stops."""
ENOUGH_HELD_OUT = 50
"""Fewer held-out images than these do not show which of two states is better."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The course of one training."""

    epochs: int
    """Number of epochs at most; each ends with a record."""
    passes: int = 1
    """Passes over the images in an epoch."""
    patience: int | None = None
    """Epochs without a smaller held-out loss after which training stops; None: it never does."""
    min_epochs: int = 0
    """Epochs before which training does not stop."""

    def is_over(self, losses: Sequence[float]) -> bool:
        """Whether training ends, after epochs with these held-out losses."""
        done = len(losses)
        if self.patience is None or done < max(1, self.min_epochs):
            return done >= self.epochs
        return done >= self.epochs or done - 1 - best_of(losses) >= self.patience


def best_of(losses: Sequence[float]) -> int:
    """Index of the smallest loss, the first of equal ones; NaN is larger than any number."""
    return min(range(len(losses)), key=lambda index: (math.isnan(losses[index]), losses[index]))


def task_budget(config: TrainConfig, images: int, held_out: int) -> Budget:
    """The budget of a task with so many images for training, and so many held out."""
    if config.epochs is not None:
        return Budget(config.epochs)
    return _budget(TASK_PASSES, images / min(config.batch_size, images), config.min_steps,
                   config.max_steps, held_out)


def trunk_budget(config: BackboneConfig, images: int, held_out: int) -> Budget:
    """The budget of the trunk, trained on so many images of the first task."""
    if config.trunk_epochs is not None:
        return Budget(config.trunk_epochs)
    return _budget(TRUNK_PASSES, images // min(config.trunk_batch_size, images),
                   config.trunk_min_steps, config.trunk_max_steps, held_out)


def _budget(passes: int, steps_a_pass: float, min_steps: int, max_steps: int,
            held_out: int) -> Budget:
    steps = min(max(passes * steps_a_pass, min_steps), max_steps)
    passes = max(1, math.ceil(steps / steps_a_pass))
    together = math.ceil(passes / MOST_EPOCHS)
    epochs = math.ceil(passes / together)
    if held_out < ENOUGH_HELD_OUT:
        return Budget(epochs, together)
    return Budget(epochs, together, max(2, round(PATIENCE * epochs)),
                  math.ceil(min_steps / (together * steps_a_pass)))


def held_out_loss(logits_NK: Tensor, y_N: Tensor) -> float:
    """Cross-entropy of held-out images, with the logits scaled by the best factor.

    A network that goes on learning becomes too sure of its answers before these become worse, and
    the plain cross-entropy would stop it then.
    """
    logits_NK = logits_NK.double()
    scaled_NK = sharpness(logits_NK, y_N) * logits_NK
    return nn.functional.cross_entropy(scaled_NK, y_N).item()


class BestState:
    """The state with the smallest held-out loss of a running training."""

    def __init__(self, losses: Sequence[float] = (),
                 tensors: Mapping[str, Tensor] | None = None) -> None:
        """losses, tensors: those of a training that goes on."""
        self.losses = list(losses)
        """Held-out loss after each epoch."""
        self.tensors = dict(tensors or {})
        """The state after the epoch with the smallest of them."""

    def add(self, loss: float, state: Mapping[str, Tensor]) -> None:
        """Adds an epoch; a copy of `state` is kept if it is the best so far."""
        self.losses.append(loss)
        if best_of(self.losses) == len(self.losses) - 1:
            self.tensors = {name: value.detach().clone() for name, value in state.items()}
