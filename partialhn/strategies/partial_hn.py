"""The product: a hypernetwork H_psi generates the head's convolutions for each task.

A task owns its code, its normalisation affine and its classifier; they are frozen when its
experience ends. What is shared may drift, held back by the regulariser over all earlier tasks.

Legend: T earlier tasks.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from partialhn.config import HypernetConfig
from partialhn.hypernet import build_generator
from partialhn.model import Head, HeadWeights
from partialhn.strategies.base import Classifier, Strategy


class HypernetTask(Classifier):
    """e_t and what else a task owns: code, norm (scales and shifts) and classifier."""

    def __init__(self, classes: int, width: int, code: Tensor, norm: Tensor) -> None:
        super().__init__(classes, width)
        self.code = nn.Parameter(code.detach().clone())
        self.norm = nn.Parameter(norm.detach().clone())


class PartialHypernet(Strategy):
    """Cross-entropy + beta * mean over earlier tasks of |H(e_j) - H*(e_j)|^2 (Hemati 2023)."""

    def __init__(self, head: Head, config: HypernetConfig, seed: int,
                 residual_base: Sequence[Tensor] | None) -> None:
        """`residual_base`: the trunk network's own convolutions, where config.residual is on."""
        super().__init__(head, seed)
        self.beta = config.beta
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hypernet = build_generator(config, head.convolutions)
            self._first_code = self.hypernet.first_code()
        self._first_norm = head.first_norm()
        if config.residual and residual_base is not None:
            self.hypernet.set_base(residual_base)

    def new_task(self, classes: int) -> HypernetTask:
        """Starts from the previous task's code and norm, which carries over what they know."""
        if len(self.tasks):
            previous = cast(HypernetTask, self.tasks[-1])
            code, norm = previous.code, previous.norm
        else:
            code, norm = cast(nn.Parameter, self._first_code), cast(nn.Parameter, self._first_norm)
        return HypernetTask(classes, self.head.width, code, norm)

    def begin(self, task: int) -> None:
        super().begin(task)
        self.hypernet.snapshot()

    def weights(self, task: int) -> HeadWeights:
        own = cast(HypernetTask, self.tasks[task])
        return HeadWeights(self.hypernet(own.code), own.norm, own.classifier_KF, own.bias_K)

    def regulariser(self, task: int) -> Tensor | None:
        if task == 0 or self.beta == 0 or not self.hypernet.tensors:
            return None
        codes = torch.stack([cast(HypernetTask, own).code for own in self.tasks[:task]])
        return self.beta * self.hypernet.regulariser(codes)

    def experience_state(self) -> dict[str, Tensor]:
        return self.hypernet.star()

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        self.hypernet.restore_snapshot(state)
