"""Which task is an image of, where the caller does not know? Or of none that was learned?

Two witnesses. The *detector* looks at pooled trunk features alone: a Gaussian for each class with
one covariance for all (linear discriminant analysis; Lee et al. 2018 for the rejection). The
*heads* are asked too: the task whose head answers with the lowest entropy (Henning et al. 2021).

A task leaves behind its class means and a small sample, in float16; the covariance is shared and
its size does not grow. All of it comes from stored features: no image is decoded again.

Legend: B images, T tasks, C channels of pooled features, K classes of a task, S sampled images.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from partialhn.data.experience import RESERVED
from partialhn.errors import InputError, IntegrityError
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadWeights

AUTO, NONE = RESERVED
"""What a caller gives for the task to have it inferred; what stands for no known task."""
Method = Literal["detector", "entropy", "combined"]
METHODS: tuple[Method, ...] = ("detector", "entropy", "combined")
DEFAULT: Method = "combined"
SAMPLE = 12
"""Training images of each task whose pooled features are kept, to know usual distances."""
REJECT_SHARE = 0.02
"""Share of training images that lie further off than the threshold."""
SHRINKAGE = 0.05
"""Weight of the isotropic part of the covariance."""
ENTROPY_WEIGHT = 2.0
"""Log-odds that a whole unit of normalised entropy counts in the combined score."""


class TaskStatistics(NamedTuple):
    """What is taken out of one task's training features."""

    mean_KC: Tensor
    """float16, of each class."""
    sample_SC: Tensor
    """float16, of some images."""
    scatter_CC: Tensor
    """float64: sum over images of (z - class mean)(z - class mean)^T."""
    images: Tensor
    """Their number."""


class TaskInference:
    """What is known of the trunk features of every task learned so far."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        """One (K, C) float16 for each task."""
        self.samples: list[Tensor] = []
        """One (S, C) float16 for each task."""
        self.scatter_CC: Tensor | None = None
        """Sum over images of (z - class mean)(z - class mean)^T, float32."""
        self.count = 0
        """Images in the scatter."""
        self._whitening: tuple[Tensor, Tensor, float] | None = None

    def __len__(self) -> int:
        return len(self.means)

    def add_task(self, task: "TaskStatistics") -> None:
        """Takes in what `statistics` found of the next task."""
        scatter_CC = task.scatter_CC
        if self.scatter_CC is not None:
            scatter_CC = scatter_CC + self.scatter_CC.double()
        self.scatter_CC, self.count = scatter_CC.float(), self.count + int(task.images)
        self.means.append(task.mean_KC)
        self.samples.append(task.sample_SC)
        self._whitening = None

    def distances(self, z_BC: Tensor) -> Tensor:
        """Squared Mahalanobis distance of pooled features to each task's nearest class: (B, T)."""
        inverse_CC, means_MC, _ = self._prepared()
        white_BC = z_BC.cpu().double() @ inverse_CC
        squared_BM = torch.cdist(white_BC, means_MC).square()
        parts = torch.split(squared_BM, [len(mean) for mean in self.means], dim=1)
        return torch.stack([part.amin(1) for part in parts], dim=1).float()

    @property
    def threshold(self) -> float:
        """Squared distance to the nearest class of all beyond which an image is of no task."""
        return self._prepared()[2]

    def task_bytes(self, task: int) -> int:
        """Bytes that a task adds to the checkpoint."""
        return sum(value.numel() * value.element_size()
                   for value in (self.means[task], self.samples[task]))

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a checkpoint."""
        named = {f"means.{task}": value for task, value in enumerate(self.means)}
        named |= {f"samples.{task}": value for task, value in enumerate(self.samples)}
        if self.scatter_CC is not None:
            named |= {"scatter": self.scatter_CC, "count": torch.tensor(self.count)}
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], tasks: int) -> "TaskInference":
        """Takes back what `tensors` gave for so many tasks.

        Raises: IntegrityError where it is not there.
        """
        made = TaskInference()
        try:
            made.means = [tensors[f"means.{task}"] for task in range(tasks)]
            made.samples = [tensors[f"samples.{task}"] for task in range(tasks)]
            if tasks:
                made.scatter_CC, made.count = tensors["scatter"], int(tensors["count"])
        except KeyError as error:
            raise IntegrityError(f"what is known of tasks' features lacks {error}; it was saved "
                                 "by another version") from error
        return made

    def _prepared(self) -> tuple[Tensor, Tensor, float]:
        """Whitening matrix, whitened class means (M, C) of all tasks, and the threshold."""
        if self._whitening is None:
            if self.scatter_CC is None:
                raise InputError("no task was learned yet; a task can be inferred after the first")
            covariance_CC = self.scatter_CC.double() / max(1, self.count)
            C = len(covariance_CC)
            scale = covariance_CC.diagonal().mean().clamp_min(1e-12)
            covariance_CC = ((1 - SHRINKAGE) * covariance_CC
                             + SHRINKAGE * scale * torch.eye(C, dtype=torch.float64))
            inverse_CC = torch.linalg.inv(torch.linalg.cholesky(covariance_CC)).T.contiguous()
            means_MC = torch.cat(self.means).double() @ inverse_CC
            sample_SC = torch.cat(self.samples).double() @ inverse_CC
            nearest_S = torch.cdist(sample_SC, means_MC).square().amin(1)
            threshold = torch.quantile(nearest_S, 1 - REJECT_SHARE).item()
            self._whitening = inverse_CC, means_MC, threshold
        return self._whitening


def statistics(features: FeatureSet, place: int, seed: int = 0) -> TaskStatistics:
    """One pass over the plain view of a task's images. place: of the task among all."""
    z_NC = torch.cat([pooled(features.gather(rows_B, torch.zeros_like(rows_B))).cpu()
                      for rows_B in torch.split(_rows(features), 256)]).double()
    y_N = features.y_N.cpu().numpy()
    present_K, place_N = np.unique(y_N, return_inverse=True)  # a class may have no image left
    inverse_N = torch.from_numpy(place_N)
    mean_KC = torch.zeros(len(present_K), z_NC.shape[1], dtype=torch.float64)
    mean_KC.index_add_(0, inverse_N, z_NC)
    mean_KC /= torch.bincount(inverse_N)[:, None]
    centred_NC = z_NC - mean_KC[inverse_N]
    picked_S = np.random.default_rng([seed, place]).permutation(len(y_N))[:SAMPLE]
    return TaskStatistics(mean_KC.half(), z_NC[torch.from_numpy(picked_S)].half(),
                          centred_NC.T @ centred_NC, torch.tensor(len(y_N)))


