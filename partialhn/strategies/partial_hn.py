"""The product: a hypernetwork H_psi generates the head's convolutions for each task.

A task owns its code, its normalisation affine and its classifier; they are frozen when its
experience ends. What is shared may drift, held back by the regulariser over all earlier tasks.

Legend: T earlier tasks.
"""

from typing import cast

import torch
from torch import Tensor, nn

from partialhn.config import HypernetConfig
from partialhn.hypernet import build_generator
from partialhn.model import Head, HeadStart, HeadWeights
from partialhn.strategies.base import OwnNorm, Strategy


class HypernetTask(OwnNorm):
    """e_t and what else a task owns: code, norm (scales and shifts) and classifier."""

    def __init__(self, classes: int, head: Head, norm: Tensor, code: Tensor) -> None:
        super().__init__(classes, head, norm)
        self.code = nn.Parameter(code)


class PartialHypernet(Strategy):
    """Cross-entropy + beta * mean over earlier tasks of |H(e_j) - H*(e_j)|^2 (Hemati 2023)."""

    def __init__(self, head: Head, start: HeadStart, config: HypernetConfig, seed: int) -> None:
        super().__init__(head, start, seed)
        self.beta = config.beta
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hypernet = build_generator(config, head.convolutions)
        if config.residual:
            self.hypernet.set_base(start.convolutions)
        self.register_buffer("next_norm", start.norm.clone())

    def new_task(self, classes: int, refreshes: int | None) -> HypernetTask:
        """Starts from the previous task's code and norm, which carries over what they know.

        A task that is refreshed starts from its own old code. Its old norm has been folded, so
        the norm is the previous task's here too.
        """
        source = -1 if refreshes is None else refreshes
        previous = cast(HypernetTask, self.tasks[source]).code if len(self.tasks) else None
        code = self.hypernet.next_code(previous, len(self.tasks))
        return HypernetTask(classes, self.head, self.get_buffer("next_norm"), code)

    def begin(self, task: int) -> None:
        super().begin(task)
        self.hypernet.begin(task)

    def finish(self, task: int) -> None:
        """The next task starts from this one's norm as it was learned, before it is folded."""
        self.get_buffer("next_norm").copy_(cast(HypernetTask, self.tasks[task]).norm.detach())
        super().finish(task)

    def weights(self, task: int) -> HeadWeights:
        own = cast(HypernetTask, self.tasks[task])
        return own.weights(self.hypernet(own.code))

    def regulariser(self, task: int) -> Tensor | None:
        if not self.hypernet.drifts or self.beta == 0 or not self.hypernet.tensors:
            return None
        codes = torch.stack([cast(HypernetTask, own).code for own in self.tasks[:task]])
        return self.beta * self.hypernet.regulariser(codes)

    def column_bytes(self) -> int:
        return self.hypernet.column_bytes()

    def experience_state(self) -> dict[str, Tensor]:
        return self.hypernet.star()

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        self.hypernet.restore_snapshot(state)
