"""Scores that tell images of no known task, on the features that the detector sees of an image.

    python tests/bench/rejection.py --preset pretrained-tiny-imagenet --data TINY_IMAGENET_32 \
        --far CIFAR10 --epochs 2 --work FOLDER

Learns the preset's stream (what an earlier call of this or of detectors.py has learned in the
folder is not learned again), and prints a Markdown table of AUROC, a score a row. `held out`: each
task but the last is the stranger once, its held-out images beside those of the others (the mean):
scores are chosen by this column. `each`: each of all tasks is the stranger once, test images (the
mean). The other columns have test images of all tasks but the last as the known ones; strangers are
those of the last task (near), CIFAR-10's vehicles and animals, digits of scikit-learn, drawn
strokes, noise, and known images that are noisy, blurred or inverted. `both known` is the bound of a
classifier that was trained with the last task's images too. `false alarms` is the share of known
test images beyond the threshold that 5 % of the detector's kept images exceed, in the same places
as the first two columns.
"""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from detectors import Learned, open_run, plain
from PIL import Image, ImageDraw, ImageFilter

from partialhn.data.decode import decode_images
from partialhn.detector.fitted import fit
from partialhn.detector.statistics import spread_over
from partialhn.evaluation.task_inference_metrics import auroc
from partialhn.networks.trunk import run_trunk

SIDE, IMAGES, VEHICLES = 32, 200, (0, 1, 8, 9)
KEPT = 12
"""Held-out images of a task that calibrate, as the detector keeps them."""


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def strokes(index):
    image, draw = Image.new("RGB", (SIDE, SIDE), "white"), np.random.default_rng(index)
    pen = ImageDraw.Draw(image)
    for _ in range(draw.integers(2, 5)):
        pen.line([tuple(map(int, draw.integers(3, 29, 2))) for _ in range(3)], "black", 2)
    return image