@dataclasses.dataclass(frozen=True, eq=False)
class Inferred:
    """Which task each of B images seems to be of."""

    slot_B: Tensor
    """int64: the place of the likeliest task."""
    known_B: Tensor
    """bool: False where the image seems to be of none of the tasks."""


def pooled(z_BCHW: Tensor) -> Tensor:
    """Pooled trunk features z_BC: the mean over an image's positions."""
    return z_BCHW.mean((2, 3))


def contenders(distances_BT: Tensor) -> Tensor:
    """Which tasks the combined score may still choose for an image: (B, T), bool.

    Entropies are at most one unit apart, so a task whose distance alone puts it further behind
    than that unit counts cannot win, and its head need not be asked. Nor need a single one left.
    """
    fit_BT = -distances_BT / 2
    near_BT = fit_BT >= fit_BT.amax(1, keepdim=True) - ENTROPY_WEIGHT
    return near_BT & (near_BT.sum(1, keepdim=True) > 1)


def entropies(head: Head, weights: Sequence[HeadWeights], z_BCHW: Tensor,
              asked_BT: Tensor | None = None) -> Tensor:
    """Entropy of tasks' answers to images, as a share of the largest there can be: (B, T).

    asked_BT: where a head is asked at all, as `contenders` says; elsewhere, and where a head has a
    single class and says nothing, it is 1.
    """
    entropy_BT = z_BCHW.new_ones(len(z_BCHW), len(weights))
    for task, own in enumerate(weights):
        rows_R = (torch.arange(len(z_BCHW)) if asked_BT is None
                  else torch.nonzero(asked_BT[:, task])[:, 0]).to(z_BCHW.device)
        K = len(own.bias_K)
        if K > 1 and len(rows_R):
            p_RK = head(z_BCHW[rows_R], own).softmax(1)
            entropy_BT[rows_R, task] = torch.special.entr(p_RK).sum(1) / math.log(K)
    return entropy_BT


def scores(method: Method, distances_BT: Tensor, entropy_BT: Tensor | None) -> Tensor:
    """How well each task fits each image: (B, T), larger is better.

    `entropy_BT` may be None for the detector, which does not ask the heads.
    """
    if method == "detector":
        return -distances_BT / 2
    assert entropy_BT is not None
    if method == "entropy":
        return -entropy_BT
    return (-distances_BT / 2).log_softmax(1) - ENTROPY_WEIGHT * entropy_BT


def best_task(method: Method, distances_BT: Tensor, head: Head, weights: Sequence[HeadWeights],
              z_BCHW: Tensor) -> Tensor:
    """The task that fits each image best, by its place in `weights`: (B,), int64.

    Heads are asked of an image only where that can change the answer.
    """
    entropy_BT = None
    if method != "detector":
        asked_BT = contenders(distances_BT) if method == "combined" else None
        entropy_BT = entropies(head, weights, z_BCHW, asked_BT).cpu()
    return scores(method, distances_BT, entropy_BT).argmax(1)


def infer(inference: TaskInference, head: Head, slots: Sequence[int],
          weights: Sequence[HeadWeights], z_BCHW: Tensor, method: Method = DEFAULT) -> Inferred:
    """The task of each image from its trunk features, z_BCHW.

    slots: the tasks' places, where a task that was learned again counts by its newest only.
    weights: theirs, in the same order.
    """
    distances_BT = inference.distances(pooled(z_BCHW))[:, list(slots)]
    best_B = best_task(method, distances_BT, head, weights, z_BCHW)
    return Inferred(torch.tensor(slots)[best_B], distances_BT.amin(1) <= inference.threshold)


def _rows(features: FeatureSet) -> Tensor:
    return torch.arange(len(features), device=features.y_N.device)
