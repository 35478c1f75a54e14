"""The optimiser's steps of one experience: operation by operation, or recorded and replayed.

Nothing that changes from step to step is on the host: batches are looked up by a counter on the
device (`ResidentBatches` of `partialhn.features.batches`), the learning rate by another, Adam
counts there too, and the sums that an epoch reports are added up there. So every step is the same
operations on the same memory. On a GPU a step of a small head is hundreds of short kernels, and
launching them takes longer than they do; a CUDA graph records them once an experience and launches
them with one call. What a task starts from is generated before, so the number of earlier tasks
changes neither the graph nor its cost.

Legend: S steps of the experience, G parameter groups, B batch, C channels, H W spatial, K classes.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.features.batches import FeatureBatch
from partialhn.strategies import Strategy

WARM_UP = 40
"""Steps over which the learning rate rises, at most a tenth of all."""
UNRECORDED = 3
"""Steps before one is recorded: libraries choose their algorithms, and Adam makes its state."""
Body = Callable[[], None]


class Objective(nn.Module):
    """A strategy's loss on a batch of one task: what a data-parallel wrapper wraps."""

    def __init__(self, strategy: Strategy, task: int, label_smoothing: float) -> None:
        super().__init__()
        self.strategy, self.task, self.label_smoothing = strategy, task, label_smoothing

    def forward(self, z_BCHW: Tensor, y_B: Tensor, loss_scale: float,
                seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The loss, and the detached sums (cross-entropy, regulariser, right answers)."""
        batch = FeatureBatch(z_BCHW, y_B, loss_scale, seed)
        logits_BK, added = self.strategy.loss_terms(self.task, batch)
        cross_entropy = loss_scale * nn.functional.cross_entropy(logits_BK, y_B,
                                                            label_smoothing=self.label_smoothing)
        loss = cross_entropy if added is None else cross_entropy + added
        right = (logits_BK.argmax(1) == y_B).sum()
        terms = [cross_entropy, loss - cross_entropy, right]
        return loss, torch.stack([term.detach().float() for term in terms])


class Recorder(Protocol):
    """Records what a step does to memory, to do the same again without Python."""

    def prepare(self, body: Body) -> None:
        """Runs a step that will not be recorded."""

    def record(self, body: Body) -> Body:
        """Records a step without running it; what is returned runs it."""


class CudaGraphs:
    """Records steps as CUDA graphs, of the current device.

    Steps before the recorded one run on a stream of their own, as the recorded one does, so that
    autograd keeps nothing that belongs to another. Other threads may use the device meanwhile.
    """

    def prepare(self, body: Body) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        outer = torch.cuda.current_stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            body()
        outer.wait_stream(stream)

    def record(self, body: Body) -> Body:
        """Raises: InputError where the device's libraries refuse."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:
            raise InputError(f"cuda_graphs is true and a step cannot be recorded: {error}; "
                             "allowed: false (--no-cuda-graphs)") from error
        return graph.replay


def recorder_for(device: torch.device, cuda_graphs: bool) -> Recorder | None:
    """What records steps on a device, where anything does."""
    return CudaGraphs() if cuda_graphs and device.type == "cuda" else None


class Steps:
    """Takes the steps of one experience."""

    def __init__(self, objective: nn.Module, optimiser: torch.optim.Optimizer, rates_SG: Tensor,
                 recorder: Recorder | None = None) -> None:
        """rates_SG: `learning_rates` from the next step on, on the device."""
        self.terms_3 = torch.zeros(3, device=rates_SG.device)
        """Sums of what the objective tells, until somebody sets them to zero."""
        self._objective, self._optimiser, self._rates_SG = objective, optimiser, rates_SG
        self._now_1 = torch.zeros(1, dtype=torch.int64, device=rates_SG.device)
        self._recorder, self._taken = recorder, 0
        self._replay: Body | None = None

    def take(self, read: Callable[[], FeatureBatch]) -> None:
        """Takes a step on what `read` gives. A recorded one goes on with what the first gave."""
        if self._recorder is None:
            self._step(read)
        elif self._taken < UNRECORDED:
            self._recorder.prepare(lambda: self._step(read))
        else:
            if self._replay is None:
                self._replay = self._recorder.record(lambda: self._step(read))
            self._replay()
        self._taken += 1

    def _step(self, read: Callable[[], FeatureBatch]) -> None:
        rate_G = self._rates_SG.index_select(0, self._now_1)[0]
        for rate, group in zip(rate_G, self._optimiser.param_groups, strict=True):
            group["lr"].copy_(rate)
        loss, terms_3 = self._objective(*read())
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimiser.step()
        self.terms_3 += terms_3
        self._now_1 += 1
