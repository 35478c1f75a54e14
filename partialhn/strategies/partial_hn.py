"""The product: a hypernetwork H_psi generates the head's convolutions for each task.

A task owns its code, its normalisation affine and its classifier; they are frozen when its
experience ends, and with them the columns that it opened. It starts from another task, the one
before it or the one it refreshes, and inherits what that one knows. What is shared may drift only
once no column is left to open, held back by the regulariser over all earlier tasks.

Legend: T earlier tasks, L generated tensors, d columns.
"""

from typing import cast

import torch
from torch import Tensor

from partialhn.config import HypernetConfig
from partialhn.hypernet import Inherited, build_generator, widened
from partialhn.model import Head, HeadStart, HeadWeights
from partialhn.strategies.base import OwnNorm, Strategy


class HypernetTask(OwnNorm):
    """e_t and what else a task owns: code, norm (scales and shifts) and classifier."""

    def __init__(self, classes: int, head: Head, norm: Tensor, code: Tensor, start: int) -> None:
        super().__init__(classes, head, norm)
        self.code = torch.nn.Parameter(code)
        self.register_buffer("start", torch.tensor(start))
        """The task whose columns it inherits; -1 for none."""


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
        self._running = -1
        self._inherited: Inherited | None = None
        self._earlier: Tensor | None = None
        """Of the running task: what it starts from, and the earlier codes; neither changes."""

    def new_task(self, classes: int, refreshes: int | None) -> HypernetTask:
        """Starts from the previous task's code and norm, which carries over what they know.

        A task that is refreshed starts from its own old code. Its old norm has been folded, so
        the norm is the previous task's here too.
        """
        task = len(self.tasks)
        self.hypernet.add_task(task)
        start = task - 1 if refreshes is None else refreshes
        code = self.hypernet.next_code(self.code(start) if task else None, task)
        return HypernetTask(classes, self.head, self.get_buffer("next_norm"), code, start)

    def begin(self, task: int) -> None:
        super().begin(task)
        self.hypernet.begin(task)
        self._running, self._inherited, self._earlier = task, None, None

    def finish(self, task: int) -> None:
        """The next task starts from this one's norm as it was learned, before it is folded."""
        self.get_buffer("next_norm").copy_(self._own(task).norm.detach())
        super().finish(task)
        self._running, self._inherited, self._earlier = -1, None, None

    @torch.no_grad()
    def code(self, task: int) -> Tensor:
        """e_t whole, (L, d) or (1, E): what it inherited, then its own."""
        line = [task]
        while self.hypernet.inherits(line[-1]):
            line.append(int(self._own(line[-1]).get_buffer("start")))
        whole = None
        for each in reversed(line):
            whole = self.hypernet.whole_code(self._own(each).code, whole, each)
        return cast(Tensor, whole)

    def weights(self, task: int) -> HeadWeights:
        own = self._own(task)
        return own.weights(self.hypernet(own.code, self._start(task)))

    def _start(self, task: int) -> Inherited | None:
        """What a task's own columns add to: generated once while the task is learned."""
        if not self.hypernet.inherits(task):
            return None
        if task == self._running and self._inherited is not None:
            return self._inherited
        start = int(self._own(task).get_buffer("start"))
        inherited = self.hypernet.inherit(self.code(start), task)
        if task == self._running:
            self._inherited = inherited
        return inherited

    def regulariser(self, task: int) -> Tensor | None:
        if not self.hypernet.drifts or self.beta == 0 or not self.hypernet.tensors:
            return None
        if self._earlier is None:
            codes = [self.code(earlier) for earlier in range(task)]
            widest = max(code.shape[1] for code in codes)
            self._earlier = torch.stack([widened(code, widest) for code in codes])
        return self.beta * self.hypernet.regulariser(self._earlier)

    def task_bytes(self, task: int) -> int:
        return super().task_bytes(task) + self.hypernet.task_bytes(task)

    def experience_state(self) -> dict[str, Tensor]:
        return self.hypernet.star()

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        self.hypernet.restore_snapshot(state)

    def _own(self, task: int) -> HypernetTask:
        return cast(HypernetTask, self.tasks[task])