def changed(image, kind, index):
    """A noisy, blurred or inverted image."""
    if kind == "blurred":
        return image.filter(ImageFilter.GaussianBlur(2))
    pixels = np.asarray(image).astype(float)
    draw = np.random.default_rng(index)
    pixels = 255 - pixels if kind == "inverted" else pixels + draw.normal(0, 50, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def stranger_images(known, far):
    """Encoded images by name. known: test images of the known tasks, as files have them."""
    from sklearn.datasets import load_digits

    table = pq.read_table(next(Path(far).glob("test*.parquet")),
                          columns=["image", "label"]).slice(0, 2 * IMAGES)
    rows = list(zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True))
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (IMAGES // 2, SIDE, SIDE, 3), dtype=np.uint8)
    opened = [Image.open(io.BytesIO(each)).convert("RGB") for each in known]
    return {"vehicles": [image["bytes"] for image, label in rows if label in VEHICLES],
            "animals": [image["bytes"] for image, label in rows if label not in VEHICLES],
            "digits": [encoded(Image.fromarray((15.9 * digit).astype(np.uint8)).resize(
                (SIDE, SIDE))) for digit in load_digits().images[:IMAGES]],
            "strokes": [encoded(strokes(index)) for index in range(IMAGES)],
            "noise": [encoded(Image.fromarray(pixels)) for pixels in noise]} | {
                kind: [encoded(changed(image, kind, index)) for index, image in enumerate(opened)]
                for kind in ("noisy", "blurred", "inverted")}


class Images(NamedTuple):
    """What a score sees of some images."""

    h_ND: torch.Tensor
    last_TNF: list
    """Features before the classifier of every task's head."""
    energy_TN: torch.Tensor
    """Energy of every head, in deviations below what it usually has on held-out images."""


class Seen:
    """The images of a learned stream, as scores see them."""

    def __init__(self, learned):
        self.learned, self.count, self.known = learned, len(learned.tasks), {}
        self.sharp_T, self.usual_T2, self.head = [], [], []
        for place in range(self.count):
            statistics = learned.statistics(place)
            self.sharp_T.append(statistics.sharpness)
            self.usual_T2.append(statistics.energy)
            self.head.append(self.own_head(place))

    def of(self, place, split):
        """Images of a task."""
        if (place, split) not in self.known:
            features = plain(getattr(self.learned.tasks[place], split))
            self.known[place, split] = self.view(self.learned.images(place, split)[0], features)
        return self.known[place, split]

    def view(self, h_ND, z_NCHW):
        last_TNF = [self.embedded(z_NCHW, place) for place in range(self.count)]
        energy_TN = []
        for last_NF, weights, sharp, usual in zip(last_TNF, self.learned.weights, self.sharp_T,
                                                  self.usual_T2, strict=True):
            logits_NK = last_NF @ weights.classifier_KF.T + weights.bias_K
            energy_TN.append((usual[0] - (sharp * logits_NK).logsumexp(1)) / usual[1])
        return Images(h_ND, last_TNF, torch.stack(energy_TN))

    def embedded(self, z_NCHW, place):
        head, weights = self.learned.strategy.head, self.learned.weights[place]
        return torch.cat([head.embed(z_BCHW, weights) for z_BCHW in z_NCHW.split(256)])

    def own_head(self, place):
        """Class means and whitenings, within and in all, of a head's own last features."""
        train = self.learned.tasks[place].train
        x_NF = rms(self.embedded(plain(train), place))
        mean_KF = torch.stack([x_NF[train.y_N == y].mean(0)
                               for y in range(self.learned.classes[place])])
        around_NF, centre_F = x_NF - mean_KF[train.y_N], x_NF.mean(0)
        return mean_KF, centre_F, whitening(around_NF), whitening(x_NF - centre_F)

    def relative(self, images, place):
        """Relative Mahalanobis distance in a head's own last features."""
        mean_KF, centre_F, inside_FF, whole_FF = self.head[place]
        x_NF = rms(images.last_TNF[place])
        return torch.cdist(x_NF @ inside_FF, mean_KF @ inside_FF).square().amin(1) - (
            (x_NF - centre_F) @ whole_FF).square().sum(1)


def rms(x_ND):
    return x_ND / x_ND.square().mean(1, keepdim=True).sqrt()


def whitening(around_NF):
    covariance_FF = (around_NF.T @ around_NF).double() / len(around_NF)
    scale = 0.1 * covariance_FF.diagonal().mean()
    shrunk_FF = covariance_FF + scale * torch.eye(len(covariance_FF))
    return torch.linalg.inv(torch.linalg.cholesky(shrunk_FF)).T.float()


def unit(x_ND):
    return torch.nn.functional.normalize(x_ND, dim=1)


class Scores:
    """Scores fitted on the images of some tasks; every method gives strangeness (N,) of images."""

    def __init__(self, seen, places, own):
        learned = seen.learned
        self.seen, self.places = seen, list(places)
        self.classes = [learned.classes[place] for place in places]
        parts = [learned.images(place, "train") for place in places]
        starts = np.cumsum([0, *self.classes])
        self.h_ND = torch.cat([h_ND for h_ND, _ in parts])
        self.y_N = torch.cat([y_N + start for (_, y_N), start in zip(parts, starts, strict=False)])
        self.mean_MD = torch.stack([self.h_ND[self.y_N == y].mean(0) for y in range(starts[-1])])
        centred_ND = self.h_ND - self.mean_MD[self.y_N]
        scatter_DD = (centred_ND.T @ centred_ND).double()
        kept = [learned.images(place, "validation") for place in places]
        self.rows = [spread_over(len(y_N), KEPT) for _, y_N in kept]
        sample_SD = torch.cat([h_ND[row] for (h_ND, _), row in zip(kept, self.rows, strict=True)])
        sample_y_S = torch.cat([y_N[row] + start for (_, y_N), row, start
                                in zip(kept, self.rows, starts, strict=False)])
        self.fitted = fit(scatter_DD, len(self.h_ND), self.mean_MD.double(), sample_SD.double(),
                          sample_y_S, own).single()
        self.within_DD = scatter_DD / len(self.h_ND)
        self.centre_D = self.mean_MD.mean(0)
        between_MD = (self.mean_MD - self.centre_D).double()
        self.total_DD = self.within_DD + between_MD.T @ between_MD / len(between_MD)
        self.outside_DR = torch.linalg.eigh(self.total_DD).eigenvectors[:, :len(self.total_DD) // 2]
        self.inside_DD, self.whole_DD = self.whitening(self.within_DD), self.whitening(
            self.total_DD)
        residual = self.residual(self.h_ND[::5]).mean()
        self.alpha = self.logits(self.h_ND[::5]).amax(1).mean() / residual
        self.few_ND = unit(self.h_ND[::2])

    def whitening(self, covariance_DD):
        scale = 0.1 * self.within_DD.diagonal().mean()
        lower_DD = torch.linalg.cholesky(covariance_DD + scale * torch.eye(len(covariance_DD)))
        return torch.linalg.inv(lower_DD).T.float()

    def logits(self, h_BD):
        fitted = self.fitted
        return fitted.sharpness * (h_BD - fitted.centre_D) @ fitted.weight_MD.T

    def residual(self, h_BD):
        return ((h_BD - self.centre_D) @ self.outside_DR.float()).norm(dim=1)

    def mahalanobis(self, h_BD):
        return torch.cdist(h_BD @ self.inside_DD, self.mean_MD @ self.inside_DD).square().amin(1)

    def asked(self, images):
        """Place in `places` of the task whose head answers: that of the likeliest task."""
        log_p = self.fitted.log_probabilities(images.h_ND).split(self.classes, dim=1)
        return torch.stack([part.logsumexp(1) for part in log_p]).argmax(0)

    def of_head(self, images, score_TN):
        return score_TN[self.asked(images), torch.arange(len(images.h_ND))]

    def energy(self, images):
        return self.of_head(images, images.energy_TN[self.places])

    def relative_there(self, images):
        return self.of_head(images, torch.stack([self.seen.relative(images, place)
                                                 for place in self.places]))

    def false_alarms(self):
        """Share of known test images beyond the detector's threshold, with the heads and without.

        The kept images are judged by their own task's head, as the detector does.
        """
        kept = [self.seen.of(place, "validation") for place in self.places]
        h_SD = torch.cat([images.h_ND[row] for images, row in zip(kept, self.rows, strict=True)])
        own_S = torch.cat([images.energy_TN[place][row] for place, images, row
                           in zip(self.places, kept, self.rows, strict=True)])
        known = [self.seen.of(place, "test") for place in self.places]
        strangeness = self.fitted.strangeness
        return [float(torch.cat([found > torch.quantile(strangeness(h_SD, head_S), 0.95)
                                 for found in strange]).float().mean())
                for head_S, strange in (
                    (own_S, [strangeness(images.h_ND, self.energy(images)) for images in known]),
                    (None, [strangeness(images.h_ND) for images in known]))]

    def all(self):
        fitted = self.fitted
        of_features = {
            "largest probability": lambda h_BD: -self.logits(h_BD).softmax(1).amax(1),
            "largest logit": lambda h_BD: -self.logits(h_BD).amax(1),
            "energy": lambda h_BD: -self.logits(h_BD).logsumexp(1),
            "Mahalanobis distance": self.mahalanobis,
            "relative Mahalanobis distance": lambda h_BD: self.mahalanobis(h_BD) - (
                (h_BD - self.centre_D) @ self.whole_DD).square().sum(1),
            "residual of the principal half": self.residual,
            "ViM": lambda h_BD: self.alpha * self.residual(h_BD) - self.logits(h_BD).logsumexp(1),
            "50th nearest image": lambda h_BD: 1 - (unit(h_BD) @ self.few_ND.T).topk(
                50, 1).values[:, -1],
            "whitened cosine": fitted._angle,
            "the trunk's density": fitted.density.distance,
            "whitened cosine and density": fitted.strangeness}
        return {name: lambda images, score=score: score(images.h_ND)
                for name, score in of_features.items()} | {
            "energy of the head that answers": self.energy,
            "relative Mahalanobis distance in that head": self.relative_there,
            "cosine, the head's energy and density (detector)": lambda images: fitted.strangeness(
                images.h_ND, self.energy(images))}


def as_strangers(seen, places, split, own):
    """AUROC by score, and false alarms, where each of the places is the stranger once."""
    rows, alarms = {}, []
    for stranger in places:
        known = [place for place in places if place != stranger]
        scores = Scores(seen, known, own)
        alarms.append(scores.false_alarms())
        for name, score in scores.all().items():
            inside = torch.cat([score(seen.of(place, split)) for place in known])
            rows.setdefault(name, []).append(auroc(inside, score(seen.of(stranger, split))))
    return {name: float(np.mean(found)) for name, found in rows.items()}, np.mean(alarms, 0)


@torch.no_grad()
def table(learned, far):
    """AUROC by score and column."""
    last, own = len(learned.tasks) - 1, learned.seen.own
    everyone, seen = range(last), Seen(learned)
    columns = [as_strangers(seen, everyone, "validation", own),
               as_strangers(seen, range(last + 1), "test", own)]
    rows = {name: [found[name] for found, _ in columns] for name in columns[0][0]}
    for place, name in enumerate(("with the head's energy", "without")):
        rows[f"false alarms {name}"] = [alarms[place] for _, alarms in columns]
    tests = [learned.tasks[place].test for place in everyone]
    experiences = learned.run.experiences
    files = [experiences[place].test.take(np.arange(0, len(tests[place]), 20)).read()
             for place in everyone]
    strangers = {"near": seen.of(last, "test")}
    data = learned.run.config.data
    for name, images in stranger_images([each for some in files for each in some], far).items():
        decoded = decode_images(images, list(map(str, range(len(images)))), data.input_size,
                                pixels=learned.run.cut.trunk.pixels)
        z_BCHW = run_trunk(learned.run.cut.trunk, decoded.images_BCHW)
        strangers[name] = seen.view(learned.seen(z_BCHW), z_BCHW)
    for name, score in Scores(seen, everyone, own).all().items():
        known = torch.cat([score(seen.of(place, "test")) for place in everyone])
        rows[name] += [auroc(known, score(images)) for images in strangers.values()]
    both = Scores(seen, range(last + 1), own)
    first = sum(learned.classes[:last])
    share = lambda h_BD: both.logits(h_BD).softmax(1)[:, first:].sum(1)  # noqa: E731
    known = torch.cat([share(learned.images(place, "test")[0]) for place in everyone])
    rows["both known"] = [np.nan, np.nan, auroc(known, share(strangers["near"].h_ND))]
    return ["held out", "each", *strangers], rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--far", required=True)
    parser.add_argument("--images-per-class", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--work", type=Path, required=True)
    chosen = parser.parse_args()
    columns, rows = table(Learned(open_run(chosen, 0)), chosen.far)
    print("| score | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, numbers in rows.items():
        cells = ["" if number != number else f"{number:.2f}" for number in numbers]
        print(f"| {name} | " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
