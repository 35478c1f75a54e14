"""The detector: finds the class of an image among the classes of all tasks, and strangers.

Every task adds to one scatter matrix of expanded trunk features, brings the means of its classes,
and keeps a few held-out images. `solved.py` solves the classifier of some tasks from them. Tasks in
any order give the same detector, bit for bit. A task that is taken out leaves the detector that
never had it.

Legend: B images, R images that a head runs for, K classes of a task, D expanded features,
S sampled images, P = D (D + 1) / 2.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from partialhn.detector.expansion import Embed, Expansion, expansion_of
from partialhn.detector.solved import Answer, Solved, solve
from partialhn.detector.statistics import (
    NO_ENERGY,
    TaskStatistics,
    scatter_again,
    statistics,
    unpacked,
)
from partialhn.errors import InputError, IntegrityError
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadWeights

FEATURES = 500
"""Default number of random features (`docs/design/task-inference.md`)."""
FALSE_ALARMS = 0.05
"""Share of the kept images of known tasks that the threshold of strangeness rejects."""
OWN = tuple(name for name in TaskStatistics._fields if name not in ("scatter_P", "expansion"))
"""The statistics that stay a task's own; the scatter matrices are added up."""


class Reference(Protocol):
    """A strategy that can apply the network's own head (`partialhn.strategies.base.Strategy`)."""

    @property
    def reference_norm(self) -> Tensor | None:
        """The vectors of the network's own head; None where there is no such head."""
        ...

    def reference_features(self, z_BCHW: Tensor, norm: Tensor,
                           blocks: Sequence[int] | None = None,
                           spreads: Sequence[int] = ()) -> list[Tensor]:
        """Pooled features (B, F) of blocks of the network's own head, of all where None; then
        their spreads.
        """
        ...


