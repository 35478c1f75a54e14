"""The choice between a trained head and ridge regression, made on a task's own images.

A head that is trained on few images may be worse than ridge regression on the trunk's features.
With fewer than `FEW` images a class, or `ENOUGH_TO_CHOOSE` held-out ones, a held-out share that
could judge the training would cost more than the training gains. Then a task is solved in closed
form, and leave-one-out replaces the share. With more, the head is trained, and ridge regression
takes its place where its held-out loss is smaller.

Ridge regression sees cells of the trunk's features. Where tasks start from a network that was
trained elsewhere, it may see what the network's own later blocks make of them instead: then the
task's head is the network's, with a classifier of its own. That sees the features of every block,
not of the last alone (`docs/measurements/pretrained.md`).

Legend: N images, C channels, F features, K classes.
"""

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from partialhn.config import TrainConfig
from partialhn.features.closed_form import LinearClassifier, accuracy, fit_ridge, pooled_cells
from partialhn.features.feature_set import FeatureSet
from partialhn.strategies import Strategy
from partialhn.training.answers import earlier_blocks, network_features

FEW = 30
"""Images a class, held-out ones included, below which a task is solved in closed form."""
ENOUGH_TO_CHOOSE = 20
"""Fewer held-out images than these do not choose between a trained head and ridge regression."""
SIDES = (1, 2, 3, 4)
"""Cells along each side of a feature map that ridge regression may see."""
LARGEST = 512
"""Features, or images where they are fewer, above which only one cell is tried."""
CLEARLY = 3.0
"""Standard errors by which a leave-one-out loss must be smaller to be preferred to the usual
choice: the smallest of four is compared with it (`docs/measurements/pretrained.md`)."""
FEW_FOR_NETWORK = 100
"""Images a class up to which the features of the network's own head are tried, at the cost of one
pass through its blocks; with more the trained head is ahead
(`docs/measurements/pretrained.md`)."""


class Solved(NamedTuple):
    """A linear classifier of a task's pooled features."""

    classifier: LinearClassifier
    left_out_accuracy: float
    """Accuracy on its images, each predicted from all the others."""
    side: int | None
    """Cells along each side of a feature map that it sees; None where it sees the features of the
    network's own head."""
    blocks: tuple[int, ...] = ()
    """Blocks of that head before the last whose features it sees, too (`network_features`)."""


def is_chosen(strategy: Strategy, config: TrainConfig) -> bool:
    """Whether a task of this strategy may be solved in closed form."""
    return config.epochs is None and config.closed_form == "auto" and strategy.takes_linear


def few_images(train: FeatureSet, held_out: FeatureSet | None, classes: int) -> bool:
    """Whether a task has so few images that none of them can judge a training."""
    count = 0 if held_out is None else len(held_out)
    return len(train) + count < FEW * classes or 0 < count < ENOUGH_TO_CHOOSE


def can_choose(held_out: FeatureSet | None) -> TypeGuard[FeatureSet]:
    """Whether there are held-out images enough to choose by."""
    return held_out is not None and len(held_out) >= ENOUGH_TO_CHOOSE


def solve(strategy: Strategy, sets: list[FeatureSet], classes: int) -> Solved:
    """Ridge regression on the images of some sets, on the features that leave-one-out prefers.

    The features of the network's own head are better for nearly all tasks, and few images are a
    poor judge: cells are preferred only where their loss is smaller by `CLEARLY` standard errors.
    """
    y_N = torch.cat([features.y_N.cpu() for features in sets])
    found: list[tuple[Tensor, Solved]] = []
    sides: list[int | None] = [*_sides(sets[0], len(y_N))]
    if strategy.reference_norm is not None and len(y_N) <= FEW_FOR_NETWORK * classes:
        sides.insert(0, None)
    for side in sides:
        blocks = earlier_blocks(strategy, sets[0].shape_CHW) if side is None else ()
        x_NF = seen(strategy, sets, side, blocks)
        importance_F = _importance(strategy.head.width, x_NF.shape[1]) if side is None else None
        classifier = fit_ridge(x_NF, y_N, classes, importance_F).sharpened(y_N)
        loss_N = torch.nn.functional.cross_entropy(classifier.left_out_NK, y_N, reduction="none")
        right = accuracy(classifier.left_out_NK, y_N)
        found.append((loss_N, Solved(classifier, right, side, blocks)))
    best = min(found, key=lambda each: float(each[0].mean()))
    first, gain_N = found[0][1], found[0][0] - best[0]
    error = float(gain_N.std(correction=0)) / len(y_N)**0.5
    return first if first.side is None and gain_N.mean() <= CLEARLY * error else best[1]


def seen(strategy: Strategy, sets: list[FeatureSet], side: int | None,
         blocks: tuple[int, ...] = ()) -> Tensor:
    """x_NF of the plain views of some sets, float64: what a classifier sees (`Solved`)."""
    return torch.cat([network_features(strategy, features, blocks) if side is None
                      else pooled_cells(features, side) for features in sets]).double()


def _importance(last: int, total: int) -> Tensor:
    """Factors with which all earlier features together count as much as those of the last block."""
    factor = (last / (total - last))**0.5
    return torch.cat([torch.ones(last), torch.full((total - last,), factor)]).double()


def take(strategy: Strategy, task_index: int, solved: Solved) -> None:
    """Makes a solution the head of the task that is being learned."""
    if solved.side is None:
        strategy.take_network(task_index, solved.classifier, solved.blocks)
    else:
        strategy.take_linear(task_index, solved.classifier)


def _sides(features: FeatureSet, images: int) -> list[int]:
    channels, height, width = features.shape_CHW
    return [side for side in SIDES if side == 1 or (
        side <= min(height, width) and min(images, channels * side * side) <= LARGEST)]
