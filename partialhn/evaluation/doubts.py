"""Doubts about a learned task that a user must read: a loss that rose, an accuracy near guessing
from the start or by forgetting, or one below ridge regression.
"""

import math
from collections.abc import Sequence

from partialhn.evaluation.certainty import difference
from partialhn.numbers import percent

CLEARLY = 2.0
"""Standard errors beyond which an accuracy is not that of guessing."""
DIVERGED = 2.0
"""Multiple of the loss of guessing above which a loss that rose has diverged."""
DIVERGED_AT_ONCE = 10.0
"""The same for a loss that did not rise, because it diverged within the first epoch."""


def doubts(accuracy: float, images: int | None, classes: int, held_out: float | None = None,
           ridge: float | None = None, held_out_images: int | None = None,
           losses: Sequence[float] = (), learning_rate: float | None = None,
           now: float | None = None) -> tuple[str, ...]:
    """Sentences about one task; none where all is well.

    Args:
        accuracy: share of the test images that were right when the task was learned, 0 to 1.
        images: number of test images; None if that is not known.
        classes: number of the task's classes; guessing is right for one image in so many.
        held_out: accuracy of the task on its held-out images.
        ridge: accuracy of ridge regression on them.
        held_out_images: number of held-out images.
        losses: cross entropy of each epoch of its training, oldest first; none for a task that was
            solved in closed form, which more steps cannot help.
        learning_rate: the option that it was trained with; None if that is not known.
        now: the share after later tasks; None if it is the same.
    """
    chance, found = 1 / max(classes, 1), []
    more = "; it needs more images" + (
        " or more steps (leave out --epochs and --trunk-epochs, or raise --min-steps and "
        "--trunk-min-steps; retrain takes these from --config)") * bool(losses)
    longer = (": train it longer, or leave out --epochs and --closed-form (retrain takes these "
              "from --config)")
    if course := _diverged(losses, math.log(max(classes, 1))):
        rate = "" if learning_rate is None else f" of {learning_rate:g}"
        found.append(f"{course}: the learning rate{rate} is too high; train it with a lower "
                     "--learning-rate (retrain takes it from --config)")
        more = longer = ""  # what diverges gets worse with every step
    spread = math.sqrt(chance * (1 - chance) / images) if images else 0.0
    near = chance + max(CLEARLY * spread, 0.1 * (1 - chance))
    if classes > 1 and accuracy < near:
        found.append(f"its accuracy of {percent(accuracy)} is close to guessing "
                     f"({percent(chance)}): do not use it{more}")
    elif classes > 1 and now is not None and now < near:
        found.append(f"its accuracy fell from {percent(accuracy)} when it was learned to "
                     f"{percent(now)}, which is close to guessing ({percent(chance)}), while later "
                     "tasks were learned: do not use it")
    if held_out is not None and ridge is not None and held_out_images:
        ahead = difference([[ridge]], [[held_out]], [held_out_images])
        if ahead.mean > 0 and ahead.tells:
            found.append("ridge regression, which needs no training, is right for "
                         f"{percent(ridge)} of its held-out images, this head for "
                         f"{percent(held_out)}{longer}")
    return tuple(found)


def _diverged(losses: Sequence[float], guessing: float) -> str:
    """How the loss went, in words; empty where it did not diverge. guessing: its loss."""
    if not losses or not guessing:
        return ""
    first, last = losses[0], losses[-1]
    if last > max(first, DIVERGED * guessing):
        return f"its loss rose from {_loss(first)} in its first epoch to {_loss(last)} in its last"
    if last > DIVERGED_AT_ONCE * guessing:
        return f"its loss in its last epoch is {_loss(last)}, that of guessing {_loss(guessing)}"
    return ""


def _loss(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
