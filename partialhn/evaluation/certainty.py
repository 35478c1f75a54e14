"""How sure a measured accuracy is: 95 % intervals that count the images and the seeds behind it.

An accuracy is measured on a sample of images, and under a few seeds. Both make it uncertain:

    half width^2 = z^2 * (variance through the images) + t^2 * (variance over seeds) / seeds

with z of the normal distribution and t of Student's. The variance of one task's accuracy p on n
images is that of Agresti and Coull (1998), p' (1 - p') / (n + 4) with p' = (n p + 2) / (n + 4), so
that it is not zero where every answer is right.

Legend: S seeds, T tasks, N images of one task.
"""

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from partialhn.evaluation.intervals import CONFIDENCE, student_quantile

Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
MOST_SEEDS = 1000
"""The search for a sufficient number of seeds ends here."""
Rows = Sequence[Sequence[float]]
"""rows_ST: accuracy, 0 to 1, of every task under every seed."""
Answers = Sequence[Sequence[npt.NDArray[np.bool_]]]
"""For every seed and task: which images got the right class (N)."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean accuracy, or a difference of two, with its 95 % interval; shares of 1."""

    mean: float
    values: tuple[float, ...]
    """The value under each seed."""
    image_variance: float
    """Variance of the mean through the finite number of images."""
    images: int
    """Images of all tasks that it was measured on."""

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return math.sqrt(self._image_part() + self._seed_part(len(self.values)))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    @property
    def tells(self) -> bool:
        """Whether the interval leaves out zero: the images and seeds are enough to tell."""
        return abs(self.mean) > self.half

    def more_images(self) -> int | None:
        """Images, beside those measured, with which this mean would leave out zero.

        None where no number of them would: the seeds alone leave the doubt.
        """
        left = self.mean**2 - self._seed_part(len(self.values))
        if left <= 0:
            return None
        return max(0, math.floor(self.images * self._image_part() / left) + 1 - self.images)

    def more_seeds(self) -> int | None:
        """Seeds, beside those run, with which this mean would leave out zero.

        None where no number of them would (the images alone leave the doubt), and for one seed,
        which does not show how much seeds differ.
        """
        left = self.mean**2 - self._image_part()
        if left <= 0 or len(self.values) < 2:
            return None
        for seeds in range(len(self.values), MOST_SEEDS):
            if self._seed_part(seeds) < left:
                return seeds - len(self.values)
        return None

    def more_of_both(self) -> tuple[int, int] | None:
        """Images and seeds, beside those measured and in the same proportion, with which this mean
        would leave out zero; for one seed, images alone. None where `MOST_SEEDS` do not suffice.
        """
        for seeds in range(len(self.values), MOST_SEEDS):
            share = len(self.values) / seeds
            if share * self._image_part() + self._seed_part(seeds) < self.mean**2:
                images = math.ceil(self.images / share)
                return images - self.images, seeds - len(self.values)
        return None

    def fields(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high,
                "values": list(self.values), "images": self.images}

    def _image_part(self) -> float:
        return Z**2 * self.image_variance

    def _seed_part(self, seeds: int) -> float:
        if len(self.values) < 2:
            return 0.0
        return student_quantile(seeds - 1)**2 * float(np.var(self.values, ddof=1)) / seeds


def share_interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share of so many images that is right (Wilson 1927)."""
    spread = Z**2 / images
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt((share * (1 - share) + spread / 4) / images) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_accuracy(rows_ST: Rows, images_T: Sequence[int]) -> Estimate:
    """The mean over tasks and seeds, from accuracies on `images_T` images of each task."""
    table_ST = np.array(rows_ST, dtype=np.float64)
    return _estimate(table_ST, _image_variance(table_ST.mean(0), images_T), images_T)


def difference(ours_ST: Rows, theirs_ST: Rows, images_T: Sequence[int],
               ours: Answers | None = None, theirs: Answers | None = None) -> Estimate:
    """Ours minus theirs, paired by seed, on the same images.

    ours, theirs: the answers to every image, which show how far the two err on the same images.
    Without them the two are taken as if each had images of its own, so the interval is too wide
    rather than too narrow.
    """
    ours_table, theirs_table = (np.array(rows, dtype=np.float64) for rows in (ours_ST, theirs_ST))
    if ours is not None and theirs is not None:
        variance = _paired_variance(ours, theirs)
    else:
        variance = sum(_image_variance(table.mean(0), images_T)
                       for table in (ours_table, theirs_table))
    return _estimate(ours_table - theirs_table, variance, images_T)


def _estimate(table_ST: npt.NDArray[np.float64], image_variance: float,
              images_T: Sequence[int]) -> Estimate:
    return Estimate(float(table_ST.mean()), tuple(map(float, table_ST.mean(1))),
                    float(image_variance), int(sum(images_T)))


def _image_variance(share_T: npt.NDArray[np.float64], images_T: Sequence[int]) -> float:
    count_T = np.array(images_T, dtype=np.float64)
    share_T = (share_T * count_T + 2) / (count_T + 4)
    return float((share_T * (1 - share_T) / (count_T + 4)).sum() / len(count_T)**2)


def _paired_variance(ours: Answers, theirs: Answers) -> float:
    variances = []
    for task in range(len(ours[0])):
        ahead_N = (np.mean([answers[task] for answers in ours], 0, dtype=np.float64)
                   - np.mean([answers[task] for answers in theirs], 0, dtype=np.float64))
        # two images more, one for each side, so that equal answers to few images prove nothing
        ahead_N = np.concatenate([ahead_N, [1.0, -1.0]])
        variances.append(float(np.var(ahead_N)) / len(ahead_N))
    return sum(variances) / len(variances)**2
