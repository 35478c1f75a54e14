"""The baseline of a shared head: it trains on all images of every task so far.

At each task it goes on from the head as it is: a step takes a batch of the new task and one of
all earlier tasks' images, which counts as many times as there are earlier tasks. No stream allows
that; it needs the training features of every task.

Legend: M drawn images.
"""

from collections.abc import Sequence

import numpy as np
import torch

from partialhn.errors import InputError
from partialhn.features.feature_set import FeatureSet
from partialhn.strategies.rehearsal import Drawn, Rehearsal


class Joint(Rehearsal):
    """Joint training, all tasks weighted alike: what a shared head could reach without a limit."""

    _earlier: tuple[FeatureSet, ...] = ()

    def before_experience(self, earlier: Sequence[tuple[str, FeatureSet | None]]) -> None:
        gone = [name for name, features in earlier if features is None]
        if gone:
            raise InputError(f"strategy is 'joint' but the training features of task {gone[0]!r} "
                             "are not there any more; allowed: joint where every task's are")
        self._earlier = tuple(features for _, features in earlier if features is not None)

    def weight(self, task: int) -> float:
        return float(task)

    def draw(self, count: int, seed: Sequence[int]) -> Drawn | None:
        """Uniform over tasks, then over the task's images and views."""
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
