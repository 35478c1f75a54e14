"""Latent replay (Pellegrini et al. 2020): a small memory of earlier tasks' features.

The trunk is frozen with its statistics, so stored features never go stale. At depth 0 the
features are the images and the whole network is trained: that is experience replay (ER).

Legend: M stored images, N images of a task, C channels, H W spatial.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.config import Config
from partialhn.features.batches import FeatureBatch
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadStart
from partialhn.strategies.rehearsal import Drawn, rehearsal_terms
from partialhn.strategies.shared_head import SharedHead


class Memory(nn.Module):
    """Features of at most `capacity` images, spread as evenly over all classes as possible.

    The images of a class are a uniform sample of those it had, as a reservoir would keep them; new
    classes take room from the older ones.
    """

    z_MCHW: Tensor
    y_M: Tensor
    task_M: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.register_buffer("z_MCHW", torch.empty(0))
        self.register_buffer("y_M", torch.empty(0, dtype=torch.int64))
        self.register_buffer("task_M", torch.empty(0, dtype=torch.int64))

    def add(self, task: int, features: FeatureSet, seed: Sequence[int]) -> None:
        """Adds a task: the plain view of some images of each of its classes."""
        rng = np.random.default_rng(list(seed))
        label_N = features.y_N.cpu().numpy()
        classes = torch.unique(torch.stack([self.task_M, self.y_M], 1), dim=0)
        held = [(of_task, label) for of_task, label in classes.tolist()]
        new = [(task, label) for label in np.unique(label_N).tolist()]
        sizes = _shares(self.capacity, len(held) + len(new))
        kept = []
        for (of_task, label), size in zip(held, sizes, strict=False):
            mine = torch.nonzero((self.task_M == of_task) & (self.y_M == label))[:, 0]
            kept.append(mine[:size])  # in the random order they were taken in
        kept_m = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64)
        rows = [rng.permutation(np.flatnonzero(label_N == label))[:size]
                for (_, label), size in zip(new, sizes[len(held):], strict=True)]
        rows_m = torch.from_numpy(np.concatenate(rows)).to(features.y_N.device)
        z_MCHW = features.gather(rows_m, torch.zeros_like(rows_m)).to(features.shards[0].dtype)
        device = self.y_M.device
        before = [self.z_MCHW[kept_m]] if len(kept_m) else []
        self.z_MCHW = torch.cat([*before, z_MCHW.to(device)])
        self.y_M = torch.cat([self.y_M[kept_m], features.y_N[rows_m].to(device)])
        self.task_M = torch.cat([self.task_M[kept_m], torch.full_like(rows_m, task).to(device)])

    def draw(self, count: int, seed: Sequence[int]) -> Drawn | None:
        """At most `count` images, equal for equal seeds; None where the memory is empty."""
        if not len(self.y_M):
            return None
        rows_M = np.random.default_rng(list(seed)).permutation(len(self.y_M))[:count]
        index_M = torch.from_numpy(rows_M).to(self.y_M.device)
        return Drawn(self.z_MCHW[index_M].float(), self.y_M[index_M], self.task_M[index_M])

    def task_bytes(self, task: int) -> int:
        """Bytes that the images of one task take in the memory."""
        mine = int((self.task_M == task).sum())
        return sum(value[:1].nbytes * mine for value in self.buffers())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str,
                              *rest: Any) -> None:
        """Accepts a memory of any size, as its size changes while a stream is learned."""
        for name in dict(self.named_buffers()):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.empty_like(state_dict[f"{prefix}{name}"],
                                                     device=self.y_M.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LatentReplay(SharedHead):
    """Rehearsal from a class-balanced memory that does not grow with the stream."""

    recordable = False
    """The host draws the images, and their number per task differs from step to step."""

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head, start, config)
        self.memory = Memory(config.train.buffer)

    def begin(self, task: int) -> None:
        super().begin(task)
        self.tasks.requires_grad_(True)

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        drawn = self.memory.draw(len(batch.y_B), batch.seed)
        if drawn is None:
            return super().loss_terms(task, batch)
        return rehearsal_terms(self, task, batch, drawn, 1.0)

    def after_experience(self, task: int, features: FeatureSet, seed: Sequence[int]) -> None:
        self.memory.add(task, features, seed)

    def task_bytes(self, task: int) -> int:
        """Bytes of the task's classifier and of its images in the memory at present."""
        return super().task_bytes(task) + self.memory.task_bytes(task)


def _shares(total: int, parts: int) -> list[int]:
    """`total` divided into counts as even as possible, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
