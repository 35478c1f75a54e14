"""Learning without forgetting (Li & Hoiem 2016): the head before the task is the teacher.

A distillation loss keeps the predictions of the earlier tasks' classifiers on the new task's
features what they were. Nothing of earlier tasks is stored, and their classifiers do not change.

Legend: B batch, F features before the classifier, K classes of a task.
"""

from typing import cast

import torch
from torch import Tensor, nn

from partialhn.config import Config
from partialhn.features.batches import FeatureBatch
from partialhn.networks.head import Head, HeadStart
from partialhn.strategies.base import Classifier
from partialhn.strategies.shared_head import SharedHead

TEMPERATURE = 2.0


class Lwf(SharedHead):
    """Cross-entropy + strength * sum over earlier tasks of T^2 KL(teacher / T, now / T)."""

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head, start, config)
        self.strength = config.train.lwf_strength
        self._teacher: dict[str, Tensor] = {}

    def begin(self, task: int) -> None:
        super().begin(task)
        shared = {"norm": self.norm, **self.head.named(self.convolutions)} if task else {}
        self._teacher = {name: value.detach().clone() for name, value in shared.items()}

    def experience_state(self) -> dict[str, Tensor]:
        return dict(self._teacher)

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        self._teacher = dict(state)

    def finish(self, task: int) -> None:
        super().finish(task)
        self._teacher = {}

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        if not self._teacher or self.strength == 0:
            return super().loss_terms(task, batch)
        now = self.weights(task)
        x_BF = self.head.embed(batch.z_BCHW, now)
        statistics = None if now.statistics is None else now.statistics.clone()
        matrices = {name: value for name, value in self._teacher.items() if name != "norm"}
        with torch.no_grad():
            taught_BF = self.head.embed(batch.z_BCHW, now._replace(
                matrices=matrices, norm=self._teacher["norm"], statistics=statistics))
        total = x_BF.new_zeros(())
        for earlier in range(task):
            own = cast(Classifier, self.tasks[earlier])
            now_BK, taught_BK = (nn.functional.linear(x, own.classifier_KF, own.bias_K)
                                 / TEMPERATURE for x in (x_BF, taught_BF))
            total = total + nn.functional.kl_div(now_BK.log_softmax(1), taught_BK.log_softmax(1),
                                                 reduction="batchmean", log_target=True)
        return (nn.functional.linear(x_BF, now.classifier_KF, now.bias_K),
                self.strength * batch.loss_scale * TEMPERATURE**2 * total)
