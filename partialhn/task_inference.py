"""Task inference: finds the task of an image when the caller does not know it.

It can also reject an image that belongs to no learned task. A new model has a `Detector`
(`partialhn.detector`). Models of version 0.1.0 have `TaskInference`, which this file still reads
and continues, so that they answer as before. It combines two methods. Its *detector* looks at
pooled trunk features alone: a Gaussian for each class, with one covariance for all (linear
discriminant analysis; Lee et al. 2018 for the rejection). The *entropy* method runs the heads of
all tasks and prefers the task with the lowest entropy (Henning et al. 2021).

All of it comes from stored features: no image is decoded again.

Legend: N training images of a task, B images, T tasks, C channels of pooled features, K classes of
a task, M classes of all tasks, S sampled images, R images that a head is run for,
L most classes of a task.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from partialhn.data.experience import RESERVED
from partialhn.detector.detector import Detector
from partialhn.detector.statistics import TaskStatistics as DetectorStatistics
from partialhn.errors import InputError, IntegrityError
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadWeights

AUTO, NONE = RESERVED
"""AUTO as a task's name asks for inference; NONE stands for no known task."""
Method = Literal["detector", "entropy", "combined"]
METHODS: tuple[Method, ...] = ("detector", "entropy", "combined")
DEFAULT: Method = "combined"
SAMPLE = 12
"""Training images of each task whose pooled features are kept, as examples of usual distances."""
REJECT_SHARE = 0.02
"""Share of the kept training images whose distance exceeds the rejection threshold."""
SHRINKAGE = 0.05
"""Weight of the isotropic part of the covariance."""
ENTROPY_WEIGHT = 2.0
"""Weight of the normalised entropy (0 to 1) in the combined score, in log-odds."""


class TaskStatistics(NamedTuple):
    """Statistics of one task's pooled training features."""

    mean_KC: Tensor
    """Mean of each class, float16."""
    sample_SC: Tensor
    """Features of a random sample of images, float16."""
    scatter_CC: Tensor
    """Sum over images of (z - class mean)(z - class mean)^T, float64."""
    images: Tensor
    """Number of images in the sum, a scalar tensor."""


class TaskInference:
    """Statistics of the trunk features of every task learned so far, for inferring tasks."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        """One (K, C) float16 for each task."""
        self.samples: list[Tensor] = []
        """One (S, C) float16 for each task."""
        self.scatter_CC: Tensor | None = None
        """Sum over images of (z - class mean)(z - class mean)^T, float32."""
        self.count = 0
        """Number of images in `scatter_CC`."""
        self._whitening: tuple[Tensor, Tensor, float] | None = None

    def __len__(self) -> int:
        return len(self.means)

    def add_task(self, task: "TaskStatistics") -> None:
        """Adds the next task, from the result of `statistics`."""
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
        by_task = torch.split(squared_BM, [len(mean) for mean in self.means], dim=1)
        return torch.stack([squared_BK.amin(1) for squared_BK in by_task], dim=1).float()

    @property
    def threshold(self) -> float:
        """Squared distance to the nearest class beyond which an image belongs to no known task."""
        return self._prepared()[2]

    def task_bytes(self, task: int) -> int:
        """Bytes that a task adds to the checkpoint."""
        return sum(value.numel() * value.element_size()
                   for value in (self.means[task], self.samples[task]))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint."""
        named = {f"means.{task}": value for task, value in enumerate(self.means)}
        named |= {f"samples.{task}": value for task, value in enumerate(self.samples)}
        if self.scatter_CC is not None:
            named |= {"scatter": self.scatter_CC, "count": torch.tensor(self.count)}
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], tasks: int) -> "TaskInference":
        """Rebuilds the object from the result of `tensors`, for so many tasks.

        Raises: IntegrityError naming a tensor that is missing.
        """
        inference = TaskInference()
        try:
            inference.means = [tensors[f"means.{task}"] for task in range(tasks)]
            inference.samples = [tensors[f"samples.{task}"] for task in range(tasks)]
            if tasks:
                inference.scatter_CC = tensors["scatter"]
                inference.count = int(tensors["count"])
        except KeyError as error:
            raise IntegrityError(f"the task inference of this checkpoint has no tensor {error}; "
                                 "the checkpoint was saved by another version") from error
        return inference

    def _prepared(self) -> tuple[Tensor, Tensor, float]:
        """Whitening matrix (C, C), whitened class means (M, C) of all tasks, and the threshold.

        Raises: InputError before the first task.
        """
        if self._whitening is None:
            if self.scatter_CC is None:
                raise InputError("no task is learned yet; allowed: task inference after the first "
                                 "task")
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
    """The statistics of a task, from the plain view of its images. place: index of the task."""
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


Inference = TaskInference | Detector
"""Whichever a model has."""


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedTask:
    """A task that was just learned, as task inference learns from it."""

    place: int
    """Index of its slot."""
    train: FeatureSet
    held_out: FeatureSet | None
    classes: int
    held_out_NK: Tensor | None
    """What a head that has not learned from the held-out images gives for them, logits on the CPU;
    None without such images."""
    seed: int = 0
    refreshes: int | None = None
    """Index of the earlier slot of the same task."""


@torch.no_grad()
def measure(inference: Inference, task: LearnedTask) -> dict[str, Tensor]:
    """The statistics of a task by name, for `add_measured` on this or another machine."""
    if isinstance(inference, Detector):
        return inference.statistics(task.train, task.held_out, task.classes, task.held_out_NK,
                                    task.refreshes)._asdict()
    return statistics(task.train, task.place, task.seed)._asdict()


