"""The detector beside what others use when nobody says which task, on the same stored features.

    python tests/bench/detectors.py --preset split-tiny-imagenet-5x10 --data TINY_IMAGENET_32 \
        --far CIFAR10 --images-per-class 150 --seeds 3 --work FOLDER

Learns the preset's stream once a seed (trunk and features are shared; what an interrupted call has
learned is not learned again), then prints a Markdown table, means over seeds in percent: right
class and right task without the task, and how well images of the last task (near) and of another
data set (far) are told from those of the tasks before it: AUROC, and the share of strangers
accepted where 5 % of known images are rejected (FPR95).

Methods without heads see what the detector sees of an image, without its random features: the
trunk's means and spreads, and what the network's own later blocks make of it where all tasks start
from them. What they have to choose, all held-out images choose.
"""

import argparse
import dataclasses
import typing
from pathlib import Path

import torch

from partialhn.config import ComputeConfig, DataConfig
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode_images
from partialhn.detector.detector import Detector
from partialhn.detector.expansion import Expansion, expansion_of
from partialhn.detector.statistics import expanded
from partialhn.evaluation.task_inference_metrics import auroc
from partialhn.features.closed_form import fit_ridge
from partialhn.networks.trunk import run_trunk
from partialhn.presets import preset
from partialhn.run import StreamRun
from partialhn.task_inference import (
    TaskInference,
    best_task,
    pooled,
    statistics,
)
from partialhn.training.records import TaskRecord
from partialhn.training.slots import open_task_features

RANPAC = 8000
FAR_IMAGES = 500


class Learned:
    """A learned stream: features of every task, and its heads."""

    SEEN: typing.ClassVar = {}
    """What methods without heads see of the images of a task; no seed changes it."""

    def __init__(self, run):
        self.tasks, self.run = run.tasks, run
        self.strategy = run.learner.strategy.eval()
        self.weights = [self.strategy.weights(task) for task in range(len(self.tasks))]
        self.classes = [task.classes for task in self.tasks]
        self.tests = [plain(task.test) for task in self.tasks]
        self.detector = Detector(run.config.train.detector_features)
        self.detector.see(self.strategy)
        self.seen = expansion_of(self.tasks[0].train.shape_CHW, 0, self.detector._embed)
        self.see = once(self.seen)
        self.expanded = once(expansion_of(self.tasks[0].train.shape_CHW, self.detector.features,
                                          self.detector._embed))
        self.measured = {}
        self.every = once(lambda z_BCHW: [self.strategy.head(z_BCHW, own)
                                          for own in self.weights])

    def logits(self, z_BCHW, count):
        """Logits of the first `count` heads."""
        return self.every(z_BCHW)[:count]

    def images(self, place, split):
        """Features that the methods without heads see, and classes, of a task's images."""
        if (place, split) not in self.SEEN:
            features = getattr(self.tasks[place], split)
            self.SEEN[place, split] = expanded(self.seen, features, torch.arange(len(features)))
        return self.SEEN[place, split]

    def gathered(self, count, split):
        """The same of the first tasks together, with classes counted through."""
        first = [sum(self.classes[:task]) for task in range(count)]
        parts = [self.images(place, split) for place in range(count)]
        return (torch.cat([x_NF for x_NF, _ in parts]),
                torch.cat([y_N + start for (_, y_N), start in zip(parts, first, strict=True)]))

    def statistics(self, place):
        """What the detector keeps of a task."""
        if place not in self.measured:
            task = self.tasks[place]
            self.measured[place] = self.detector.statistics(
                task.train, task.validation, task.classes,
                self.strategy.head(plain(task.validation), self.weights[place]).detach())
        return self.measured[place]


def once(function):
    """The function, computed once for the same images."""
    known = {}

    def remembered(z_BCHW):
        key = (z_BCHW.data_ptr(), len(z_BCHW))
        if key not in known:
            known[key] = function(z_BCHW)
        return known[key]
    return remembered


def plain(features):
    rows_N = torch.arange(len(features))
    return features.gather(rows_N, torch.zeros_like(rows_N))


