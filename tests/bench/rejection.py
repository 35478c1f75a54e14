"""Scores that tell images of no known task, on the features that the detector sees of an image.

    python tests/bench/rejection.py --preset pretrained-tiny-imagenet --data TINY_IMAGENET_32 \
        --far CIFAR10 --epochs 2 --work FOLDER

Learns the preset's stream (what an earlier call of this or of detectors.py has learned in the
folder is not learned again), and prints a Markdown table of AUROC, a score a row. `held out`: each
task but the last is the stranger once, its held-out images beside those of the others (the mean):
scores are chosen by this column. The other columns have test images of all tasks but the last as
the known ones; strangers are those of the last task (near), CIFAR-10's vehicles and animals, digits
of scikit-learn, drawn strokes, noise, and known images that are noisy, blurred or inverted. `both
known` is the bound of a classifier that was trained with the last task's images too.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from detectors import Learned, open_run
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


def unit(x_ND):
    return torch.nn.functional.normalize(x_ND, dim=1)


class Scores:
    """Scores fitted on the images of some tasks; every method gives strangeness (B,) of h_BD."""

    def __init__(self, learned, places, own):
        parts = [learned.images(place, "train") for place in places]
        starts = np.cumsum([0, *(learned.classes[place] for place in places)])
        self.h_ND = torch.cat([h_ND for h_ND, _ in parts])
        self.y_N = torch.cat([y_N + start for (_, y_N), start in zip(parts, starts, strict=False)])
        self.mean_MD = torch.stack([self.h_ND[self.y_N == y].mean(0) for y in range(starts[-1])])
        centred_ND = self.h_ND - self.mean_MD[self.y_N]
        scatter_DD = (centred_ND.T @ centred_ND).double()
        kept = [learned.images(place, "validation") for place in places]
        rows = [spread_over(len(y_N), KEPT) for _, y_N in kept]
        sample_SD = torch.cat([h_ND[row] for (h_ND, _), row in zip(kept, rows, strict=True)])
        sample_y_S = torch.cat([y_N[row] + start for (_, y_N), row, start
                                in zip(kept, rows, starts, strict=False)])
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

    def all(self):
        fitted = self.fitted
        return {
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
            "whitened cosine and density (detector)": fitted.strangeness}


@torch.no_grad()
def table(learned, far):
    """AUROC by score and column."""
    last, own = len(learned.tasks) - 1, learned.seen.own
    everyone = range(last)
    rows = {}
    for stranger in everyone:
        places = [place for place in everyone if place != stranger]
        for name, score in Scores(learned, places, own).all().items():
            known = torch.cat([score(learned.images(place, "validation")[0]) for place in places])
            found = auroc(known, score(learned.images(stranger, "validation")[0]))
            rows.setdefault(name, [0.0])[0] += found / last
    tests = [learned.tasks[place].test for place in everyone]
    experiences = learned.run.experiences
    files = [experiences[place].test.take(np.arange(0, len(tests[place]), 20)).read()
             for place in everyone]
    strangers = {"near": learned.images(last, "test")[0]}
    data = learned.run.config.data
    for name, images in stranger_images([each for some in files for each in some], far).items():
        decoded = decode_images(images, list(map(str, range(len(images)))), data.input_size,
                                pixels=learned.run.cut.trunk.pixels)
        strangers[name] = learned.seen(run_trunk(learned.run.cut.trunk, decoded.images_BCHW))
    for name, score in Scores(learned, everyone, own).all().items():
        known = torch.cat([score(learned.images(place, "test")[0]) for place in everyone])
        rows[name] += [auroc(known, score(h_BD)) for h_BD in strangers.values()]
    both = Scores(learned, range(last + 1), own)
    first = sum(learned.classes[:last])
    share = lambda h_BD: both.logits(h_BD).softmax(1)[:, first:].sum(1)  # noqa: E731
    known = torch.cat([share(learned.images(place, "test")[0]) for place in everyone])
    rows["both known"] = [float("nan"), auroc(known, share(strangers["near"]))]
    return ["held out", *strangers], rows


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