def add_measured(inference: Inference, measured: dict[str, Tensor], refreshes: int | None) -> None:
    """Adds the next slot, from the result of `measure`."""
    if isinstance(inference, Detector):
        inference.add_task(DetectorStatistics(**measured), refreshes)
    else:
        inference.add_task(TaskStatistics(**measured))


def stored_inference(tensors: dict[str, Tensor], slots: int, empty: Detector) -> Inference:
    """Task inference from a checkpoint's tensors, of the kind that was stored; `empty` without a
    slot. Raises: IntegrityError for tensors that are missing or do not fit.
    """
    if not slots:
        return empty
    if "scatter" in tensors and "expansion" not in tensors:
        return TaskInference.from_tensors(tensors, slots)
    detector = Detector.from_tensors(tensors, slots)
    detector.false_alarms = empty.false_alarms
    return detector


@dataclasses.dataclass(frozen=True, eq=False)
class Inferred:
    """The inferred tasks of B images."""

    slot_B: Tensor
    """Slot of the likeliest task, int64."""
    known_B: Tensor
    """Whether the image seems to belong to a learned task at all, bool."""
    task_p_B: Tensor
    """Probability of that task among all tasks."""
    strange_B: Tensor
    """How little the image resembles any learned task: larger is stranger."""
    p_BL: Tensor | None = None
    """Probabilities of that task's classes, zero after its last class; None where the task's head
    alone has to give them (`TaskInference`)."""


def pooled(z_BCHW: Tensor) -> Tensor:
    """Pooled trunk features z_BC: the mean over all positions of an image."""
    return z_BCHW.mean((2, 3))


def contenders(distances_BT: Tensor) -> Tensor:
    """The tasks that can still have the best combined score for an image: (B, T), bool.

    Normalised entropies differ by at most 1. So a task that is behind the nearest by more than
    ENTROPY_WEIGHT cannot win, and its head need not run. If only one task remains, its head need
    not run either.
    """
    # the score's log_softmax shifts all tasks of an image equally, so -distance / 2 is enough
    fit_BT = -distances_BT / 2
    near_BT = fit_BT >= fit_BT.amax(1, keepdim=True) - ENTROPY_WEIGHT
    return near_BT & (near_BT.sum(1, keepdim=True) > 1)


def entropies(head: Head, weights: Sequence[HeadWeights], z_BCHW: Tensor,
              run_BT: Tensor | None = None) -> Tensor:
    """Entropy of each task's prediction, as a share of the largest possible: (B, T), 0 to 1.

    run_BT: the heads to run for each image, as `contenders` gives them; default: all. The entropy
    is 1 for a head that does not run, and for one with a single class.
    """
    entropy_BT = z_BCHW.new_ones(len(z_BCHW), len(weights))
    for task, head_weights in enumerate(weights):
        rows_R = (torch.arange(len(z_BCHW)) if run_BT is None
                  else torch.nonzero(run_BT[:, task])[:, 0]).to(z_BCHW.device)
        K = len(head_weights.bias_K)
        if K > 1 and len(rows_R):
            p_RK = head(z_BCHW[rows_R], head_weights).softmax(1)
            entropy_BT[rows_R, task] = torch.special.entr(p_RK).sum(1) / math.log(K)
    return entropy_BT


def scores(method: Method, distances_BT: Tensor, entropy_BT: Tensor | None) -> Tensor:
    """The score of each task for each image: (B, T), larger is better.

    `entropy_BT` may be None for the detector, which does not use the heads.
    """
    if method == "detector":
        return -distances_BT / 2
    assert entropy_BT is not None
    if method == "entropy":
        return -entropy_BT
    return (-distances_BT / 2).log_softmax(1) - ENTROPY_WEIGHT * entropy_BT


def best_task(method: Method, distances_BT: Tensor, head: Head, weights: Sequence[HeadWeights],
              z_BCHW: Tensor) -> Tensor:
    """The task with the best score for each image, as an index into `weights`: (B,), int64.

    A head runs only for images where it can change the result.
    """
    entropy_BT = None
    if method != "detector":
        run_BT = contenders(distances_BT) if method == "combined" else None
        entropy_BT = entropies(head, weights, z_BCHW, run_BT).cpu()
    return scores(method, distances_BT, entropy_BT).argmax(1)


@torch.no_grad()
def infer(inference: Inference, head: Head, slots: Sequence[int],
          weights: Sequence[HeadWeights], z_BCHW: Tensor, method: Method = DEFAULT) -> Inferred:
    """Infers the task of each image from its trunk features, z_BCHW.

    slots: the newest slot of each task. weights: their head weights, in the same order. method: of
    the models of version 0.1.0.
    """
    if isinstance(inference, Detector):
        joint, strange_B, known_B = inference.infer(head, slots, weights, z_BCHW)
        return Inferred(torch.tensor(slots)[joint.task_B], known_B, joint.task_p_B, strange_B,
                        joint.p_BL)
    distances_BT = inference.distances(pooled(z_BCHW))[:, list(slots)]
    best_B = best_task(method, distances_BT, head, weights, z_BCHW)
    task_p_B = (-distances_BT / 2).softmax(1).gather(1, best_B[:, None])[:, 0]
    strange_B = distances_BT.amin(1)
    return Inferred(torch.tensor(slots)[best_B], strange_B <= inference.threshold, task_p_B,
                    strange_B)


def _rows(features: FeatureSet) -> Tensor:
    return torch.arange(len(features), device=features.y_N.device)
