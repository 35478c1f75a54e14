"""The recommendation in plain sentences; every number in them comes from a record."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.advice.decide import DepthResult
from pipelines.platform.numbers import in_points, percent, size
from pipelines.search.depths import Depths


def reason(results: Sequence[DepthResult], chosen: DepthResult,
           shifts: Mapping[str, float], depths: Depths) -> str:
    """The reason for this depth: the accuracy it keeps, the time it saves, the bytes it needs, and
    the cost of the next deeper one.
    """
    best = max(results, key=lambda each: each.accuracy.mean)
    run = chosen.runs[0]
    subject = f"Freezing {depths.freezing(chosen.depth)}"
    needs = f"needs {size(run.feature_bytes)} of stored features"
    deeper = _deeper(results, chosen, shifts, depths)
    if chosen is best:
        first = f"{subject} gives the best accuracy, {percent(chosen.accuracy.mean)}, and {needs}."
        return f"{first} {_shallower(results, chosen, depths)}{deeper}".strip()
    keeps = chosen.accuracy.mean / best.accuracy.mean
    faster = best.seconds / chosen.seconds
    speed = (f"trains {faster:.1f} times faster" if faster >= 1.05 else
             f"trains {1 / faster:.1f} times slower" if faster <= 0.95 else "trains as fast")
    first = (f"{subject} keeps {percent(keeps)} of the accuracy of the best model (freezing "
             f"{depths.freezing(best.depth)}), {speed} and {needs}.")
    return f"{first} {deeper}".strip()


def _shallower(results: Sequence[DepthResult], chosen: DepthResult, depths: Depths) -> str:
    """The cost of the next shallower depth that was compared, for the most accurate depth."""
    above = [each for each in results if each.depth < chosen.depth]
    if not above:
        return ""
    nearest = max(above, key=lambda each: each.depth)
    ratio = nearest.seconds / chosen.seconds
    if ratio < 1.05:
        return ""
    subject = (f"One {depths.unit} less" if nearest.depth == chosen.depth - 1 else
               f"Freezing {depths.freezing(nearest.depth)}")
    return f"{subject} takes {ratio:.1f} times as long to train and gains nothing. "


def _deeper(results: Sequence[DepthResult], chosen: DepthResult,
            shifts: Mapping[str, float], depths: Depths) -> str:
    """The accuracy that the next deeper depth costs, and the task that loses most."""
    below = [each for each in results if each.depth > chosen.depth]
    if not below:
        return "No deeper depth was compared." if chosen.depth < depths.deepest else ""
    nearest = min(below, key=lambda each: each.depth)
    loss = chosen.accuracy.mean - nearest.accuracy.mean
    if loss <= 0.0005:
        return (f"Going deeper (freezing {depths.freezing(nearest.depth)}) would lose no "
                "measurable accuracy, but does not serve the objective better.")
    tasks = chosen.runs[0].tasks
    losses = [a - b for a, b in zip(chosen.per_task, nearest.per_task, strict=True)]
    worst = max(range(len(tasks)), key=lambda index: losses[index])
    text = (f"Going deeper (freezing {depths.freezing(nearest.depth)}) costs {in_points(loss)}, "
            f"most on task {tasks[worst]!r} ({in_points(losses[worst])})")
    if not shifts or tasks[worst] not in shifts:
        return text + "."
    if max(shifts, key=lambda task: shifts[task]) == tasks[worst]:
        return text + (", which differs most from the first: "
                       f"{percent(shifts[tasks[worst]], 0)} of the variance of its features lies "
                       "outside that of the first task.")
    return text + "."


def preferred(chosen: DepthResult, first: int, margin: float, depths: Depths) -> str:
    """The reason for a cheaper depth than the one with the best value; empty for the same one."""
    if chosen.depth == first:
        return ""
    return (f"Freezing {depths.freezing(first)} is ahead by less than the 95 % margin of the seeds "
            f"({in_points(margin)}), so the cheaper depth is recommended.")


def sure(chosen: DepthResult, votes: Mapping[int, int], depths: Depths) -> str:
    """How certain the recommendation is."""
    seeds = sum(votes.values())
    if not seeds:
        return ("There are no final runs yet, so it is not known how much the result depends on "
                "the seed.")
    agree = votes.get(chosen.depth, 0)
    others = ", ".join(f"{count} {depths.freezing(depth)}" for depth, count in sorted(votes.items())
                       if depth != chosen.depth)
    text = (f"Each seed alone recommends the same depth ({agree} of {seeds})."
            if agree == seeds else
            f"{agree or 'None'} of the {seeds} seeds alone recommend{'s' * (agree == 1)} the same "
            f"depth (the others: freeze {others}).")
    interval = chosen.accuracy
    if interval.low is not None and interval.high is not None:
        text += (f" Over {len(interval.values)} seeds its held-out accuracy is "
                 f"{percent(interval.mean)}, 95 % interval {percent(interval.low)} to "
                 f"{percent(interval.high)}.")
    return text


def beside_separate_heads(chosen: DepthResult) -> str:
    """The accuracy that sharing one generator costs against a separate head for each task."""
    lost = chosen.lost()
    if lost is None:
        return ""
    own, baseline = chosen.runs[0], chosen.baselines[0].measured
    assert baseline is not None
    where = (f"is {in_points(lost.mean)} behind" if lost.mean > 0.0005 else
             f"is {in_points(-lost.mean)} ahead" if lost.mean < -0.0005 else "is level")
    if lost.low is not None and lost.high is not None and lost.low <= 0 <= lost.high:
        where += " (not significant over the seeds)"
    return (f"Against one separate head a task, which stores {size(baseline.bytes_per_task)} "
            f"a task instead of {size(own.bytes_per_task)}, it {where}.")


def beside_ridge(results: Sequence[DepthResult], ridge: Mapping[str, float]) -> str:
    """The depths at which ridge regression, which needs no training, is the better choice.

    ridge: its held-out accuracy by depth.
    """
    gaps = {each.depth: ridge[str(each.depth)] - each.accuracy.mean for each in results
            if str(each.depth) in ridge}
    if not gaps:
        return ""
    wins = {depth: gap for depth, gap in gaps.items() if gap > 0.0005}
    if not wins:
        nearest = max(gaps, key=lambda depth: gaps[depth])
        return ("Plain ridge regression on pooled features is nowhere better; it is nearest at "
                f"depth {nearest}, {in_points(-gaps[nearest])} behind.")
    where = " and ".join(f"at depth {depth} by {in_points(gap)}" for depth, gap in wins.items())
    return (f"Plain ridge regression on pooled features (--strategy ridge), which needs no "
            f"training, is better {where}.")


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