class Heads:
    """The heads alone; `score` makes one number a task of its logits."""

    def __init__(self, learned, count, score):
        self.learned, self.count, self.score = learned, count, score

    def __call__(self, z_BCHW):
        logits = self.learned.logits(z_BCHW, self.count)
        score_BT = torch.stack([self.score(each) for each in logits], 1)
        best_B = score_BT.argmax(1)
        class_TB = torch.stack([each.argmax(1) for each in logits])
        return best_B, class_TB.gather(0, best_B[None])[0], -score_BT.amax(1)


class First:
    """The detector of version 0.1.0, with the heads' entropy."""

    def __init__(self, learned, count):
        self.learned, self.count, self.inference = learned, count, TaskInference()
        for place in range(count):
            self.inference.add_task(statistics(learned.tasks[place].train, place))

    def __call__(self, z_BCHW):
        learned, weights = self.learned, self.learned.weights[:self.count]
        distances_BT = self.inference.distances(pooled(z_BCHW))
        best_B = best_task("combined", distances_BT, learned.strategy.head, weights, z_BCHW)
        class_TB = torch.stack([each.argmax(1) for each in learned.logits(z_BCHW, self.count)])
        return best_B, class_TB.gather(0, best_B[None])[0], distances_BT.amin(1)


class Linear:
    """A classifier over all classes from scores (B, M)."""

    def __init__(self, learned, count):
        self.learned, self.classes = learned, learned.classes[:count]
        self.x_NF, self.y_N = learned.gathered(count, "train")
        self.held_VF, self.held_y_V = learned.gathered(count, "validation")
        self.solve(sum(self.classes))

    def __call__(self, z_BCHW):
        return self.answer(self.learned.see(z_BCHW))

    def answer(self, x_BF):
        score_BM = self.scores(x_BF)
        best_TB2 = [part.max(1) for part in torch.split(score_BM, self.classes, dim=1)]
        task_B = torch.stack([best.values for best in best_TB2]).argmax(0)
        class_TB = torch.stack([best.indices for best in best_TB2])
        return task_B, class_TB.gather(0, task_B[None])[0], self.strangeness(x_BF, score_BM)

    def strangeness(self, x_BF, score_BM):
        return -score_BM.amax(1)

    def solve(self, classes):
        """The penalty whose classifier gets most held-out images right."""
        self.prepare(classes)
        best = (-1.0, None)
        for penalty in self.PENALTIES:
            solved = self.with_penalty(penalty)
            right = (self.scores(self.held_VF, solved).argmax(1) == self.held_y_V).float().mean()
            if right > best[0]:
                best = (right, solved)
        self.solved = best[1]


class SharedCovariance(Linear):
    """Linear discriminant analysis, distances as scores."""

    PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

    def prepare(self, classes):
        self.mean_MF = torch.stack([self.x_NF[self.y_N == y].mean(0) for y in range(classes)])
        centred_NF = self.x_NF - self.mean_MF[self.y_N]
        self.covariance_FF = (centred_NF.T @ centred_NF).double() / len(centred_NF)

    def with_penalty(self, penalty):
        scale = penalty * self.covariance_FF.diagonal().mean()
        shrunk_FF = self.covariance_FF + scale * torch.eye(len(self.covariance_FF)).double()
        white_FF = torch.linalg.inv(torch.linalg.cholesky(shrunk_FF)).T.float()
        return white_FF, self.mean_MF @ white_FF

    def scores(self, x_BF, solved=None):
        white_FF, white_MF = solved or self.solved
        return -torch.cdist(x_BF @ white_FF, white_MF) ** 2


class RanPac(Linear):
    """Ridge regression on random ReLU features (arXiv 2307.02251)."""

    PENALTIES = (1e2, 1e3, 1e4, 1e5)

    def prepare(self, classes):
        draw = torch.Generator().manual_seed(0)
        self.weight_FM = torch.randn(self.x_NF.shape[1], RANPAC, generator=draw)
        self.gram_MM = torch.zeros(RANPAC, RANPAC)
        self.target_MK = torch.zeros(RANPAC, classes)
        for x_BF, y_B in zip(self.x_NF.split(2048), self.y_N.split(2048), strict=True):
            h_BM = (x_BF @ self.weight_FM).relu()
            self.gram_MM.addmm_(h_BM.T, h_BM)
            self.target_MK += h_BM.T @ torch.nn.functional.one_hot(y_B, classes).float()

    def with_penalty(self, penalty):
        lower_MM = torch.linalg.cholesky(self.gram_MM + penalty * torch.eye(RANPAC))
        return torch.cholesky_solve(self.target_MK, lower_MM)

    def scores(self, x_BF, solved=None):
        return (x_BF @ self.weight_FM).relu() @ (self.solved if solved is None else solved)


