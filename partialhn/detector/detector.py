"""The detector: finds the class of an image among the classes of all tasks, and strangers.

Every task adds to one scatter matrix of expanded trunk features, brings the means of its classes,
and keeps a few held-out images. The classifier is the closed form of `fitted.py`, and `mixture.py`
combines it with the heads. Tasks in any order give the same detector, bit for bit. A task that is
taken out leaves the detector that never had it.

Legend: B images, T tasks, K classes of a task, M classes of all tasks, L most classes of a
task, D expanded features, S sampled images, P = D (D + 1) / 2.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from partialhn.detector.expansion import Embed, Expansion, expansion_of
from partialhn.detector.fitted import Fitted, fit
from partialhn.detector.mixture import Joint, Powers, answer, fit_powers, usual_top
from partialhn.detector.statistics import (
    HeadLogits,
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
MOST_SAMPLES = 16384
"""Kept images of all tasks that the classifier is fitted with, at most."""
MOST_SCORES, LEAST_SAMPLES = 1 << 18, 512
"""With many classes it is fitted with fewer images, but for the least number: the cost of the fit
grows with images times classes, and it chooses four numbers."""
OWN = tuple(name for name in TaskStatistics._fields if name not in ("scatter_P", "expansion"))
"""The statistics that stay a task's own; the scatter matrices are added up."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Prepared:
    """All that an answer about some of the slots needs."""

    fitted: Fitted
    column_TL: Tensor
    """Column of each class of each task; after a task's last class, one more than there are."""
    powers: Powers
    usual: float
    """As `answer` takes it."""
    threshold: float


