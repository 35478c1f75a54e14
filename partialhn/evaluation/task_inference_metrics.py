"""Metrics of task inference: accuracy without a task id, and detection of unknown tasks.

Legend: N images, T tasks, S slots, K classes, C channels of pooled features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partialhn.detector.detector import Detector
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import HeadWeights
from partialhn.strategies import Strategy
from partialhn.strategies.heads import Heads
from partialhn.task_inference import Inference, entropies, infer, pooled

IMAGES = 2048
"""Most test images that are measured, of all tasks together; this bounds the cost."""
HEAD_RUNS = IMAGES
"""Most head evaluations of the entropy method, which evaluates every head on every image: more
tasks mean fewer images."""
KEPT_BYTES = 128 << 20
"""Bytes of generated heads that are kept while this is measured."""
MOST_TASKS, ASKED, FEWER = 64, 32, 512
"""If there are more than `MOST_TASKS`, `FEWER` images of `ASKED` tasks are measured, evenly spread:
an image may ask a head that no other image has asked, and the head is generated for it."""


@torch.no_grad()
def without_task_id(strategy: Strategy, inference: Inference, tests: Sequence[FeatureSet],
                    slots: Sequence[int], heads_alone: bool = True,
                    classes: Sequence[Sequence[str]] | None = None) -> dict[str, float]:
    """Accuracy with the task given and inferred, on test images of every task, mean over tasks.

    slots: the newest slot of each task. classes: names of the classes of all slots; a class that
    several tasks have is right whichever of them it is taken for. Default: no two tasks share one.

    Keys: acc_given; acc (the right class where the task is inferred) and task_accuracy (share of
    images whose task was inferred correctly), both as class-incremental learning defines them: over
    all images, before any is rejected; acc_detector (the detector without the heads), acc_entropy
    (the heads alone, if `heads_alone`; right where the image's own head is surest), acc_combined
    (the same as acc); and known_rejected (share of the images, all of known tasks, rejected as
    unknown, for which `task auto` gives no label). Of more than `MOST_TASKS` tasks the images of
    some are measured, and acc_entropy is left out.
    """
    strategy.eval()
    weights, asked = Heads(strategy, slots, KEPT_BYTES), _asked(len(slots))
    some = [_some(tests[slots[place]], _images(len(slots)) // len(asked)) for place in asked]
    sizes = [len(y_n) for _, y_n in some]
    task_N = torch.tensor(asked).repeat_interleave(torch.tensor(sizes))
    z_NCHW = torch.cat([z_nCHW for z_nCHW, _ in some]).to(next(strategy.parameters()).device)
    given_N = torch.cat([strategy.head(z_nCHW, weights[place]).argmax(1).cpu() for z_nCHW, place
                         in zip(torch.split(z_NCHW, sizes), asked, strict=True)])
    y_N = torch.cat([y_n for _, y_n in some])
    right_N = given_N == y_N
    inferred = infer(inference, strategy.head, slots, weights, z_NCHW)
    slot_S, number_SK = torch.tensor(slots), _numbered(strategy.classes, classes)
    found_N = inferred.slot_B == slot_S[task_N]

    def right_class(slot_N: Tensor, class_N: Tensor) -> Tensor:
        return number_SK[slot_N, class_N] == number_SK[slot_S[task_N], y_N]
    if isinstance(inference, Detector):
        assert inferred.p_BL is not None, "a detector gives probabilities"
        place_N, class_N = inference.classify(slots, z_NCHW)
        class_right_N = right_class(inferred.slot_B, inferred.p_BL.argmax(1))
        alone_N = right_class(slot_S[place_N], class_N)
    else:  # it finds the task alone, whose head gives the class
        nearest_N = inference.distances(pooled(z_NCHW))[:, list(slots)].argmin(1)
        class_right_N, alone_N = found_N & right_N, (nearest_N == task_N) & right_N
    shares = {"acc_given": right_N, "acc": class_right_N, "task_accuracy": found_N,
              "known_rejected": ~inferred.known_B, "acc_detector": alone_N}
    means = {key: _mean_over_tasks(true_N, sizes) for key, true_N in shares.items()}
    if heads_alone and len(slots) <= MOST_TASKS:
        means["acc_entropy"] = _by_heads(strategy, weights, z_NCHW, right_N, sizes)
    return means | {"acc_combined": means["acc"]}


def _numbered(sizes: Sequence[int], classes: Sequence[Sequence[str]] | None) -> Tensor:
    """number_SK: a number for each class of each of S slots, the same for the same name; -1 where a
    slot has fewer than K classes. sizes: number of classes of each slot.
    """
    numbers: dict[Any, int] = {}
    number_SK = torch.full((len(sizes), max(sizes)), -1)
    for slot, size in enumerate(sizes):
        for place in range(size):
            name = classes[slot][place] if classes else (slot, place)
            number_SK[slot, place] = numbers.setdefault(name, len(numbers))
    return number_SK


@torch.no_grad()
def right_without_task(strategy: Strategy, inference: Inference, tests: Sequence[FeatureSet],
                       classes: Sequence[Sequence[str]] | None = None) -> list[Tensor]:
    """For every task, which of its test images get the right class where nobody says the task.

    One bool (N,) for each task. Every task has one slot. classes: as `without_task_id` takes them.
    """
    strategy.eval()
    slots, number_SK = range(len(tests)), _numbered(strategy.classes, classes)
    weights = Heads(strategy, slots, KEPT_BYTES)
    right = []
    for task, features in enumerate(tests):
        found = []
        for rows_B in torch.split(torch.arange(len(features)), IMAGES):
            rows_B = rows_B.to(features.y_N.device)
            z_BCHW = features.gather(rows_B, torch.zeros_like(rows_B)).to(
                weights[0].bias_K.device)
            inferred = infer(inference, strategy.head, slots, weights, z_BCHW)
            assert inferred.p_BL is not None, "a detector gives probabilities"
            found.append(number_SK[inferred.slot_B, inferred.p_BL.argmax(1)]
                         == number_SK[task, features.y_N[rows_B].cpu()])
        right.append(torch.cat(found))
    return right


def _mean_over_tasks(true_N: Tensor, sizes: Sequence[int]) -> float:
    shares = [_share(true_n) for true_n in torch.split(true_N, list(sizes))]
    return sum(shares) / len(shares)


def _by_heads(strategy: Strategy, weights: Sequence[HeadWeights], z_NCHW: Tensor, right_N: Tensor,
              sizes: Sequence[int]) -> float:
    """Accuracy where the surest head decides, on some images of at most `MOST_TASKS` tasks; where
    there are more tasks than fit into HEAD_RUNS, on one image of some of them.
    """
    tasks = len(weights)
    chosen = range(0, tasks, -(-tasks ** 2 // HEAD_RUNS))
    first = [sum(sizes[:task]) for task in range(tasks)]
    few = {task: first[task] + _spread(sizes[task], HEAD_RUNS // tasks ** 2) for task in chosen}
    few_F = torch.cat(list(few.values()))
    task_F = torch.cat([torch.full((len(own),), task) for task, own in few.items()])
    surest_F = entropies(strategy.head, weights, z_NCHW[few_F]).argmin(1).cpu()
    return _mean_over_tasks(right_N[few_F] & (surest_F == task_F),
                            [len(own) for own in few.values()])


@torch.no_grad()
def rejection_auroc(strategy: Strategy, inference: Inference, known: Sequence[FeatureSet],
                    unknown: FeatureSet, slots: Sequence[int]) -> float:
    """AUROC of detecting images of an unknown task among those of the learned tasks.

    slots: the newest slot of each task. 0.5 is guessing, 1 is perfect.
    """
    strategy.eval()
    weights, asked = Heads(strategy, slots, KEPT_BYTES), _asked(len(known))
    device = next(strategy.parameters()).device

    def strangeness(features: FeatureSet, images: int) -> Tensor:
        z_NCHW = _some(features, images)[0].to(device)
        return infer(inference, strategy.head, slots, weights, z_NCHW).strange_B

    share = max(1, IMAGES // 2 // len(asked))
    inside_N = torch.cat([strangeness(known[place], share) for place in asked])
    return auroc(inside_N, strangeness(unknown, IMAGES // 2))


def auroc(low_N: Tensor, high_N: Tensor) -> float:
    """Share of pairs in which the second value is larger; equal pairs count half.

    All pairs are compared, a million at most: a library that sorts takes seconds to import.
    """
    above, equal = high_N[:, None] > low_N, high_N[:, None] == low_N
    return float(above.double().mean() + 0.5 * equal.double().mean())


def _images(tasks: int) -> int:
    """The most test images that are measured where there are so many tasks."""
    return IMAGES if tasks <= MOST_TASKS else FEWER


def _asked(tasks: int) -> list[int]:
    """Indices of the tasks whose images are measured."""
    count = tasks if tasks <= MOST_TASKS else ASKED
    places = torch.linspace(0, tasks - 1, count, dtype=torch.float64)
    return [int(place) for place in places.round()]


def _some(features: FeatureSet, images: int) -> tuple[Tensor, Tensor]:
    """Plain view and labels of at most so many images, spread evenly over the set."""
    rows_N = _spread(len(features), images).to(features.y_N.device)
    return features.gather(rows_N, torch.zeros_like(rows_N)), features.y_N[rows_N].cpu()


def _spread(length: int, images: int) -> Tensor:
    """Evenly spaced positions of a sequence, about `images` of them and at least one."""
    return torch.arange(0, length, max(1, -(-length // max(1, images))))


def _share(true_N: Tensor) -> float:
    return true_N.float().mean().item()
