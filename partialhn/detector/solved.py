"""The detector's classifier, its mixture with the heads and its threshold, solved for some tasks.

Everything follows from the statistics of the tasks, so it is solved again when they change, and
the order in which tasks arrived does not matter.

Legend: B images, R images that a head runs for, T tasks, K classes of a task, M classes of all
tasks, L most classes of a task, D expanded features, S sampled images of all tasks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partialhn.detector.fitted import Fitted, fit
from partialhn.detector.mixture import Joint, Powers, answer, fit_powers, usual_top
from partialhn.detector.statistics import NO_ENERGY

MOST_SAMPLES = 16384
"""Kept images of all tasks that the classifier is fitted with, at most."""
MOST_SCORES, LEAST_SAMPLES = 1 << 18, 512
"""With many classes it is fitted with fewer images, but for the least number: the cost of the fit
grows with images times classes, and it chooses four numbers."""


class Answer(NamedTuple):
    """The answer about B images of which nobody says the task."""

    joint: Joint
    strange_B: Tensor
    """How little each image resembles any class of the tasks: larger is stranger."""
    known_B: Tensor
    """Whether the image seems to belong to any of the tasks, bool."""


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """All that an answer about some tasks needs."""

    fitted: Fitted
    column_TL: Tensor
    """Column of each class of each task; after a task's last class, one more than there are."""
    powers: Powers
    usual: float
    """As `answer` takes it."""
    energy_T2: Tensor
    """Mean and standard deviation of each head's energy on known images."""
    threshold: float
    """Strangeness beyond which an image seems to belong to none of the tasks."""

    def by_task(self, h_BD: Tensor) -> Tensor:
        """Log-probabilities among the classes of all tasks (B, T, L), infinite negative after a
        task's last class.
        """
        log_p_BM = self.fitted.log_probabilities(h_BD)
        none_B1 = log_p_BM.new_full((len(log_p_BM), 1), -torch.inf)
        return torch.cat([log_p_BM, none_B1], 1)[:, self.column_TL]

    def answer(self, h_BD: Tensor, head: Callable[[int, Tensor], Tensor]) -> Answer:
        """The likeliest class of each image. head: index of a task and rows (R,) to the sharpened
        logits (R, K) of the task's head.
        """
        joint = answer(self.by_task(h_BD), self.powers, head, self.usual)
        head_B = _head_strangeness(self.energy_T2[joint.task_B], joint.energy_B)
        strange_B = self.fitted.strangeness(h_BD, head_B)
        return Answer(joint, strange_B, strange_B <= self.threshold)


@torch.no_grad()
def solve(tasks: Sequence[dict[str, Tensor]], scatter_DD: Tensor, images: int, own: int,
          false_alarms: float) -> Solved:
    """Solves the classifier for some tasks.

    tasks: the statistics that belong to each task alone, by name (`TaskStatistics`). scatter_DD:
    sum of the scatter matrices of all tasks, over `images` images. own: how many of the D features
    are the trunk's own means and spreads. false_alarms: share of the sampled images, 0 to 1, that
    may be taken for strangers.
    """
    tasks = _some_samples(tasks)
    classes = [len(task["mean_KD"]) for task in tasks]
    first = [sum(classes[:place]) for place in range(len(tasks))]
    y_S = torch.cat([task["sample_y_S"] + start for task, start in zip(tasks, first, strict=True)])
    sample_SD = torch.cat([task["sample_SD"] for task in tasks]).double()
    mean_MD = torch.cat([task["mean_KD"] for task in tasks]).double()
    fitted = fit(scatter_DD, images, mean_MD, sample_SD, y_S, own)
    energy_T2 = torch.stack([task.get("energy", NO_ENERGY) for task in tasks])
    head_S = torch.cat([_sample_strangeness(task) for task in tasks])
    threshold = threshold_of(fitted.strangeness(sample_SD, head_S.double()), false_alarms)
    sizes = [len(task["sample_y_S"]) for task in tasks]
    log_p_SM = torch.split(fitted.log_probabilities(sample_SD), sizes)
    opinions = [(task["sample_head_SK"], _within(log_p, start, count), task["sample_y_S"])
                for task, log_p, start, count in zip(tasks, log_p_SM, first, classes, strict=True)
                if len(task["sample_head_SK"])]
    powers = fit_powers(opinions)
    return Solved(fitted.single(), _columns(first, classes), powers, usual_top(powers, opinions),
                  energy_T2, threshold)


def threshold_of(strange_S: Tensor, false_alarms: float) -> float:
    """The strangeness that another image of known tasks exceeds with probability `false_alarms`.

    Of S images and one more, each is the strangest with the same probability, so the rank is a
    share of S + 1 (split conformal prediction, Papadopoulos et al. 2002). A share of S would reject
    too many: 6.5 % in place of 5 % with 60 images. The probability is never below 1 / (S + 1).
    Infinite without images.
    """
    if not len(strange_S):
        return math.inf
    return float(np.quantile(strange_S.numpy(), 1 - false_alarms, method="weibull"))


def _head_strangeness(energy_B2: Tensor, energy_B: Tensor) -> Tensor:
    """How far a head's energy lies below its usual one, in standard deviations (B,); not a number
    where the usual one, energy_B2, is not known.
    """
    return (energy_B2[:, 0] - energy_B) / energy_B2[:, 1]


def _sample_strangeness(task: dict[str, Tensor]) -> Tensor:
    """How strange a task's sampled images are to its own head, (S,); not a number without a head.

    Heads of other tasks do not count, even where the classifier would ask them: which of them had
    been learned when these images were kept depends on the order of arrival.
    """
    head_SK = task["sample_head_SK"]
    if not len(head_SK):
        return torch.full((len(task["sample_y_S"]),), torch.nan)
    return _head_strangeness(task.get("energy", NO_ENERGY).expand(len(head_SK), 2),
                             head_SK.logsumexp(1))


def _columns(first: Sequence[int], classes: Sequence[int]) -> Tensor:
    """`Solved.column_TL` from the first column of each task and its number of classes."""
    rows = [[start + place if place < count else sum(classes) for place in range(max(classes))]
            for start, count in zip(first, classes, strict=True)]
    return torch.tensor(rows)


def _some_samples(tasks: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
    """The tasks with a bounded number of kept images of all of them, evenly spread."""
    classes = sum(len(task["mean_KD"]) for task in tasks)
    most = min(MOST_SAMPLES, max(LEAST_SAMPLES, MOST_SCORES // max(1, classes)))
    sizes = [len(task["sample_y_S"]) for task in tasks]
    every = -(-sum(sizes) // most)
    if every <= 1:
        return tasks
    chosen, before = [], 0
    for task, size in zip(tasks, sizes, strict=True):
        chosen.append(task | {name: task[name][-before % every::every] for name in (
            "sample_SD", "sample_y_S", "sample_head_SK")})
        before += size
    return chosen


def _within(log_p_SM: Tensor, start: int, classes: int) -> Tensor:
    """Log-probabilities among the classes of one task."""
    return log_p_SM[:, start:start + classes].log_softmax(1)
