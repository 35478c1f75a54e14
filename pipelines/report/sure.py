"""Words for how sure a number is: its interval, and the images or seeds that are missing."""

from partialhn.evaluation.certainty import MOST_SEEDS, Estimate
from partialhn.numbers import in_points, percent, points

LEVEL = 0.0005
"""A smaller difference is none that a page shows."""
MOST = 1_000_000
"""More images than these are not counted out."""


def interval_in_percent(low: float, high: float) -> str:
    """95 % interval of an accuracy, which is never below 0 or above 100 %."""
    return f"95 % interval {percent(max(0.0, low))} to {percent(min(1.0, high))}"


def told(estimate: Estimate, images: str) -> str:
    """The size of a difference, whatever its sign, with its interval and what it leaves open.

    images: a name of the images that were counted, such as held-out images.
    """
    left, size = missing(estimate, images), abs(estimate.mean)
    low, high = max(-1.0, size - estimate.half), min(1.0, size + estimate.half)
    return (f"{in_points(size)} (95 % interval {points(low)} to {points(high)}"
            + (f"; {left})" if left else ")"))


def missing(estimate: Estimate, images: str) -> str:
    """The images or seeds that would tell a difference from none; empty where it is told.

    images: as in `told`.
    """
    if estimate.tells:
        return ""
    if abs(estimate.mean) < LEVEL:
        return "no difference was measured"
    ways = []
    more_images, more_seeds = estimate.more_images(), estimate.more_seeds()
    if more_images is not None:
        ways.append(f"{more_images:,} more {images}" if more_images <= MOST else
                    f"more than {MOST:,} {images}")
    if more_seeds:
        ways.append(f"{more_seeds} more seed{'s' * (more_seeds > 1)}")
    if not ways and (both := estimate.more_of_both()):
        ways.append(f"{both[0]:,} more {images} together with {both[1]} more seeds")
    if not ways:
        return f"too few to tell, and more than {MOST_SEEDS} seeds would be needed"
    return f"too few to tell: {' or '.join(ways)} would"
