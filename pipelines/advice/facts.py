"""The fields of `advice.json`, from the records of a search."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

import partialhn
from partialhn.config import Config
from partialhn.evaluation.certainty import mean_accuracy
from partialhn.numbers import now
from partialhn.training.budget import TRUNK_PASSES
from pipelines.advice import words
from pipelines.advice.decide import (
    FRONT,
    DepthResult,
    agreement,
    choose,
    front,
    more_search,
    noise,
    rank_correlation,
)
from pipelines.advice.held_out import HeldOut
from pipelines.advice.money import Prices, Way, yearly
from pipelines.search.depths import Depths, find_depths
from pipelines.search.sampling import Goal, Proposals
from pipelines.search.space import Space
from pipelines.search.state import Measured, TrialRecord

FORMAT = 1
MIN_FOR_IMPORTANCE = 8


def advice_fields(settings: Mapping[str, Any], space: Space, records: Sequence[TrialRecord],
                  results: Sequence[DepthResult], goal: Goal, survey: Mapping[str, Any],
                  seconds: float) -> dict[str, Any]:
    """All fields of `advice.json`; the page is made from them alone."""
    options = settings["options"]
    depths = find_depths(Config.from_dict(settings["config"]))
    ways = _ways(settings, results, options, depths)
    cost = _costs(results, ways)
    accuracy = {each.depth: each.accuracy.mean for each in results}
    margin = noise(results)
    depth = choose(accuracy, cost, goal.objective, goal.max_loss, margin)
    first = choose(accuracy, cost, goal.objective, goal.max_loss)
    chosen = next(each for each in results if each.depth == depth)
    votes = agreement(results, cost, goal.objective, goal.max_loss)
    held_out = HeldOut.of(settings, survey)
    return {
        "format": FORMAT, "finished": now(), "name": settings["name"],
        "partialhn_version": partialhn.__version__,
        "objective": goal.objective, "max_loss": goal.max_loss, "options": dict(options),
        "tasks": settings["tasks"], "config": settings["config"], "space": settings["space"],
        "search_seconds": round(seconds, 1),
        "chance": held_out.chance, "held_out_images": list(held_out.images_T),
        "recommendation": _recommendation(results, chosen, survey, votes, bool(ways), depths,
                                          held_out) | {
            "preferred": words.preferred(chosen, first, margin, depths), "noise": margin},
        "unit": depths.unit,
        "depths": [_depth_fields(each, results, depths, held_out, survey["test_images"])
                   | {"ridge": survey["ridge"].get(str(each.depth))} for each in results],
        "front": {"costs": list(FRONT), "trials": front(records)},
        "trials": [_trial_fields(each) for each in records], "fixed": dict(space.fixed),
        "more_search": _more(records, chosen),
        "importance": _importance(space, settings, records, goal),
        "forecast": {"stages": survey["forecast"],
                     "rank_correlation": rank_correlation(survey["forecast"], results)},
        "task_shift": survey["shifts"],
        "money": _money(settings, chosen, ways, survey, options) if ways else None}


def costs(settings: Mapping[str, Any], results: Sequence[DepthResult]) -> dict[int, float]:
    """The cost of each depth: money a year where prices were given, otherwise seconds."""
    depths = find_depths(Config.from_dict(settings["config"]))
    return _costs(results, _ways(settings, results, settings["options"], depths))


def _costs(results: Sequence[DepthResult],
           ways: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """As `costs`, given the year's costs that `_ways` found."""
    return {each.depth: max(ways[each.depth]["a_year"] if ways else each.seconds, 1e-9)
            for each in results}


def _recommendation(results: Sequence[DepthResult], chosen: DepthResult,
                    survey: Mapping[str, Any], votes: Mapping[int, int],
                    priced: bool, depths: Depths, held_out: HeldOut) -> dict[str, Any]:
    best = max(results, key=lambda each: each.accuracy.mean)
    return {"depth": chosen.depth, "freeze": depths.freezing(chosen.depth),
            "trial": chosen.best.plan.id, "config_file": f"depth-{chosen.depth}.yaml",
            "params": chosen.best.plan.params, "cost": "money a year" if priced else "seconds",
            "reason": words.reason(results, chosen, survey["shifts"], depths, held_out),
            "confidence": words.sure(chosen, votes, depths, held_out),
            "separate_heads": words.beside_separate_heads(chosen, held_out),
            "ridge": words.beside_ridge(results, chosen, survey["ridge"], held_out),
            "votes": {str(depth): count for depth, count in votes.items()},
            "accuracy": held_out.accuracy(chosen).fields(),
            "above_chance": held_out.above_chance(chosen).fields(),
            "behind_best": held_out.ahead(best, chosen).fields()}


def _depth_fields(each: DepthResult, results: Sequence[DepthResult], depths: Depths,
                  held_out: HeldOut, test_images: Sequence[int]) -> dict[str, Any]:
    best = max(other.accuracy.mean for other in results)
    run, lost, heads = each.runs[0], held_out.behind_heads(each), held_out.heads(each)
    tests = [final.measured.test_row for final in each.finals
             if final.measured and final.measured.test_row is not None]
    return {
        "depth": each.depth, "freeze": depths.freezing(each.depth), "counts": dict(each.counts),
        "trial": each.best.plan.id, "params": each.best.plan.params,
        "search_accuracy": each.best.measured.accuracy if each.best.measured else None,
        "accuracy": held_out.accuracy(each).fields(), "per_task": each.per_task,
        "above_chance": held_out.above_chance(each).fields(),
        "test_accuracy": (mean_accuracy(tests, test_images).fields() if tests else None),
        "separate_heads": heads.fields() if heads else None,
        "behind_separate_heads": lost.fields() if lost else None,
        "share_of_best": each.accuracy.mean / best if best else None,
        "seconds": each.seconds, "feature_bytes": run.feature_bytes,
        "feature_seconds": run.feature_seconds, "serving_macs": run.serving_macs,
        "head_bytes": run.head_bytes, "checkpoint_bytes": run.checkpoint_bytes,
        "bytes_per_task": run.bytes_per_task}


