"""The recommendation in plain words: every number in a sentence comes from a record."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.advice.decide import DepthResult, stage_name

GIB = 1 << 30
MIB = 1 << 20


def reason(results: Sequence[DepthResult], chosen: DepthResult,
           shifts: Mapping[str, float]) -> str:
    """Why this depth: what it keeps, saves and needs, and what one stage deeper would cost."""
    best = max(results, key=lambda each: each.accuracy.mean)
    run = chosen.runs[0]
    subject = f"Freezing {stage_name(chosen.depth)}"
    needs = f"needs {size(run.feature_bytes)} of stored features"
    if chosen is best:
        first = f"{subject} gives the best accuracy, {percent(chosen.accuracy.mean)}, and {needs}."
        return f"{first} {_shallower(results, chosen)}{_deeper(results, chosen, shifts)}".strip()
    keeps = chosen.accuracy.mean / best.accuracy.mean
    faster = best.seconds / chosen.seconds
    speed = (f"trains {faster:.1f} times faster" if faster >= 1.05 else
             f"trains {1 / faster:.1f} times slower" if faster <= 0.95 else "trains as fast")
    first = (f"{subject} keeps {percent(keeps)} of the accuracy of the best model (freezing "
             f"{stage_name(best.depth)}), {speed} and {needs}.")
    return f"{first} {_deeper(results, chosen, shifts)}".strip()


def _shallower(results: Sequence[DepthResult], chosen: DepthResult) -> str:
    """What freezing one stage less would cost, where nothing is more accurate."""
    above = [each for each in results if each.depth < chosen.depth]
    if not above:
        return ""
    nearest = max(above, key=lambda each: each.depth)
    ratio = nearest.seconds / chosen.seconds
    if ratio < 1.05:
        return ""
    return (f"One stage less takes {ratio:.1f} times as long to train and gains nothing. ")


def _deeper(results: Sequence[DepthResult], chosen: DepthResult,
            shifts: Mapping[str, float]) -> str:
    """What one stage deeper costs, and on which task most."""
    below = [each for each in results if each.depth > chosen.depth]
    if not below:
        return "No deeper depth was compared." if chosen.depth < 4 else ""
    nearest = min(below, key=lambda each: each.depth)
    loss = chosen.accuracy.mean - nearest.accuracy.mean
    if loss <= 0.0005:
        return (f"Going deeper (freezing {stage_name(nearest.depth)}) would lose nothing that "
                "shows, but does not serve the objective better.")
    tasks = chosen.runs[0].tasks
    losses = [a - b for a, b in zip(chosen.per_task, nearest.per_task, strict=True)]
    worst = max(range(len(tasks)), key=lambda index: losses[index])
    text = (f"Going deeper (freezing {stage_name(nearest.depth)}) costs {points(loss)}, most on "
            f"task {tasks[worst]!r} ({points(losses[worst])})")
    if not shifts or tasks[worst] not in shifts:
        return text + "."
    if max(shifts, key=lambda task: shifts[task]) == tasks[worst]:
        return text + (f", which differs most from the first: {shifts[tasks[worst]]:.0%} of its "
                       "features' spread lies outside that of the first task.")
    return text + "."


def preferred(chosen: DepthResult, first: int, margin: float) -> str:
    """Why a cheaper depth was taken than the one with the best value; empty for the same one."""
    if chosen.depth == first:
        return ""
    return (f"Freezing {stage_name(first)} is ahead by less than the seeds can tell apart "
            f"({points(margin)}, 95 %), so the cheaper depth is recommended.")


def sure(chosen: DepthResult, votes: Mapping[int, int]) -> str:
    """How sure the recommendation is."""
    seeds = sum(votes.values())
    if not seeds:
        return "No final runs yet, so nothing is known about how much chance there is in it."
    agree = votes.get(chosen.depth, 0)
    others = ", ".join(f"{count} {stage_name(depth)}" for depth, count in sorted(votes.items())
                       if depth != chosen.depth)
    text = (f"Each seed alone would say the same ({agree} of {seeds})." if agree == seeds else
            f"{agree or 'None'} of the {seeds} seeds alone would say the same (the others: freeze "
            f"{others}).")
    interval = chosen.accuracy
    if interval.low is not None and interval.high is not None:
        text += (f" Over {len(interval.values)} seeds its held-out accuracy is "
                 f"{percent(interval.mean)}, 95 % interval {percent(interval.low)} to "
                 f"{percent(interval.high)}.")
    return text


def beside_separate_heads(chosen: DepthResult) -> str:
    """What sharing one generator costs against one head a task."""
    lost = chosen.lost()
    if lost is None:
        return ""
    own, baseline = chosen.runs[0], chosen.baselines[0].measured
    assert baseline is not None
    where = (f"is {points(lost.mean)} behind" if lost.mean > 0.0005 else
             f"is {points(-lost.mean)} ahead" if lost.mean < -0.0005 else "is level")
    if lost.low is not None and lost.high is not None and lost.low <= 0 <= lost.high:
        where += " (within the noise of the seeds)"
    return (f"Against one separate head a task, which stores {size(baseline.bytes_per_task)} "
            f"a task instead of {size(own.bytes_per_task)}, it {where}.")


def search_value(found: Mapping[str, Any] | None, noise: float | None) -> str:
    """Whether more trials are worth their time."""
    if found is None:
        return "Too few trials at this depth to say what more would bring."
    text = (f"At this depth {found['trials']:.0f} trials were tried. The last doubling of their "
            f"number brought {points(found['last_doubling'])} on average; doubling it again can "
            f"be expected to bring {points(found['next_doubling'])}")
    if noise is None:
        return text + "."
    worth = found["next_doubling"] > noise
    return text + (f", {'more' if worth else 'no more'} than what the seed alone changes "
                   f"({points(noise)}): {'more search may pay' if worth else 'stop here'}.")


def percent(share: float) -> str:
    """0.512 -> 51.2 %."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """0.061 -> 6.1 points."""
    return f"{100 * share:.1f} points"


def size(count: float) -> str:
    """Bytes in the unit that a person would use."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if count >= 0.95 * unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"
