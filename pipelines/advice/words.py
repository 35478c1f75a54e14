"""The recommendation in plain sentences; every number in them comes from a record.

A difference is told with its 95 % interval, and where that holds zero, with what would tell it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.evaluation.certainty import Estimate
from partialhn.numbers import in_points, percent, size
from pipelines.advice.decide import DepthResult
from pipelines.advice.held_out import HeldOut
from pipelines.report.sure import LEVEL, interval_in_percent, missing, told
from pipelines.search.depths import Depths

IMAGES = "held-out images"


def reason(results: Sequence[DepthResult], chosen: DepthResult, shifts: Mapping[str, float],
           depths: Depths, held_out: HeldOut) -> str:
    """The reason for this depth: the accuracy it loses, the time it saves, the bytes it needs, and
    the cost of the next deeper one.
    """
    best = max(results, key=lambda each: each.accuracy.mean)
    subject = f"Freezing {depths.freezing(chosen.depth)}"
    needs = f"needs {size(chosen.runs[0].feature_bytes)} of stored features"
    deeper = _deeper(results, chosen, shifts, depths, held_out)
    if chosen is best:
        first = (f"{subject} has the best accuracy that was measured, "
                 f"{percent(chosen.accuracy.mean)}, and {needs}.")
        return f"{first} {_shallower(results, chosen, depths, held_out)}{deeper}".strip()
    faster = best.seconds / chosen.seconds
    speed = (f"trains {faster:.1f} times faster" if faster >= 1.05 else
             f"trains {1 / faster:.1f} times slower" if faster <= 0.95 else "trains as fast")
    lost = held_out.ahead(best, chosen)
    first = (f"{subject} loses {told(lost, IMAGES)} against the most accurate depth (freezing "
             f"{depths.freezing(best.depth)}), {speed} and {needs}.")
    return f"{first} {deeper}".strip()


def _shallower(results: Sequence[DepthResult], chosen: DepthResult, depths: Depths,
               held_out: HeldOut) -> str:
    """The cost of the next shallower depth that was compared, for the most accurate depth."""
    above = [each for each in results if each.depth < chosen.depth]
    if not above:
        return ""
    nearest = max(above, key=lambda each: each.depth)
    ratio, ahead = nearest.seconds / chosen.seconds, held_out.ahead(chosen, nearest)
    subject = (f"One {depths.unit} less" if nearest.depth == chosen.depth - 1 else
               f"Freezing {depths.freezing(nearest.depth)}")
    takes = f"takes {ratio:.1f} times as long to train and " if ratio >= 1.05 else ""
    return f"{subject} {takes}is {told(ahead, IMAGES)} less accurate. "


def _deeper(results: Sequence[DepthResult], chosen: DepthResult, shifts: Mapping[str, float],
            depths: Depths, held_out: HeldOut) -> str:
    """The accuracy that the next deeper depth costs, and the task that loses most."""
    below = [each for each in results if each.depth > chosen.depth]
    if not below:
        return "No deeper depth was compared." if chosen.depth < depths.deepest else ""
    nearest = min(below, key=lambda each: each.depth)
    loss = held_out.ahead(chosen, nearest)
    subject = f"Going deeper (freezing {depths.freezing(nearest.depth)})"
    if loss.mean <= LEVEL:
        gains = "" if loss.mean > -LEVEL else f" (it is {told(loss, IMAGES)} ahead)"
        return (f"{subject} would lose no measurable accuracy{gains}, but does not serve the "
                "objective better.")
    text = f"{subject} costs {told(loss, IMAGES)}"
    tasks, losses = chosen.runs[0].tasks, held_out.ahead_by_task(chosen, nearest)
    worst = max(range(len(tasks)), key=lambda index: losses[index].mean)
    if not loss.tells or not losses[worst].tells:
        return text + "."
    text += f", most on task {tasks[worst]!r} ({in_points(losses[worst].mean)})"
    if not shifts or max(shifts, key=lambda task: shifts[task]) != tasks[worst]:
        return text + "."
    return text + (", which differs most from the first: "
                   f"{percent(shifts[tasks[worst]], 0)} of the variance of its features lies "
                   "outside that of the first task.")


def preferred(chosen: DepthResult, first: int, margin: float, depths: Depths) -> str:
    """The reason for a cheaper depth than the one with the best value; empty for the same one."""
    if chosen.depth == first:
        return ""
    return (f"Freezing {depths.freezing(first)} is ahead by less than the 95 % margin of the seeds "
            f"({in_points(margin)}), so the cheaper depth is recommended.")


def sure(chosen: DepthResult, votes: Mapping[int, int], depths: Depths, held_out: HeldOut) -> str:
    """How certain the recommendation is: its accuracy above chance, and what it rests on."""
    found, above = held_out.accuracy(chosen), held_out.above_chance(chosen)
    seeds = len(found.values)
    text = (f"Its held-out accuracy is {percent(found.mean)} "
            f"({interval_in_percent(found.low, found.high)}), "
            f"{_above(above)} guessing ({percent(held_out.chance)}), on {held_out.images:,} "
            f"held-out images and {seeds} seed{'s' * (seeds > 1)}.")
    left = missing(above, IMAGES)
    text += f" Whether it is better than guessing: {left}." if left else ""
    if not chosen.finals:
        return text + (" There are no final runs yet, so it is not known how much the result "
                       "depends on the seed.")
    if sum(votes.values()) < 2:
        return text + (" One seed does not show how much the result depends on the seed; --seeds 3 "
                       "would.")
    return f"{text} {_votes(chosen, votes, depths)}"


def _above(above: Estimate) -> str:
    return f"{in_points(abs(above.mean))} {'above' if above.mean >= 0 else 'below'}"


def _votes(chosen: DepthResult, votes: Mapping[int, int], depths: Depths) -> str:
    seeds, agree = sum(votes.values()), votes.get(chosen.depth, 0)
    if agree == seeds:
        return f"Each seed alone recommends the same depth ({agree} of {seeds})."
    others = ", ".join(f"{count} {depths.freezing(depth)}" for depth, count in sorted(votes.items())
                       if depth != chosen.depth)
    return (f"{agree or 'None'} of the {seeds} seeds alone recommend{'s' * (agree == 1)} the same "
            f"depth (the others: freeze {others}).")


def beside_separate_heads(chosen: DepthResult, held_out: HeldOut) -> str:
    """The accuracy that sharing one generator costs against a separate head for each task."""
    lost = held_out.behind_heads(chosen)
    if lost is None:
        return ""
    own, baseline = chosen.runs[0], chosen.baselines[0].measured
    assert baseline is not None
    where = ("is level" if abs(lost.mean) < LEVEL else
             f"is {told(lost, IMAGES)} {'behind' if lost.mean > 0 else 'ahead'}")
    return (f"Against one separate head a task, which stores {size(baseline.bytes_per_task)} "
            f"a task instead of {size(own.bytes_per_task)}, it {where}.")


def beside_ridge(results: Sequence[DepthResult], chosen: DepthResult,
                 ridge: Mapping[str, float], held_out: HeldOut) -> str:
    """The depths at which ridge regression, which needs no training, is the better choice, and how
    its best depth compares with the recommended one.

    ridge: its held-out accuracy by depth.
    """
    gaps = {each.depth: held_out.ridge_ahead(each, ridge[str(each.depth)]) for each in results
            if str(each.depth) in ridge}
    if not gaps:
        return ""
    name = "Plain ridge regression on pooled features"
    wins = {tells: " and ".join(f"at depth {depth} by {told(gap, IMAGES)}"
                                for depth, gap in gaps.items()
                                if gap.mean >= LEVEL and gap.tells is tells)
            for tells in (True, False)}
    where = "; it ".join(f"{verb} better {wins[tells]}" for tells, verb in
                         ((True, "is"), (False, "may be")) if wins[tells])
    if not where:
        nearest = max(gaps, key=lambda depth: gaps[depth].mean)
        return (f"{name} is nowhere better; it is nearest at depth {nearest}, "
                f"{told(gaps[nearest], IMAGES)} behind.")
    return (f"{name} (--strategy ridge), which needs no training, {where}. "
            + _best_ridge(chosen, ridge, held_out))


def _best_ridge(chosen: DepthResult, ridge: Mapping[str, float], held_out: HeldOut) -> str:
    depth = max(ridge, key=lambda depth: (ridge[depth], int(depth)))
    ahead = held_out.ridge_ahead(chosen, ridge[depth])
    where = ("level with" if abs(ahead.mean) < LEVEL else
             f"{told(ahead, IMAGES)} {'ahead of' if ahead.mean > 0 else 'behind'}")
    return f"At its best, depth {depth}, it is {where} the recommendation."


def search_value(estimate: Mapping[str, Any] | None, noise: float | None) -> str:
    """Whether more trials are likely to improve the accuracy."""
    if estimate is None:
        return "There are too few trials at this depth to estimate what more would gain."
    text = (f"The search ran {estimate['trials']:.0f} trials at this depth. The last doubling of "
            f"their number gained {in_points(estimate['last_doubling'])} on average; another "
            f"doubling is expected to gain {in_points(estimate['next_doubling'])}")
    if noise is None:
        return text + "."
    worth = estimate["next_doubling"] > noise
    return text + (f", {'more' if worth else 'no more'} than the standard deviation over seeds "
                   f"({in_points(noise)}): {'more search may help' if worth else 'stop here'}.")