class Reference(Protocol):
    """A strategy that can apply the network's own head (`partialhn.strategies.base.Strategy`)."""

    @property
    def reference_norm(self) -> Tensor | None:
        """The vectors of the network's own head; None where there is no such head."""
        ...

    def reference_features(self, z_BCHW: Tensor, norm: Tensor,
                           blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Pooled features (B, F) of blocks of the network's own head; of all where None."""
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
        """The statistics that belong to a slot alone, by the names in `OWN`."""
        self.scatter_P: Tensor | None = None
        """Sum of the scatter matrices of all slots that count, int64, in units of 2^-16."""
        self._prepared: tuple[tuple[int, ...], _Prepared] | None = None

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
        self._embed = lambda z_BCHW, blocks: strategy.reference_features(z_BCHW, norm, blocks)
        if self.expansion is not None:
            self.expansion = Expansion.from_tensor(self.expansion.tensor(), self._embed)

    def statistics(self, train: FeatureSet, held_out: FeatureSet | None, classes: int,
                   head: HeadLogits | None = None, refreshes: int | None = None) -> TaskStatistics:
        """The statistics of the next slot, for `add_task`.

        refreshes: the earlier slot of the same task, whose images are the first ones of `train`.
        Its scatter matrix is computed again and taken off; the result is the change of the sum.
        """
        expansion = self.expansion or expansion_of(train.shape_CHW, self.features, self._embed)
        found = statistics(expansion, train, held_out, classes, head)
        if refreshes is None:
            return found
        before_P = scatter_again(expansion, train, self.slots[refreshes]["images"], classes)
        return found._replace(scatter_P=found.scatter_P - before_P)

    def add_task(self, task: TaskStatistics, refreshes: int | None = None) -> None:
        """Adds the next slot, from the result of `statistics`."""
        if self.expansion is None:
            self.expansion = Expansion.from_tensor(task.expansion, self._embed)
        self.slots.append({name: getattr(task, name) for name in OWN})
        if refreshes is not None:
            self._empty(refreshes)
        self.scatter_P = (task.scatter_P if self.scatter_P is None
                          else self.scatter_P + task.scatter_P)
        self._prepared = None

    def remove_task(self, slot: int, train: FeatureSet) -> None:
        """Takes a task out again; its slot stays as an empty place. train: the slot's features."""
        assert self.expansion is not None, "a task was added"
        assert self.scatter_P is not None
        own = self.slots[slot]
        self.scatter_P = self.scatter_P - scatter_again(self.expansion, train, own["images"],
                                                        len(own["mean_KD"]))
        self._empty(slot)
        self._prepared = None

    def forget(self, slots: Sequence[int], train: FeatureSet) -> None:
        """Removes a task with all its slots; later slots move up.

        train: features of the newest slot. The result is the detector that never had the task, bit
        for bit.
        """
        self.remove_task(max(slots), train)
        self.slots = [own for slot, own in enumerate(self.slots) if slot not in slots]

    def infer(self, head: Head, slots: Sequence[int], weights: Sequence[HeadWeights],
              z_BCHW: Tensor) -> tuple[Joint, Tensor]:
        """The likeliest class of each image among the tasks of `slots`, and whether the image
        seems to belong to any of them: bool (B,).

        weights: the head weights of the slots, in the same order.
        """
        prepared, h_BD = self._prepare(slots), self._expanded(z_BCHW)

        def log_p(task: int, rows_R: Tensor) -> Tensor:
            sharp = self.slots[slots[task]]["sharpness"].item()
            logits_RK: Tensor = head(z_BCHW[rows_R.to(z_BCHW.device)], weights[task])
            return (sharp * logits_RK).log_softmax(1).cpu()

        joint = answer(self._by_task(prepared, h_BD), prepared.powers, log_p, prepared.usual)
        return joint, prepared.fitted.strangeness(h_BD) <= prepared.threshold

    def classify(self, slots: Sequence[int], z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The detector's own answers, without any head: the place in `slots` of the likeliest
        task (B,), and its likeliest class (B,).
        """
        prepared = self._prepare(slots)
        log_p_BTL = self._by_task(prepared, self._expanded(z_BCHW))
        best_BT2 = log_p_BTL.max(2)
        task_B = best_BT2.values.argmax(1)
        return task_B, best_BT2.indices.gather(1, task_B[:, None])[:, 0]

    def strangeness(self, slots: Sequence[int], z_BCHW: Tensor) -> Tensor:
        """How little each image resembles any class of the slots, (B,): larger is stranger."""
        return self._prepare(slots).fitted.strangeness(self._expanded(z_BCHW))

    def threshold(self, slots: Sequence[int]) -> float:
        """Strangeness beyond which an image seems to belong to no task of the slots."""
        return self._prepare(slots).threshold

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
                detector.slots.append({name: tensors[f"{name}.{slot}"] for name in OWN})
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
                    or own["images"].shape != (2,)
                    or bool(((y_S < 0) | (y_S >= classes)).any())):
                raise ValueError(f"the statistics of slot {slot} contradict each other")

    def _empty(self, slot: int) -> None:
        """Makes a slot count for nothing, so that nothing of its images is left in it."""
        own = self.slots[slot]
        own["mean_KD"] = torch.full_like(own["mean_KD"], torch.nan)
        own["images"] = torch.zeros_like(own["images"])
        for name in ("sample_SD", "sample_y_S", "sample_head_SK"):
            own[name] = own[name][:0].clone()

    def _expanded(self, z_BCHW: Tensor) -> Tensor:
        assert self.expansion is not None
        return self.expansion(z_BCHW)

    def _by_task(self, prepared: _Prepared, h_BD: Tensor) -> Tensor:
        """Log-probabilities among the classes of all tasks (B, T, L), infinite negative after a
        task's last class.
        """
        log_p_BM = prepared.fitted.log_probabilities(h_BD)
        none_B1 = log_p_BM.new_full((len(log_p_BM), 1), -torch.inf)
        return torch.cat([log_p_BM, none_B1], 1)[:, prepared.column_TL]

    def _prepare(self, slots: Sequence[int]) -> _Prepared:
        """The solved classifier for some slots, kept until the statistics change.

        Raises: InputError before the first task.
        """
        key = tuple(slots)
        if self._prepared is None or self._prepared[0] != key:
            if not key or self.expansion is None or self.scatter_P is None:
                raise InputError("no task is learned yet; allowed: task inference after the first "
                                 "task")
            self._prepared = key, self._solve(key)
        return self._prepared[1]

    @torch.no_grad()
    def _solve(self, slots: tuple[int, ...]) -> _Prepared:
        assert self.expansion is not None
        assert self.scatter_P is not None
        own = _some_samples([self.slots[slot] for slot in slots])
        classes = [len(each["mean_KD"]) for each in own]
        first = [sum(classes[:task]) for task in range(len(own))]
        y_S = torch.cat([each["sample_y_S"] + start
                         for each, start in zip(own, first, strict=True)])
        sample_SD = torch.cat([each["sample_SD"] for each in own]).double()
        images = sum(int(each["images"][0]) for each in self.slots)
        fitted = fit(unpacked(self.scatter_P, self.expansion.width), images,
                     torch.cat([each["mean_KD"] for each in own]).double(), sample_SD, y_S,
                     self.expansion.own)
        threshold = math.inf if not len(sample_SD) else torch.quantile(
            fitted.strangeness(sample_SD), 1 - self.false_alarms).item()
        sizes = [len(each["sample_y_S"]) for each in own]
        log_p_SM = torch.split(fitted.log_probabilities(sample_SD), sizes)
        opinions = [(each["sample_head_SK"], _within(log_p, start, count), each["sample_y_S"])
                    for each, log_p, start, count in zip(own, log_p_SM, first, classes,
                                                         strict=True)
                    if len(each["sample_head_SK"])]
        powers = fit_powers(opinions)
        return _Prepared(fitted.single(), _columns(first, classes), powers,
                         usual_top(powers, opinions), threshold)


def _columns(first: Sequence[int], classes: Sequence[int]) -> Tensor:
    """`_Prepared.column_TL` from the first column of each task and its number of classes."""
    rows = [[start + place if place < count else sum(classes) for place in range(max(classes))]
            for start, count in zip(first, classes, strict=True)]
    return torch.tensor(rows)


def _some_samples(slots: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The slots with a bounded number of kept images of all of them, evenly spread."""
    classes = sum(len(own["mean_KD"]) for own in slots)
    most = min(MOST_SAMPLES, max(LEAST_SAMPLES, MOST_SCORES // max(1, classes)))
    sizes = [len(own["sample_y_S"]) for own in slots]
    every = -(-sum(sizes) // most)
    if every <= 1:
        return slots
    chosen, before = [], 0
    for own, size in zip(slots, sizes, strict=True):
        chosen.append(own | {name: own[name][-before % every::every] for name in (
            "sample_SD", "sample_y_S", "sample_head_SK")})
        before += size
    return chosen


def _within(log_p_SM: Tensor, start: int, classes: int) -> Tensor:
    """Log-probabilities among the classes of one task."""
    return log_p_SM[:, start:start + classes].log_softmax(1)
