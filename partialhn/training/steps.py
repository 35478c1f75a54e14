"""The optimiser's steps of one training, of an experience or of the trunk: executed one operation
at a time, or recorded once and replayed.

Everything that changes from step to step lies on the device: the counter that selects the batch
(`StepRows` of `partialhn.features.batches`), the one that selects the learning rate, Adam's
step count, and the sums that an epoch reports. So every step runs the same operations on the same
memory. On a GPU a step of a small head consists of hundreds of short kernels, and launching them
takes longer than running them. A CUDA graph records them once a training and launches all with
one call. The weights that a task starts from are generated before the first step, so the number of
earlier tasks changes neither the graph nor its cost.

Legend: S steps of the experience, G parameter groups, B batch, C channels, H W spatial, K classes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.features.batches import FeatureBatch
from partialhn.networks.device_memory import is_out_of_memory
from partialhn.networks.draws import ALONE
from partialhn.strategies import Strategy

WARM_UP = 40
"""Steps over which the learning rate rises; at most a tenth of all steps."""
UNRECORDED = 3
"""Steps before the recorded one, in which libraries choose their algorithms and Adam creates its
state."""
Body = Callable[[], None]
NextBatch = Callable[[], tuple[Any, ...]]
"""A function that gives the next batch: the arguments of the objective."""


class Objective(nn.Module):
    """A strategy's loss on a batch of one task, as a module for a data-parallel wrapper."""

    def __init__(self, strategy: Strategy, task: int, label_smoothing: float) -> None:
        super().__init__()
        self.strategy, self.task, self.label_smoothing = strategy, task, label_smoothing

    def forward(self, z_BCHW: Tensor, y_B: Tensor, loss_scale: float,
                seed: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and its terms: cross-entropy, number of correct answers and, where there is
        one, the regulariser. All are scalars; the terms are detached and float32.

        z_BCHW, y_B, loss_scale, seed: the fields of a `FeatureBatch`.
        """
        batch = FeatureBatch(z_BCHW, y_B, loss_scale, seed)
        logits_BK, regulariser = self.strategy.loss_terms(self.task, batch)
        cross_entropy = nn.functional.cross_entropy(logits_BK, y_B,
                                                    label_smoothing=self.label_smoothing)
        if loss_scale != 1:
            cross_entropy = loss_scale * cross_entropy
        loss, shown = cross_entropy, cross_entropy.detach()
        terms = [shown, (logits_BK.argmax(1) == y_B).sum(dtype=shown.dtype)]
        if regulariser is not None:
            loss = cross_entropy + regulariser
            terms.append(loss.detach() - shown)
        return loss, tuple(terms)


class StepRecorder(Protocol):
    """Records the device operations of a step, so that they can run again without Python."""

    def prepare(self, body: Body) -> None:
        """Runs a step that is not recorded."""

    def record(self, body: Body) -> Body:
        """Records a step without running it; returns a function that runs it."""


class CudaGraphs:
    """Records steps as CUDA graphs of the current device.

    The steps before the recorded one run on the stream that the recorded one does, so that autograd
    keeps no state of another stream. That is this thread's stream where it has its own
    (`partialhn.training.together`). Other threads may use the device meanwhile.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, body: Body) -> None:
        stream, outer = self._own_stream(), torch.cuda.current_stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            body()
        outer.wait_stream(stream)

    def record(self, body: Body) -> Body:
        """Records a step. Raises: InputError if CUDA or a library cannot record it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with ALONE, torch.cuda.graph(graph, stream=self._own_stream(),
                                         capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:
            # what has no memory ends the recording too early, which then is an error of its own
            for cause in (error, error.__context__):
                if cause is not None and is_out_of_memory(cause):
                    raise cause from None
            raise InputError(f"cuda_graphs is true, but a step cannot be recorded: {error}; "
                             "allowed: false (--no-cuda-graphs)") from error
        return graph.replay

    def _own_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            current = torch.cuda.current_stream()
            plain = current == torch.cuda.default_stream()
            self._stream = (
                torch.cuda.Stream() if plain else current)  # type: ignore[no-untyped-call]
        return self._stream


def recorder_for(device: torch.device, cuda_graphs: bool) -> StepRecorder | None:
    """The recorder for a device; None on a CPU, or if `cuda_graphs` is false."""
    return CudaGraphs() if cuda_graphs and device.type == "cuda" else None


class Steps:
    """Runs the optimiser's steps of one training."""

    def __init__(self, objective: nn.Module, optimiser: torch.optim.Optimizer, rates_SG: Tensor,
                 recorder: StepRecorder | None = None, steps_1: Tensor | None = None) -> None:
        """objective: takes a batch and gives the loss, and up to three terms to be summed, as
        `Objective` does.

        rates_SG: learning rates from the next step on, on the device, a column for each parameter
        group; the optimiser's own rates are tensors there.

        steps_1: the steps before the next one, if reading a batch counts them.
        """
        self.terms_3 = torch.zeros(3, device=rates_SG.device)
        """Sums of the objective's terms over steps; the caller sets them to zero."""
        self._sums = self.terms_3.unbind()
        self._objective, self._optimiser, self._rates_SG = objective, optimiser, rates_SG
        self._rates_1G = rates_SG.new_zeros(1, rates_SG.shape[1])
        for index, group in enumerate(optimiser.param_groups):
            group["lr"] = self._rates_1G[0, index]  # so that one operation sets all of them
        # where PyTorch is given the loss's own gradient it imports SymPy, which takes half a second
        self._one = torch.ones((), device=rates_SG.device) if rates_SG.is_cuda else None
        self._counts = steps_1 is None
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=rates_SG.device) if (
            steps_1 is None) else steps_1
        self._recorder, self._steps_run = recorder, 0
        self._replay: Body | None = None

    def run_next(self, next_batch: NextBatch) -> None:
        """Runs one step on the result of `next_batch`.

        With a recorder, later steps replay the recorded one and so use its `next_batch`.
        """
        if self._recorder is None:
            self._run(next_batch)
        elif self._steps_run < UNRECORDED:
            self._recorder.prepare(lambda: self._run(next_batch))
        else:
            if self._replay is None:
                self._replay = self._recorder.record(lambda: self._run(next_batch))
            self._replay()
        self._steps_run += 1

    def _run(self, next_batch: NextBatch) -> None:
        torch.index_select(self._rates_SG, 0, self._step_1, out=self._rates_1G)
        loss, terms = self._objective(*next_batch())
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss, self._one)
        self._optimiser.step()
        torch._foreach_add_(self._sums[:len(terms)], terms)
        if self._counts:
            self._step_1 += 1