def _trial_fields(record: TrialRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "id": record.plan.id, "kind": record.plan.kind, "status": record.status,
        "reason": record.reason, "depth": record.plan.depth, "seed": record.plan.seed,
        "params": record.plan.params, "search_seconds": round(record.search_seconds, 2)}
    measured = record.measured
    if measured is not None:
        fields |= {"accuracy": measured.accuracy, "tasks_done": len(measured.rows),
                   "per_task": list(measured.rows[-1]), "test_accuracy": measured.test_accuracy,
                   "seconds": measured.seconds}
        fields |= {name: getattr(measured, name) for name in (
            "train_seconds", "processor_seconds", "feature_bytes", "serving_macs", "head_bytes",
            "checkpoint_bytes", "bytes_per_task", "device", "epochs")}
    return fields


def _more(records: Sequence[TrialRecord], chosen: DepthResult) -> dict[str, Any]:
    """The accuracy that more trials at the recommended depth would gain."""
    trials = [each for each in records if each.plan.kind == "search"
              and each.plan.depth == chosen.depth and each.measured]
    finished = [each.measured.accuracy for each in trials if each.finished and each.measured]
    # a trial that was stopped early was no better than the worst finished one
    scores = finished + [min(finished)] * sum(each.status == "pruned" for each in trials)
    estimate = more_search(scores)
    values = chosen.accuracy.values
    noise = None
    if len(values) > 1:
        mean = chosen.accuracy.mean
        noise = (sum((value - mean)**2 for value in values) / (len(values) - 1))**0.5
    best, curve = 0.0, []
    for record in records:
        if record.plan.kind == "search" and record.finished and record.measured:
            best = max(best, record.measured.accuracy)
            curve.append([round(record.search_seconds, 1), best])
    return {"estimate": estimate, "seed_noise": noise, "best_so_far": curve,
            "words": words.search_value(estimate, noise)}


def _importance(space: Space, settings: Mapping[str, Any], records: Sequence[TrialRecord],
                goal: Goal) -> dict[str, float]:
    """Share of the variance of accuracy that each key explains (fANOVA), largest first."""
    finished = [each for each in records if each.plan.kind == "search" and each.finished]
    if len(finished) < MIN_FOR_IMPORTANCE:
        return {}
    alone = dataclasses.replace(goal, objective="accuracy", algorithm="random")
    study = Proposals(space, Config.from_dict(settings["config"]), alone, finished).study
    if len({trial.value for trial in study.trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importance = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    return {key: round(float(value), 4) for key, value in importance.items()}


# Money -----------------------------------------------------------------------------------------


def _ways(settings: Mapping[str, Any], results: Sequence[DepthResult],
          options: Mapping[str, Any], depths: Depths) -> dict[int, dict[str, Any]]:
    """A year's costs of each depth; empty where no prices were given."""
    if options["price_gpu_hour"] is None:
        return {}
    prices, count = _prices(options), len(settings["tasks"])
    return {each.depth: yearly(_way(
        f"partial hypernetwork, freezing {depths.freezing(each.depth)}", each.runs, count,
        each.accuracy.mean), prices) for each in results}


def _prices(options: Mapping[str, Any]) -> Prices:
    return Prices(options["price_gpu_hour"], options["price_gib_month"],
                  1.0 if options["tasks_a_month"] is None else options["tasks_a_month"])


def _way(name: str, runs: Sequence[Measured], tasks: int, accuracy: float) -> Way:
    run = runs[0]
    seconds = sum(each.seconds for each in runs) / len(runs)
    return Way(name, (seconds + run.feature_seconds) / tasks,
               run.feature_bytes / tasks + run.bytes_per_task, False, accuracy)


def _money(settings: Mapping[str, Any], chosen: DepthResult, ways: Mapping[int, dict[str, Any]],
           survey: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    tasks, prices = settings["tasks"], _prices(options)
    rows = [ways[chosen.depth]]
    baselines = [each.measured for each in chosen.baselines if each.measured]
    if baselines:
        accuracy = sum(each.accuracy for each in baselines) / len(baselines)
        rows.append(yearly(_way("separate heads on the same features", baselines, len(tasks),
                                accuracy), prices))
    images = sum(task["train_images"] for task in tasks) / len(tasks)
    whole = survey["whole_network"]
    epochs = settings["config"]["backbone"]["trunk_epochs"] or TRUNK_PASSES
    rows.append(yearly(Way("retrain everything", images * epochs * whole["seconds_per_image"],
                           images * whole["bytes_per_image"], True, None), prices))
    return {"prices": dataclasses.asdict(prices), "rows": rows,
            "assumes": f"A year that begins with no task and brings {prices.tasks_a_month:g} a "
                       "month; tasks like those of this stream; features kept for every task. "
                       f"Retrain everything: the whole network on all images so far, {epochs} "
                       "passes, timed on some images of the first task; its accuracy was not "
                       "measured."}