class Nearest(Linear):
    """The most frequent class of the fifty nearest training images; the distance of the last of
    them is the strangeness (Sun et al. 2022)."""

    NEIGHBOURS = 50

    def solve(self, classes):
        self.x_NF, self.total = torch.nn.functional.normalize(self.x_NF, dim=1), classes

    def nearest(self, x_BF):
        return (torch.nn.functional.normalize(x_BF, dim=1) @ self.x_NF.T).topk(self.NEIGHBOURS)

    def scores(self, x_BF):
        near_BK = self.nearest(x_BF)
        votes_BM = torch.nn.functional.one_hot(self.y_N[near_BK.indices], self.total).sum(1)
        return votes_BM.float()

    def strangeness(self, x_BF, score_BM):
        return 1 - self.nearest(x_BF).values[:, -1]


class Vim(Linear):
    """Ridge regression; strangeness is what lies outside the features' principal half, as one more
    logit against the others' energy (Wang et al. 2022)."""

    def solve(self, classes):
        fitted = fit_ridge(self.x_NF, self.y_N, classes).sharpened(self.y_N)
        self.weight_MF, self.bias_M = fitted.weight_KF.float(), fitted.bias_K.float()
        self.origin_F = self.x_NF.mean(0)
        around_NF = self.x_NF - self.origin_F
        vectors_FF = torch.linalg.eigh((around_NF.T @ around_NF).double()).eigenvectors.float()
        self.outside_FR = vectors_FF[:, :len(vectors_FF) // 2]
        largest_N = self.scores(self.x_NF).amax(1)
        self.alpha = largest_N.mean() / (around_NF @ self.outside_FR).norm(dim=1).mean()

    def scores(self, x_BF):
        return x_BF @ self.weight_MF.T + self.bias_M

    def strangeness(self, x_BF, score_BM):
        residual_B = ((x_BF - self.origin_F) @ self.outside_FR).norm(dim=1)
        return self.alpha * residual_B - score_BM.logsumexp(1)


class Ours:
    """The detector, alone or with the heads."""

    def __init__(self, learned, count, heads):
        self.learned, self.heads, self.slots = learned, heads, range(count)
        self.detector = Detector(learned.run.config.train.detector_features)
        self.detector.see(learned.strategy)
        for place in self.slots:
            self.detector.add_task(learned.statistics(place))
        self.detector._expanded = learned.expanded

    def __call__(self, z_BCHW):
        if not self.heads:
            fitted = self.detector._solve(self.slots).fitted
            return (*self.detector.classify(self.slots, z_BCHW),
                    fitted.strangeness(self.learned.expanded(z_BCHW)))
        joint, strange_B, _ = self.detector.infer(self.learned.strategy.head, self.slots,
                                                  self.learned.weights[:len(self.slots)], z_BCHW)
        return joint.task_B, joint.p_BL.argmax(1), strange_B


def entropy(logits_BK):
    return -torch.special.entr(logits_BK.softmax(1)).sum(1)


METHODS = {
    "heads: lowest entropy": lambda learned, count: Heads(learned, count, entropy),
    "heads: largest logit": lambda learned, count: Heads(learned, count, lambda z: z.amax(1)),
    "heads: energy": lambda learned, count: Heads(learned, count, lambda z: z.logsumexp(1)),
    "version 0.1.0": First,
    "shared covariance": SharedCovariance,
    f"RanPAC, {RANPAC}": RanPac,
    "50 nearest images": Nearest,
    "ridge regression, ViM": Vim,
    "detector alone": lambda learned, count: Ours(learned, count, heads=False),
    "detector and heads": lambda learned, count: Ours(learned, count, heads=True)}


NO_HEADS = ("shared covariance", f"RanPAC, {RANPAC}", "50 nearest images", "ridge regression, ViM",
            "detector alone")
"""Methods that no seed changes: the seed is that of the heads."""


@torch.no_grad()
def measure(learned, make, far_BCHW):
    """Right class, right task, and AUROC and FPR95 of near and far strangers."""
    count = len(learned.tasks)
    method, right, tasks = make(learned, count), [], []
    for task, z_BCHW in enumerate(learned.tests):
        task_B, class_B, _ = method(z_BCHW)
        right.append(((task_B == task) & (class_B == learned.tasks[task].test.y_N)).float().mean())
        tasks.append((task_B == task).float().mean())
    before = make(learned, count - 1)
    known_N = torch.cat([before(z_BCHW)[2] for z_BCHW in learned.tests[:-1]])
    numbers = [sum(right) / count, sum(tasks) / count]
    for strange_B in (before(learned.tests[-1])[2], before(far_BCHW)[2]):
        threshold = torch.quantile(known_N, 0.95)
        numbers += [auroc(known_N, strange_B), (strange_B <= threshold).float().mean()]
    return [float(number) for number in numbers]


def far_features(run, data):
    """Trunk features of test images of another data set."""
    test = open_stream(DataConfig(data=data, tasks=1), run.root / "far")[0].test
    images = test.take(torch.arange(0, len(test), max(1, len(test) // FAR_IMAGES)).numpy())
    size = run.config.data.input_size
    decoded = decode_images(images.read(), images.ids(), size, pixels=run.cut.trunk.pixels)
    return run_trunk(run.cut.trunk, decoded.images_BCHW)


def expansion_table(learned):
    """Accuracy of the detector alone by its parts and its number of random features."""
    C, height, width = learned.tasks[0].train.shape_CHW
    for spread in (False, True):
        for count in (0, 250, 500, 1000, 2000):
            expansion = Expansion(C, spread and height * width > 1, count)
            detector = Detector(count)
            detector.expansion = expansion
            for task in learned.tasks:
                detector.add_task(detector.statistics(task.train, task.validation, task.classes))
            right = 0.0
            for task, z_BCHW in enumerate(learned.tests):
                task_B, class_B = detector.classify(range(len(learned.tasks)), z_BCHW)
                hit_B = (task_B == task) & (class_B == learned.tasks[task].test.y_N)
                right += float(hit_B.float().mean()) / len(learned.tasks)
            stored = 2 * expansion.width * (expansion.width + 1)
            print(f"| {'mean and spread' if spread else 'mean'} | {count} | {expansion.width} | "
                  f"{100 * right:.1f} | {stored / 1e6:.2f} MB |", flush=True)


def open_run(chosen, seed):
    """The stream of the command line, learned, with the features of every task open."""
    base = preset(chosen.preset)
    train = dataclasses.replace(base.train, seed=seed, compare=(),
                                epochs=chosen.epochs or base.train.epochs)
    data = dataclasses.replace(base.data, data=chosen.data,
                               images_per_class=chosen.images_per_class)
    run = StreamRun(dataclasses.replace(base, train=train, compute=ComputeConfig(threads=1),
                                        data=data), chosen.work)
    for record in run.records():
        if isinstance(record, TaskRecord):
            print(f"seed {seed}, task {record.task}", flush=True)
    if any(task.train is None for task in run.tasks):  # an earlier call has learned it
        run.tasks = open_task_features(run.store, run.slots())
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--far", required=True)
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", help="parts of the names of the rows; default: all")
    parser.add_argument("--sizes", action="store_true", help="table of the detector's size, too")
    chosen = parser.parse_args()
    rows = {name: [] for name in METHODS}
    for seed in range(chosen.seeds):
        run = open_run(chosen, seed)
        learned = Learned(run)
        far_BCHW = far_features(run, chosen.far)
        for name, make in METHODS.items():
            if chosen.methods and not any(part in name for part in chosen.methods):
                continue
            if seed and name in NO_HEADS:
                rows[name].append(rows[name][0])
                continue
            rows[name].append(measure(learned, make, far_BCHW))
            print(seed, name, [round(number, 3) for number in rows[name][-1]], flush=True)
    print("| | right class | right task | near AUROC | near FPR95 | far AUROC | far FPR95 |\n"
          "|---|---|---|---|---|---|---|")
    for name, found in ((name, found) for name, found in rows.items() if found):
        mean_6 = torch.tensor(found).mean(0).tolist()
        cells = [f"{100 * mean_6[0]:.1f}", f"{100 * mean_6[1]:.1f}", f"{mean_6[2]:.2f}",
                 f"{100 * mean_6[3]:.0f}", f"{mean_6[4]:.2f}", f"{100 * mean_6[5]:.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if chosen.sizes:
        expansion_table(learned)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
