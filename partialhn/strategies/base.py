"""What every strategy is: weights of the head for each task, learned one task after the other.

Legend: F features before the classifier, K classes of a task.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.features.batches import FeatureBatch
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadStart, HeadWeights

LINEAR_RATE = 10.0
"""Times the learning rate where the head is one linear layer: at the rate that convolutions need it
is far from done when the epochs are over (`docs/measurements/learning-rates.md`)."""


class Strategy(nn.Module):
    """Owns what is learned over a stream; the trunk and the head's skeleton are beside it.

    A task is added with `add_task` and trained after `begin`; everything that must not change any
    more takes no gradient from then on. `weights` may be asked for any task at any time. Data other
    than the running batch comes through `before_experience` and `after_experience`.
    """

    recordable = True
    """Whether every step of an experience is the same operations on the same memory."""

    def __init__(self, head: Head, start: HeadStart, seed: int) -> None:
        super().__init__()
        self.head, self.start, self.seed = head, start, seed
        self.classes: list[int] = []
        self.tasks = nn.ModuleList()

    def add_task(self, classes: int, refreshes: int | None = None) -> None:
        """A new task with K = `classes`, initialised from the seed and the task's position.

        refreshes: the earlier slot of the same task that it starts from.
        """
        if classes < 1:
            raise InputError(f"a task has {classes} classes; allowed: 1 or more")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + len(self.classes))
            own = self.new_task(classes, refreshes)
        if refreshes is not None:
            own.take_classifier(cast(Classifier, self.tasks[refreshes]))
        self.tasks.append(own)
        self.classes.append(classes)

    def new_task(self, classes: int, refreshes: int | None) -> "Classifier":
        """The parameters that belong to one task alone."""
        raise NotImplementedError

    def begin(self, task: int) -> None:
        """Prepares training of one task: earlier tasks' own parameters are frozen."""
        for index, module in enumerate(self.tasks):
            module.requires_grad_(index == task)

    def before_experience(self, earlier: Sequence[tuple[str, FeatureSet | None]]) -> None:
        """Shows the names and training features of the earlier tasks, before an experience starts
        or goes on; None where they are not there any more.
        """

    def after_experience(self, task: int, features: FeatureSet, seed: Sequence[int]) -> None:
        """Takes out of a task's training features what later tasks need, once it is trained."""

    def finish(self, task: int) -> None:
        """Ends the training of a task: what was measured over batches becomes part of it."""
        own = self.tasks[task]
        if isinstance(own, OwnNorm):
            own.fold()

    @property
    def independent(self) -> bool:
        """Whether a task's training changes nothing but what the task owns, and reads only that
        and what the task it starts from was when it was learned.
        """
        return False

    def task_state(self, task: int) -> dict[str, Tensor]:
        """What a learned task left in `state_dict`, where tasks are `independent`."""
        prefixes = self.task_state_prefixes(task)
        return {name: value for name, value in self.state_dict().items()
                if name.startswith(prefixes)}

    def load_task_state(self, task: int, task_state: dict[str, Tensor]) -> None:
        """Puts a task in as another instance has learned it: what `task_state` gave there.

        Raises: KeyError where something lacks or belongs to another task.
        """
        if task_state.keys() != self.task_state(task).keys():
            raise KeyError(f"task {task} owns {sorted(self.task_state(task))}, found "
                           f"{sorted(task_state)}")
        self.load_state_dict(task_state, strict=False)

    def task_state_prefixes(self, task: int) -> tuple[str, ...]:
        """How names of what a task owns begin; what all share is the first task's."""
        return (f"tasks.{task}.",) if task else ("",)

    def weights(self, task: int) -> HeadWeights:
        """omega_t: the head's weights for a task."""
        raise NotImplementedError

    def forward(self, z_BCHW: Tensor, task: int) -> Tensor:
        """Features to logits_BK of one task."""
        logits_BK: Tensor = self.head(z_BCHW, self.weights(task))
        return logits_BK

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        """logits_BK of a step's batch of `task`, and what is added to the step's loss."""
        return self(batch.z_BCHW, task), self.regulariser(task)

    def regulariser(self, task: int) -> Tensor | None:
        """What the weights alone add to the loss while `task` is trained; None for nothing."""
        del task
        return None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What the running experience may change, with the peak learning rate of each group in a
        short experience (`peak`) and in a long one (`long_peak`).
        """
        trainable = [value for value in self.parameters() if value.requires_grad]
        peak = (1.0 if self.head.convolutions else LINEAR_RATE) * learning_rate
        return [{"params": trainable, "peak": peak, "long_peak": peak}]

    def experience_state(self) -> dict[str, Tensor]:
        """What a running experience needs beside the parameters, for its checkpoint."""
        return {}

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        """Takes back `experience_state`."""
        if state:
            raise InputError(f"checkpoint holds {sorted(state)[:3]}, which "
                             f"{type(self).__name__} does not use")

    def task_bytes(self, task: int) -> int:
        """Bytes that one task adds to the checkpoint."""
        return sum(value.numel() * value.element_size()
                   for value in self.tasks[task].parameters())


class Classifier(nn.Module):
    """A task's own classifier: classifier_KF and bias_K."""

    def __init__(self, classes: int, head: Head) -> None:
        super().__init__()
        bound = 1 / math.sqrt(head.width)
        self.classifier_KF = nn.Parameter(torch.empty(classes, head.width).uniform_(-bound, bound))
        self.bias_K = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def take_classifier(self, other: "Classifier") -> None:
        """Starts from another task's classifier of the same classes."""
        with torch.no_grad():
            self.classifier_KF.copy_(other.classifier_KF)
            self.bias_K.copy_(other.bias_K)


class OwnNorm(Classifier):
    """A task's own normalisation (scales and shifts) and classifier."""

    statistics: Tensor | None

    def __init__(self, classes: int, head: Head, norm: Tensor) -> None:
        super().__init__(classes, head)
        self.norm = nn.Parameter(norm.detach().clone())
        self.register_buffer("statistics", head.first_statistics())
        self._fold = head.fold

    def fold(self) -> None:
        """Takes batch norm's running statistics into scales and shifts, where there are any."""
        if self.statistics is not None:
            with torch.no_grad():
                self.norm.copy_(self._fold(self.norm, self.statistics))
            self.statistics = None

    def weights(self, convolutions: dict[str, Tensor]) -> HeadWeights:
        """omega_t with these convolutions."""
        return HeadWeights(convolutions, self.norm, self.classifier_KF, self.bias_K,
                           self.statistics)
