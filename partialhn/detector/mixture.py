"""The answer without a task: p(class | image) = p(task | image) p(class | image, task).

The detector gives the first factor. The second is a product of two opinions about the classes of
one task, its head's and the detector's, each raised to a power. The powers are those that the kept
held-out images find likeliest. A head runs only where it would change the answer, as sure as heads
usually are.

Legend: B images, R images that a head runs for, S sampled images, T tasks, K classes of a task,
L most classes of a task.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HEADS = 2
"""Most heads that an image asks, so that the cost of an answer does not grow with the tasks."""
POWER = 0.5
"""Both powers where no image was held out; the fit is drawn to it."""
DRAWN = 8.0
"""How strongly: a few held-out images must not decide alone."""
STEPS = 30
"""Newton's steps; the loss is convex in the powers."""


class Powers(NamedTuple):
    """How much each opinion about the classes of one task counts."""

    head: float
    detector: float


class Joint(NamedTuple):
    """The likeliest task of B images and the probabilities of its classes."""

    task_B: Tensor
    """Index of the task, int64."""
    p_BL: Tensor
    """Probabilities of that task's classes; zero after its last class."""
    task_p_B: Tensor
    """Probability of that task among all tasks."""
    energy_B: Tensor
    """Logarithm of the sum of the exponentials of what that task's head gave."""


def mixed(powers: Powers, head_BK: Tensor, detector_BK: Tensor) -> Tensor:
    """Log-probabilities of the classes of one task (B, K), from those of head and detector, each up
    to a constant an image.
    """
    return (powers.head * head_BK + powers.detector * detector_BK).log_softmax(1)


def fit_powers(tasks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Powers:
    """The likeliest powers.

    tasks: for each task log-probabilities of its sampled images (S, K) by its head and by the
    detector within the task, each up to a constant an image, and their classes (S,).
    """
    tasks = [task for task in tasks if len(task[2]) and task[0].shape[1] > 1]
    if not tasks:
        return Powers(POWER, POWER)
    most = max(head_SK.shape[1] for head_SK, _, _ in tasks)
    opinions_SL2, y_S = torch.cat([_opinions(*task[:2], most) for task in tasks]), torch.cat(
        [task[2] for task in tasks])
    # a class that a task lacks has no probability; the product above it must stay finite
    absent_SL = opinions_SL2[:, :, 0].isinf()
    opinions_SL2 = opinions_SL2.masked_fill(absent_SL[:, :, None], 0.0)
    powers_2 = torch.full((2,), POWER, dtype=torch.float64)
    for _ in range(STEPS):
        p_SL = (opinions_SL2 @ powers_2).masked_fill(absent_SL, -torch.inf).softmax(1)
        mean_S2 = (p_SL[:, None] @ opinions_SL2)[:, 0]
        own_S2 = opinions_SL2[torch.arange(len(y_S)), y_S]
        slope_2 = (mean_S2 - own_S2).sum(0) + DRAWN * (powers_2 - POWER)
        square_22 = (opinions_SL2 * p_SL[:, :, None]).flatten(0, 1).T @ opinions_SL2.flatten(0, 1)
        curve_22 = square_22 - mean_S2.T @ mean_S2 + DRAWN * torch.eye(2, dtype=torch.float64)
        # Newton's step, shortened so that it stays where the curve describes the loss
        step_2 = torch.linalg.solve(curve_22, slope_2)
        powers_2 = powers_2 - step_2 / (step_2.norm() / 0.2).clamp_min(1)
    head, detector = powers_2.clamp_min(0).tolist()
    return Powers(head, detector)


def usual_top(powers: Powers, tasks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Logarithm of the probability that the likeliest class within its task usually has: the median
    over the sampled images, as `fit_powers` takes them; 0 where none has a head's opinion.
    """
    tops = [mixed(powers, head_SK, detector_SK).amax(1) for head_SK, detector_SK, _ in tasks]
    return float(torch.cat(tops).median()) if sum(map(len, tops)) else 0.0


def answer(log_p_BTL: Tensor, powers: Powers, head: Callable[[int, Tensor], Tensor],
           usual: float = 0.0) -> Joint:
    """The likeliest class among the `HEADS` likeliest tasks, by its task.

    log_p_BTL: the detector's log-probabilities among the classes of all tasks, infinite negative
    after a task's last class. head: index of a task and rows (R,) to the sharpened logits (R, K)
    of the task's head. usual: as `usual_top` gives it.

    The heads are asked from the likeliest task on, until the likeliest class of the next task would
    be less likely than the best class so far, with the usual probability within its task. With
    `usual` of 0 no head is left out that could change the answer: no class is likelier than its
    task.
    """
    task_BT = log_p_BTL.logsumexp(2)
    B, T, L = log_p_BTL.shape
    order_BT = task_BT.argsort(dim=1, descending=True, stable=True)
    best_B, winner_B = torch.full((B,), -torch.inf), torch.zeros(B, dtype=torch.int64)
    p_BL, energy_B = torch.zeros(B, L), torch.zeros(B)
    for place in range(min(T, HEADS)):
        next_B = task_BT.gather(1, order_BT[:, place:place + 1])[:, 0]
        asked_B = (next_B + usual > best_B) | (place == 0)
        if not asked_B.any():
            break
        for task in sorted(set(order_BT[asked_B, place].tolist())):
            rows_R = torch.nonzero(asked_B & (order_BT[:, place] == task))[:, 0]
            head_RK = head(task, rows_R)
            own_RK = log_p_BTL[rows_R, task, :head_RK.shape[1]]
            within_RK = mixed(powers, head_RK, own_RK - task_BT[rows_R, task, None])
            score_R = task_BT[rows_R, task] + within_RK.amax(1)
            better_R = (score_R > best_B[rows_R]) | (place == 0)
            won_R = rows_R[better_R]
            best_B[won_R], winner_B[won_R] = score_R[better_R], task
            energy_B[won_R] = head_RK[better_R].logsumexp(1)
            p_BL[won_R] = torch.nn.functional.pad(within_RK[better_R].exp(),
                                                  (0, L - within_RK.shape[1]))
    return Joint(winner_B, p_BL, task_BT.gather(1, winner_B[:, None])[:, 0].exp(), energy_B)


def _opinions(head_SK: Tensor, detector_SK: Tensor, most: int) -> Tensor:
    """Both opinions side by side (S, L, 2), float64; infinite negative for absent classes."""
    both_SK2 = torch.stack([head_SK, detector_SK], 2).double()
    return torch.nn.functional.pad(both_SK2, (0, 0, 0, most - both_SK2.shape[1]),
                                   value=-torch.inf)
