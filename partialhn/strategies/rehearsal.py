"""A shared head that also trains on images of earlier tasks, drawn anew for each step.

Both parts of a step pass the head together, so that batch norm sees one mixture of tasks, as its
running statistics do. The classifiers of earlier tasks are trained on.

Legend: B batch, M drawn images, C channels, H W spatial, F features before the classifier.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.features.batches import FeatureBatch
from partialhn.strategies.base import Classifier
from partialhn.strategies.naive import Naive


class Drawn(NamedTuple):
    """Images of earlier tasks: float32 features, labels within their tasks, and the tasks."""

    z_MCHW: Tensor
    y_M: Tensor
    task_M: Tensor


class Rehearsal(Naive):
    """Cross-entropy of the task + `weight` * cross-entropy of what was drawn of earlier ones."""

    recordable = False
    """The host draws, and how many images of which task there are differs from step to step."""

    def begin(self, task: int) -> None:
        super().begin(task)
        self.tasks.requires_grad_(True)

    def draw(self, count: int, seed: Sequence[int]) -> Drawn | None:
        """At most `count` images of earlier tasks, the same for the same seed; None: no memory."""
        raise NotImplementedError

    def weight(self, task: int) -> float:
        """What earlier tasks count in the loss, where the running one counts 1."""
        del task
        return 1.0

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        drawn = self.draw(len(batch.y_B), batch.seed)
        if drawn is None:
            return super().loss_terms(task, batch)
        weights = self.weights(task)
        z_BCHW = torch.cat([batch.z_BCHW, drawn.z_MCHW])
        ours_BF, theirs_MF = torch.split(self.head.embed(z_BCHW, weights),
                                         [len(batch.y_B), len(drawn.y_M)])
        total = theirs_MF.new_zeros(())
        for earlier in torch.unique(drawn.task_M).tolist():
            own, rows = cast(Classifier, self.tasks[earlier]), drawn.task_M == earlier
            logits_MK = nn.functional.linear(theirs_MF[rows], own.classifier_KF, own.bias_K)
            total = total + nn.functional.cross_entropy(logits_MK, drawn.y_M[rows],
                                                        reduction="sum")
        return (nn.functional.linear(ours_BF, weights.classifier_KF, weights.bias_K),
                self.weight(task) * total / len(drawn.y_M))
