"""Statistics over seeds: mean, 95 % interval, and the paired difference of two strategies."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from partialhn.errors import InputError

CONFIDENCE = 0.95


def student_quantile(freedom: int) -> float:
    """Half the width of the 95 % interval of Student's t with so many degrees of freedom."""
    from scipy.special import stdtrit  # SciPy takes a second to import, and few processes need it

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); a single value has no interval."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> "Interval":
        """The interval of some values, at least one."""
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return Interval(mean, None, None, tuple(values))
        spread = math.sqrt(sum((value - mean)**2 for value in values) / (count - 1) / count)
        half = student_quantile(count - 1) * spread
        return Interval(mean, mean - half, mean + half, tuple(values))

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """The interval of ours minus theirs, paired by seed, so that the variance both share cancels.

    Raises: InputError when the seeds are not the same.
    """
    if ours.keys() != theirs.keys() or not ours:
        raise InputError(f"seeds are {sorted(ours)} and {sorted(theirs)}; allowed: the same seeds, "
                         "at least one")
    return Interval.of([ours[seed] - theirs[seed] for seed in sorted(ours)])