class Detector:
    """Statistics of every slot so far, and the classifier that follows from them.

    A slot is a task as it was learned at one time; the newest slot of a task replaces the others
    in the sums.
    """

    def __init__(self, features: int = FEATURES, false_alarms: float = FALSE_ALARMS) -> None:
        """`features`: number of random features. `false_alarms`: share of known images, 0 to 1,
        that may be taken for strangers.
        """
        self.features, self.false_alarms = features, false_alarms
        self.expansion: Expansion | None = None
        """None before the first task."""
        self.reference_norm: Tensor | None = None
        """The vectors of the network's own head, where the detector sees what it makes of an
        image."""
        self._embed: Embed | None = None
        self.slots: list[dict[str, Tensor]] = []
        """The statistics that belong to a slot alone, by the names in `OWN`; older models have no
        `energy`.
        """
        self.scatter_P: Tensor | None = None
        """Sum of the scatter matrices of all slots that count, int64, in units of 2^-16."""
        self._solved: tuple[tuple[int, ...], Solved] | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def see(self, strategy: Reference) -> None:
        """Lets the detector see an image as the network's own head does, if tasks start from it.

        A detector that has a task goes on as it was begun.
        """
        if self.expansion is None:
            self.reference_norm = strategy.reference_norm
        norm = self.reference_norm
        if norm is None:
            return
        self._embed = lambda z_BCHW, blocks, spreads: strategy.reference_features(
            z_BCHW, norm, blocks, spreads)
        if self.expansion is not None:
            self.expansion = Expansion.from_tensor(self.expansion.tensor(), self._embed)

    def statistics(self, train: FeatureSet, held_out: FeatureSet | None, classes: int,
                   logits_NK: Tensor | None = None, refreshes: int | None = None) -> TaskStatistics:
        """The statistics of the next slot, for `add_task`.

        refreshes: the earlier slot of the same task, whose images are the first ones of `train`.
        Its scatter matrix is computed again and taken off; the result is the change of the sum.
        """
        expansion = self.expansion or expansion_of(train.shape_CHW, self.features, self._embed)
        found = statistics(expansion, train, held_out, classes, logits_NK)
        if refreshes is None:
            return found
        before_P = scatter_again(expansion, train, self.slots[refreshes]["images"], classes)
        return found._replace(scatter_P=found.scatter_P - before_P)

    def add_task(self, task: TaskStatistics, refreshes: int | None = None) -> None:
        """Adds the next slot, from the result of `statistics`."""
        if self.expansion is None:
            self.expansion = Expansion.from_tensor(task.expansion, self._embed)
        # copies, because no two tensors of a checkpoint may share their memory
        self.slots.append({name: getattr(task, name).clone() for name in OWN})
        if refreshes is not None:
            self._empty(refreshes)
        self.scatter_P = (task.scatter_P if self.scatter_P is None
                          else self.scatter_P + task.scatter_P)
        self._solved = None

    def remove_task(self, slot: int, train: FeatureSet) -> None:
        """Takes a task out again; its slot stays as an empty place. train: the slot's features."""
        assert self.expansion is not None, "a task was added"
        assert self.scatter_P is not None
        own = self.slots[slot]
        self.scatter_P = self.scatter_P - scatter_again(self.expansion, train, own["images"],
                                                        len(own["mean_KD"]))
        self._empty(slot)
        self._solved = None

    def forget(self, slots: Sequence[int], train: FeatureSet) -> None:
        """Removes a task with all its slots; later slots move up.

        train: features of the newest slot. The result is the detector that never had the task, bit
        for bit.
        """
        self.remove_task(max(slots), train)
        self.slots = [own for slot, own in enumerate(self.slots) if slot not in slots]

    def infer(self, head: Head, slots: Sequence[int], weights: Sequence[HeadWeights],
              z_BCHW: Tensor) -> Answer:
        """The likeliest class of each image among the tasks of `slots`, and how strange it is.

        weights: the head weights of the slots, in the same order.
        """
        def logits(task: int, rows_R: Tensor) -> Tensor:
            sharp = self.slots[slots[task]]["sharpness"].item()
            logits_RK: Tensor = head(z_BCHW[rows_R.to(z_BCHW.device)], weights[task])
            return (sharp * logits_RK).cpu()

        return self._solve(slots).answer(self._expanded(z_BCHW), logits)

    def classify(self, slots: Sequence[int], z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The detector's own answers, without any head: the place in `slots` of the likeliest
        task (B,), and its likeliest class (B,).
        """
        best_BT2 = self._solve(slots).by_task(self._expanded(z_BCHW)).max(2)
        task_B = best_BT2.values.argmax(1)
        return task_B, best_BT2.indices.gather(1, task_B[:, None])[:, 0]

    def threshold(self, slots: Sequence[int]) -> float:
        """Strangeness beyond which an image seems to belong to no task of the slots."""
        return self._solve(slots).threshold

    def task_bytes(self, slot: int) -> int:
        """Bytes that a slot adds to the checkpoint."""
        return sum(value.numel() * value.element_size() for value in self.slots[slot].values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint."""
        named = {f"{name}.{slot}": value for slot, own in enumerate(self.slots)
                 for name, value in own.items()}
        if self.expansion is not None and self.scatter_P is not None:
            limit = torch.iinfo(torch.int32).max
            fits = len(self.scatter_P) and int(self.scatter_P.abs().max()) <= limit
            named |= {"expansion": self.expansion.tensor(),
                      "scatter": self.scatter_P.int() if fits else self.scatter_P}
        if self.reference_norm is not None:
            named["reference_norm"] = self.reference_norm
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], slots: int) -> "Detector":
        """Rebuilds the detector from the result of `tensors`, for so many slots.

        Raises: IntegrityError for a tensor that is missing or does not fit.
        """
        detector = Detector()
        if not slots:
            return detector
        try:
            detector.expansion = Expansion.from_tensor(tensors["expansion"])
            detector.features = detector.expansion.features
            detector.reference_norm = tensors.get("reference_norm")
            detector.scatter_P = tensors["scatter"].long()
            for slot in range(slots):
                # older models have no energy; a tensor more would change the hash of their weights
                detector.slots.append({name: tensors[f"{name}.{slot}"] for name in OWN
                                       if name != "energy" or f"energy.{slot}" in tensors})
            detector._check()
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise IntegrityError(f"the detector of this checkpoint does not fit: {error!r}"
                                 ) from error
        return detector

    def _check(self) -> None:
        """Raises: ValueError for tensors whose sizes contradict each other."""
        assert self.expansion is not None
        assert self.scatter_P is not None
        width = self.expansion.width
        if self.scatter_P.shape != (width * (width + 1) // 2,):
            raise ValueError(f"the scatter matrix has {len(self.scatter_P)} numbers, expected "
                             f"those of {width} features")
        for slot, own in enumerate(self.slots):
            classes, samples = len(own["mean_KD"]), len(own["sample_y_S"])
            head = tuple(own["sample_head_SK"].shape)
            y_S = own["sample_y_S"]
            if (own["mean_KD"].shape != (classes, width)
                    or own["sample_SD"].shape != (samples, width)
                    or head not in ((0, classes), (samples, classes))
                    or own["images"].shape != (2,) or own.get("energy", NO_ENERGY).shape != (2,)
                    or bool(((y_S < 0) | (y_S >= classes)).any())):
                raise ValueError(f"the statistics of slot {slot} contradict each other")

    def _empty(self, slot: int) -> None:
        """Makes a slot count for nothing, so that nothing of its images is left in it."""
        own = self.slots[slot]
        own["mean_KD"] = torch.full_like(own["mean_KD"], torch.nan)
        own["images"] = torch.zeros_like(own["images"])
        own["energy"] = NO_ENERGY.clone()
        for name in ("sample_SD", "sample_y_S", "sample_head_SK"):
            own[name] = own[name][:0].clone()

    def _expanded(self, z_BCHW: Tensor) -> Tensor:
        assert self.expansion is not None
        return self.expansion(z_BCHW)

    def _solve(self, slots: Sequence[int]) -> Solved:
        """The solved classifier for some slots, kept until the statistics change.

        Raises: InputError before the first task.
        """
        key = tuple(slots)
        if self._solved is None or self._solved[0] != key:
            if not key or self.expansion is None or self.scatter_P is None:
                raise InputError("no task is learned yet; allowed: task inference after the first "
                                 "task")
            images = sum(int(own["images"][0]) for own in self.slots)
            scatter_DD = unpacked(self.scatter_P, self.expansion.width)
            self._solved = key, solve([self.slots[slot] for slot in key], scatter_DD, images,
                                      self.expansion.own, self.false_alarms)
        return self._solved[1]
