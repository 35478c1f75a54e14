"""Doubts about a learned task that a user must read: near guessing, or below ridge regression."""

import math

from partialhn.evaluation.certainty import difference
from partialhn.numbers import percent

CLEARLY = 2.0
"""Standard errors beyond which an accuracy is not that of guessing."""


def doubts(accuracy: float, images: int | None, classes: int, held_out: float | None = None,
           ridge: float | None = None, held_out_images: int | None = None) -> tuple[str, ...]:
    """Sentences about one task; none where all is well.

    Args:
        accuracy: share of the test images that are right, 0 to 1.
        images: number of test images; None if that is not known.
        classes: number of the task's classes; guessing is right for one image in so many.
        held_out: accuracy of the task on its held-out images.
        ridge: accuracy of ridge regression on them.
        held_out_images: number of held-out images.
    """
    chance, found = 1 / max(classes, 1), []
    spread = math.sqrt(chance * (1 - chance) / images) if images else 0.0
    if classes > 1 and accuracy < chance + max(CLEARLY * spread, 0.1 * (1 - chance)):
        found.append(f"its accuracy of {percent(accuracy)} is close to guessing "
                     f"({percent(chance)}): do not use it; it needs more images or "
                     "more steps (leave out --epochs and --trunk-epochs, or raise --min-steps and "
                     "--trunk-min-steps)")
    if held_out is not None and ridge is not None and held_out_images:
        ahead = difference([[ridge]], [[held_out]], [held_out_images])
        if ahead.mean > 0 and ahead.tells:
            found.append("ridge regression, which needs no training, is right for "
                         f"{percent(ridge)} of its held-out images, this head for "
                         f"{percent(held_out)}: train it longer, or leave out --epochs and "
                         "--closed-form")
    return tuple(found)
