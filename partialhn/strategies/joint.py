"""The upper baseline of a shared head: it trains on all images of every task so far.

At each task it goes on from the head as it is. A step takes a batch of the new task and one of all
earlier tasks' images, which counts as many times as there are earlier tasks. No stream allows
that; it needs the training features of every task.

Legend: B batch, M drawn images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from partialhn.errors import InputError
from partialhn.features.batches import FeatureBatch
from partialhn.features.feature_set import FeatureSet
from partialhn.strategies.rehearsal import Drawn, rehearsal_terms
from partialhn.strategies.shared_head import SharedHead


class Joint(SharedHead):
    """Joint training, all tasks weighted alike: the accuracy of a shared head without a limit."""

    recordable = False
    """The host draws the images, and their number per task differs from step to step."""

    _earlier: tuple[FeatureSet, ...] = ()

    def begin(self, task: int) -> None:
        super().begin(task)
        self.tasks.requires_grad_(True)

    def before_experience(self, earlier: Sequence[tuple[str, FeatureSet | None]]) -> None:
        gone = [name for name, features in earlier if features is None]
        if gone:
            raise InputError(f"strategy is 'joint' but the training features of task {gone[0]!r} "
                             "are no longer stored; allowed: joint where every task's are")
        self._earlier = tuple(features for _, features in earlier if features is not None)

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        drawn = self.draw(len(batch.y_B), batch.seed)
        if drawn is None:
            return super().loss_terms(task, batch)
        return rehearsal_terms(self, task, batch, drawn, float(task))

    def draw(self, count: int, seed: Sequence[int]) -> Drawn | None:
        """`count` images, uniform over tasks, then over the task's images and views; None before
        the second task. Equal seeds draw equal images.
        """
        if not self._earlier:
            return None
        rng = np.random.default_rng(list(seed))
        device = self.norm.device
        z, y, tasks = [], [], []
        task_M = rng.integers(0, len(self._earlier), count)
        for task in np.unique(task_M).tolist():
            features, of_task = self._earlier[task], int((task_M == task).sum())
            rows_M = torch.from_numpy(rng.integers(0, len(features), of_task))
            views_M = torch.from_numpy(rng.integers(0, features.views, of_task))
            z.append(features.gather(rows_M, views_M).to(device))
            y.append(features.y_N[rows_M].to(device))
            tasks.append(torch.full((of_task,), task, device=device))
        return Drawn(torch.cat(z), torch.cat(y), torch.cat(tasks))
