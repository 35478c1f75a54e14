"""What an answer without the task costs, and a task that is added, against the number of tasks.

    python tests/bench/detector_cost.py --data TINY_IMAGENET_32 --work FOLDER [--pretrained]

Tasks of five classes: the 200 classes of Tiny-ImageNet in pieces, and from the 41st task on the
same pieces with every channel scaled by a factor of the task's own, so that no two tasks look
alike. The heads are those of the trunk's network with a classifier in closed form. Milliseconds of
processor time of one thread, and ratios: medians of rounds in which a request with the task given
and one without it alternate, trunk included, one image and 16 images a request, after every head
has been asked for once (a server keeps 256 MB of them and generates the others again); `heads` is
the mean number of heads that an image asks; `held` are the bytes that a server holds of the solved
detector and of all heads. With --pretrained the trunk is that of the preset
`pretrained-tiny-imagenet`, so that the detector runs the network's own later blocks, too. Prints a
Markdown table; --plot FILE draws it.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import (
    BackboneConfig,
    ComputeConfig,
    Config,
    DataConfig,
    FeatureConfig,
    HypernetConfig,
)
from partialhn.detector.detector import Detector
from partialhn.features.closed_form import fit_ridge
from partialhn.predict import Predictor
from partialhn.presets import preset
from partialhn.run import StreamRun

PIECES, CLASSES, ROUNDS = 40, 5, 160
"""`ROUNDS` images are timed, in requests of one and of several images, but at least 30 requests."""


def stream(data, work, pretrained):
    """The trunk, and the features of forty tasks."""
    options = DataConfig(data=data, tasks=PIECES, images_per_class=24, validation=0.25)
    backbone = BackboneConfig(trunk_epochs=5)
    if pretrained:
        chosen = preset("pretrained-tiny-imagenet")
        backbone = chosen.backbone
        options = dataclasses.replace(options, input_size=chosen.data.input_size)
    run = StreamRun(Config(
        options, backbone, features=FeatureConfig(views=1, augment="none"),
        hypernet=HypernetConfig(fresh_columns=4), compute=ComputeConfig(threads=1)), work)
    list(run.fit_network())
    run.prepare()
    return run


class Scaled:
    """A feature set with every channel scaled, as the detector reads it."""

    def __init__(self, features, scale_C):
        self.features, self.scale_C = features, scale_C
        self.y_N, self.shape_CHW = features.y_N, features.shape_CHW

    def __len__(self):
        return len(self.features)

    def gather(self, rows_B, views_B):
        return self.features.gather(rows_B, views_B) * self.scale_C[:, None, None]


def task_features(run, place):
    """Train, validation and test features of a task, scaled from the 41st on."""
    task, channels = run.tasks[place % PIECES], run.tasks[0].train.shape_CHW[0]
    draw = torch.Generator().manual_seed(place)
    scale_C = torch.randn(channels, generator=draw).mul(0.7).exp()
    if place < PIECES:
        scale_C = torch.ones(channels)
    return [Scaled(split, scale_C) for split in (task.train, task.validation, task.test)]


def plain(features):
    rows_N = torch.arange(len(features))
    return features.gather(rows_N, torch.zeros_like(rows_N))


def add(strategy, detector, run, place):
    """Adds a task; returns the seconds that the detector took for its statistics."""
    train, validation, _ = task_features(run, place)
    strategy.add_task(CLASSES)
    strategy.finish(place)
    weights = strategy.weights(place)
    fitted = fit_ridge(strategy.head.embed(plain(train), weights), train.y_N, CLASSES)
    fitted = fitted.sharpened(train.y_N)
    own = strategy.tasks[place]
    own.classifier_KF.copy_(fitted.weight_KF)
    own.bias_K.copy_(fitted.bias_K)
    weights = strategy.weights(place)
    logits_NK = strategy.head(plain(validation), weights).detach()
    start = time.process_time()
    detector.add_task(detector.statistics(train, validation, CLASSES, logits_NK))
    return time.process_time() - start


def measure(predictor, run, count, images):
    """Milliseconds with the task given, the ratio without it, and heads asked an image."""
    size = run.config.data.input_size
    images_BCHW = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(0))
    times, rows, rounds = {"given": [], "auto": []}, 0, max(30, ROUNDS // images)
    for place in range(count):
        predictor.head_weights(place)
    head = predictor.model.strategy.head
    hook = head.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    for turn in range(rounds + 1):
        asked = []
        places = [(turn * 37 + image * 11) % count for image in range(images)]
        z_BCHW = torch.cat([plain(task_features(run, place)[2])[turn % 20][None]
                            for place in places])
        for name, tasks in (("given", list(map(str, places))), ("auto", ["auto"] * images)):
            asked.clear()
            start = time.process_time()
            predictor.features(images_BCHW, exact=False)
            predictor.answers(z_BCHW, tasks)
            if turn:  # the first round solves the detector
                times[name].append(1000 * (time.process_time() - start))
        rows += sum(asked) * bool(turn)
    hook.remove()
    ratios = [auto / given for given, auto in zip(times["given"], times["auto"], strict=True)]
    return statistics.median(times["given"]), statistics.median(ratios), rows / rounds / images


def accuracy(predictor, run, count):
    """Share of right tasks and classes on a few test images of every task."""
    right = []
    for place in range(count):
        test = task_features(run, place)[2]
        answers = predictor.answers(plain(test)[::10], ["auto"] * len(range(0, len(test), 10)))
        right += [answer.task == str(place) and int(answer.classes.index(
            max(zip(answer.probabilities, answer.classes, strict=True))[1])) == label
            for answer, label in zip(answers, test.y_N[::10].tolist(), strict=True)]
    return sum(right) / len(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", type=int, nargs="+", default=[5, 20, 40, 100, 200])
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    run = stream(chosen.data, chosen.work, chosen.pretrained)
    torch.set_grad_enabled(False)
    strategy, detector, rows = run.cut.strategy(run.config).eval(), Detector(), []
    detector.see(strategy)
    print("| tasks | right class | adding a task | solving | stored | held | given, 1 | "
          "auto / given, 1 | given, 16 | auto / given, 16 | heads |\n" + "|---" * 11 + "|",
          flush=True)
    for count in chosen.tasks:
        seconds = [add(strategy, detector, run, place)
                   for place in range(len(detector), count)]
        start = time.process_time()
        detector.threshold(range(count))
        solving = time.process_time() - start
        infos = tuple(TaskInfo(str(place), tuple(map(str, range(CLASSES))))
                      for place in range(count))
        predictor = Predictor(Model(run.config, run.cut.trunk, strategy, infos,
                                    inference=detector))
        one, many = (measure(predictor, run, count, images) for images in (1, 16))
        stored = sum(value.nbytes for value in detector.tensors().values())
        adding = 1000 * statistics.median(seconds)
        memory = held(predictor, detector, count)
        rows.append((count, one[1], many[1], adding, 1000 * solving,
                     stored / 1e6, memory / 1e6))
        print(f"| {count} | {100 * accuracy(predictor, run, count):.0f} % | "
              f"{adding:.0f} ms | {1000 * solving:.0f} ms | "
              f"{stored / 1e6:.1f} MB | {memory / 1e6:.0f} MB | "
              f"{one[0]:.1f} ms | {one[1]:.2f} | "
              f"{many[0]:.1f} ms | {many[1]:.2f} | {many[2]:.2f} |", flush=True)
    if chosen.plot:
        draw(rows, chosen.plot)


def held(predictor, detector, count):
    """Bytes of the solved detector and of the weights of all heads."""
    fitted = detector._solve(range(count)).fitted
    solved = sum(value.nbytes for part in (fitted, fitted.density)
                 for value in (*vars(part).values(), *getattr(part, "whitening", ()))
                 if torch.is_tensor(value))
    return solved + sum(
        sum(matrix.nbytes for matrix in weights.matrices.values()) + weights.norm.nbytes
        + weights.classifier_KF.nbytes for weights in map(predictor.head_weights, range(count)))


def draw(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = (("time without the task / with it", (1, "1 image a request"),
               (2, "16 images a request")),
              ("milliseconds", (3, "adding a task"), (4, "solving")),
              ("megabytes", (5, "stored"), (6, "held by a server")))
    for axes, (title, *lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for column, label in lines:
            axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-", label=label)
        axes.set(xlabel="tasks of five classes", ylabel=title, ylim=0)
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
