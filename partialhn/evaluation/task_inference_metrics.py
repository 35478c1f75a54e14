"""Metrics of task inference: accuracy without a task id, and detection of unknown tasks.

Legend: N images, T tasks, C channels of pooled features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from partialhn.features.feature_set import FeatureSet
from partialhn.strategies import Strategy
from partialhn.task_inference import (
    DEFAULT,
    METHODS,
    TaskInference,
    best_task,
    pooled,
)

IMAGES = 2048
"""Most test images that are measured, of all tasks together; this bounds the cost."""
HEAD_RUNS = 4 * IMAGES
"""Most head evaluations of the entropy method, which evaluates every head on every image: more
tasks mean fewer images."""


@torch.no_grad()
def without_task_id(strategy: Strategy, inference: TaskInference, tests: Sequence[FeatureSet],
                    slots: Sequence[int]) -> dict[str, float]:
    """Accuracy with the task given and inferred, on test images of every task, mean over tasks.

    slots: the newest slot of each task. Keys: acc_given, acc (the default method), task_accuracy
    (share of images whose task was inferred correctly), acc_detector, acc_entropy, acc_combined,
    and known_rejected (share of the images, all of known tasks, rejected as unknown).
    """
    strategy.eval()
    weights = [strategy.weights(slot) for slot in slots]
    rows = []
    for task, slot in enumerate(slots):
        z_NCHW, y_N = _some(tests[slot], IMAGES // len(slots))
        z_NCHW = z_NCHW.to(weights[0].bias_K.device)
        right_N = strategy.head(z_NCHW, weights[task]).argmax(1).cpu() == y_N
        distances_NT = inference.distances(pooled(z_NCHW))[:, list(slots)]
        row = {"acc_given": _share(right_N),
               "known_rejected": _share(distances_NT.amin(1) > inference.threshold)}
        for method in METHODS:
            images = HEAD_RUNS // len(slots) ** 2 if method == "entropy" else len(y_N)
            few_F = _spread(len(y_N), images)
            found_F = best_task(method, distances_NT[few_F], strategy.head, weights,
                                z_NCHW[few_F]) == task
            row[f"acc_{method}"] = _share(right_N[few_F] & found_F)
            if method == DEFAULT:
                row |= {"acc": row[f"acc_{method}"], "task_accuracy": _share(found_F)}
        rows.append(row)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def rejection_auroc(inference: TaskInference, known: Sequence[FeatureSet],
                    unknown: FeatureSet) -> float:
    """AUROC of detecting images of an unknown task by their distance to the learned tasks.

    0.5 is guessing, 1 is perfect.
    """
    share = max(1, IMAGES // 2 // len(known))
    inside_N = torch.cat([_nearest(inference, features, share) for features in known])
    outside_N = _nearest(inference, unknown, IMAGES // 2)
    return auroc(inside_N, outside_N)


def auroc(low_N: Tensor, high_N: Tensor) -> float:
    """Share of pairs in which the second value is larger; equal pairs count half.

    All pairs are compared, a million at most: a library that sorts takes seconds to import.
    """
    above, equal = high_N[:, None] > low_N, high_N[:, None] == low_N
    return float(above.double().mean() + 0.5 * equal.double().mean())


def _nearest(inference: TaskInference, features: FeatureSet, images: int) -> Tensor:
    return inference.distances(pooled(_some(features, images)[0])).amin(1)


def _some(features: FeatureSet, images: int) -> tuple[Tensor, Tensor]:
    """Plain view and labels of at most so many images, spread evenly over the set."""
    rows_N = _spread(len(features), images).to(features.y_N.device)
    return features.gather(rows_N, torch.zeros_like(rows_N)), features.y_N[rows_N].cpu()


def _spread(length: int, images: int) -> Tensor:
    """Evenly spaced positions of a sequence, about `images` of them and at least one."""
    return torch.arange(0, length, max(1, -(-length // max(1, images))))


def _share(true_N: Tensor) -> float:
    return true_N.float().mean().item()
