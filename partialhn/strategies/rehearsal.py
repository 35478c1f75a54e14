"""A step of a shared head that also trains on images of earlier tasks, drawn anew for each step.

Both halves of a step pass the head together, so that batch norm sees one mixture of tasks, as its
running statistics do. The classifiers of earlier tasks are trained on.

Legend: B batch, M drawn images, C channels, H W spatial, F features before the classifier, K
classes of a task.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.features.batches import FeatureBatch
from partialhn.strategies.base import Classifier
from partialhn.strategies.shared_head import SharedHead


class Drawn(NamedTuple):
    """Images of earlier tasks: float32 features, labels within their tasks, and the tasks."""

    z_MCHW: Tensor
    y_M: Tensor
    task_M: Tensor


def rehearsal_terms(strategy: SharedHead, task: int, batch: FeatureBatch, drawn: Drawn,
                    weight: float) -> tuple[Tensor, Tensor]:
    """logits_BK of the batch of `task`, and `weight` times the mean cross-entropy of the drawn
    images, each under its own task's classifier.
    """
    weights = strategy.weights(task)
    z_BCHW = torch.cat([batch.z_BCHW, drawn.z_MCHW])
    batch_BF, drawn_MF = torch.split(strategy.head.embed(z_BCHW, weights),
                                     [len(batch.y_B), len(drawn.y_M)])
    total = drawn_MF.new_zeros(())
    for earlier in torch.unique(drawn.task_M).tolist():
        own, rows = cast(Classifier, strategy.tasks[earlier]), drawn.task_M == earlier
        logits_MK = nn.functional.linear(drawn_MF[rows], own.classifier_KF, own.bias_K)
        total = total + nn.functional.cross_entropy(logits_MK, drawn.y_M[rows], reduction="sum")
    logits_BK = nn.functional.linear(batch_BF, weights.classifier_KF, weights.bias_K)
    return logits_BK, weight * total / len(drawn.y_M)
