"""The advice as one HTML page that opens without a network: charts, tables, sentences.

Text that came from outside (names of searches, tasks and keys) is escaped where it is printed; the
page's own script writes it as text, never as HTML.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from partialhn.numbers import (
    date,
    duration,
    in_points,
    percent,
    points,
    size,
)
from pipelines.report.charts import escape
from pipelines.report.html import base_css, data_table

WORDS = {"accuracy": "the most accurate depth",
         "cost": "the cheapest depth within {loss} of the most accurate",
         "balanced": "the depth with the most accuracy for its cost, where each doubling of the "
                     "cost must buy {loss}"}


def render(advice: Mapping[str, Any]) -> str:
    """The whole page of one advice."""
    here = Path(__file__).parent
    template = Template((here / "template.html").read_text(encoding="utf-8"))
    chosen = advice["recommendation"]
    supporting = [chosen["preferred"], chosen["confidence"], chosen["separate_heads"],
                  chosen["ridge"]]
    data = json.dumps(advice).replace("<", "\\u003c")  # no </script> inside the data
    return template.substitute(
        base_css=base_css(),
        title=escape(f"{advice['name']} – how deep may I freeze?"), name=escape(advice["name"]),
        meta=escape(_meta(advice)), headline=escape(_headline(chosen)),
        reason=escape(chosen["reason"]), supporting="".join(
            f'<p class="small">{escape(text)}</p>' for text in supporting if text),
        depths_lead=escape(_depths_lead(advice)), depths_label=escape(_depths_label(advice)),
        bars=escape(_bars(advice)), depths_table=_depths_table(advice),
        importance_note=escape(_importance_note(advice)),
        more=escape(advice["more_search"]["words"]), money=_money(advice),
        forecast=_forecast(advice), method=escape(_method(advice)), data=data,
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        script=(here / "page.js").read_text(encoding="utf-8"))


def _headline(chosen: Mapping[str, Any]) -> str:
    return f"Freeze {chosen['freeze']} (depth {chosen['depth']})"


def _meta(advice: Mapping[str, Any]) -> str:
    kinds = [each["kind"] for each in advice["trials"]]
    stopped = sum(each["status"] == "pruned" for each in advice["trials"])
    counts = {kind: kinds.count(kind) for kind in ("search", "final", "bound")}
    return (f"{date(advice['finished'])} · {len(advice['tasks'])} tasks · {counts['search']} "
            f"trials, {stopped} stopped early · {counts['final']} final runs, {counts['bound']} "
            f"with separate heads · {duration(advice['search_seconds'])} of search")


def _depths_lead(advice: Mapping[str, Any]) -> str:
    seeds = len(advice["recommendation"]["accuracy"]["values"])
    images = sum(advice["held_out_images"])
    return ("For each depth, its best trial run again under "
            f"{seeds} seed{'s' * (seeds > 1)} that the search did not use, on {images:,} held-out "
            f"images of all tasks. Guessing is right for {percent(advice['chance'])}. "
            f"{interval_of(advice)}. “Behind separate heads” is how much more accurate a whole "
            "head of its own for each task is. “Ridge” is the held-out accuracy of plain ridge "
            "regression on the pooled features of that depth.")


def interval_of(advice: Mapping[str, Any]) -> str:
    """Sentences about the accuracies: which doubts their intervals count, and whether the task is
    given; without the last full stop.
    """
    seeds = len(advice["recommendation"]["accuracy"]["values"])
    unknown = ("An answer is right if it is the right class among those of all tasks, since nobody "
               "says the task (--unknown-task). " if advice["options"].get("unknown_task") else "")
    return unknown + ("Intervals are 95 % over images and seeds" if seeds > 1 else
                      "Intervals are 95 % over images; with one seed, the seed is not in them")


def _bars(advice: Mapping[str, Any]) -> str:
    seeds = len(advice["recommendation"]["accuracy"]["values"])
    return ("Bars are 95 % intervals over held-out images" + " and seeds" * (seeds > 1))


def _depths_label(advice: Mapping[str, Any]) -> str:
    return "Accuracy by depth: " + ", ".join(
        f"depth {each['depth']} {percent(each['accuracy']['mean'])}" for each in advice["depths"])


def _depths_table(advice: Mapping[str, Any]) -> str:
    """Accuracies by depth, and below them costs."""
    accuracies, costs = [], []
    for each in advice["depths"]:
        test, behind, counts = each["test_accuracy"], each["behind_separate_heads"], each["counts"]
        name = f"{each['depth']} · {escape(each['freeze'])}"
        accuracies.append([name, _with_interval(each["accuracy"]),
                           _above(each["accuracy"], advice["chance"]),
                           _with_interval(test) if test else "–",
                           _points(behind) if behind else "–", percent(each["ridge"])])
        costs.append([name, duration(each["seconds"]), size(each["feature_bytes"]),
                      f"{each['serving_macs'] / 1e6:.0f} M", size(each["bytes_per_task"]),
                      f"{counts['finished']} + {counts['pruned']}"])
    accuracies.append(["Guessing", percent(advice["chance"]), "0.0", percent(advice["chance"]),
                       "–", percent(advice["chance"])])
    tables = (data_table(["Freeze", "Held-out accuracy", "Above guessing, points",
                          "Test accuracy", "Behind separate heads, points", "Ridge"], accuracies,
                         "stack")
              + data_table(["Freeze", "Training", "Features", "Serving, multiply-adds",
                            "Stored a task", "Trials + stopped"], costs, "stack"))
    marker = f'<tr><th scope="row">{advice["recommendation"]["depth"]} ·'
    return tables.replace(marker, marker.replace("<tr>", '<tr class="chosen">'))


def _with_interval(interval: Mapping[str, Any]) -> str:
    """An accuracy and its interval, which ends at 0 and 100 %, as HTML."""
    return _two_lines(percent(interval["mean"]), max(0.0, interval["low"]),
                      min(1.0, interval["high"]))


def _above(accuracy: Mapping[str, Any], chance: float) -> str:
    """An accuracy above guessing with its interval, as HTML."""
    return _two_lines(points(accuracy["mean"] - chance, signed=True),
                      max(0.0, accuracy["low"]) - chance, min(1.0, accuracy["high"]) - chance)


def _points(interval: Mapping[str, Any]) -> str:
    """A difference in points with its interval, as HTML."""
    return _two_lines(points(interval["mean"], signed=True), max(-1.0, interval["low"]),
                      min(1.0, interval["high"]))


def _two_lines(value: str, low: float, high: float) -> str:
    return f'<span>{value}<small class="range">{points(low)} to {points(high)}</small></span>'


def _importance_note(advice: Mapping[str, Any]) -> str:
    if not advice["importance"]:
        return "There are too few trials to estimate this."
    return ("Share of the variance of accuracy that each key explains (fANOVA over finished "
            "trials), for the keys that every trial has.")


def _money(advice: Mapping[str, Any]) -> str:
    money = advice["money"]
    if not money:
        return ""
    rows = [[escape(row["way"]), percent(row["accuracy"]), duration(row["retraining_seconds"]),
             price(row["retraining"]), price(row["computing_a_year"]),
             price(row["storage_a_year"]), price(row["a_year"])] for row in money["rows"]]
    table = data_table(["Way", f"Accuracy (guessing {percent(advice['chance'])})",
                        "A retraining takes", "A retraining costs", "Computing a year",
                        "Storage a year", "A year"], rows, "stack")
    prices = money["prices"]
    lead = (f"At {prices['gpu_hour']:g} an hour of the machine, {prices['gib_month']:g} a GiB and "
            f"month, and {prices['tasks_a_month']:g} new tasks a month.")
    return ('<section aria-labelledby="money-title"><h2 id="money-title">Costs</h2>'
            f"<p>{escape(lead)}</p>"
            f'{table}<p class="note">{escape(money["assumes"])} For retraining everything '
            "the last retraining of the year is shown.</p></section>")


def _forecast(advice: Mapping[str, Any]) -> str:
    measured = {each["depth"]: each["accuracy"]["mean"] for each in advice["depths"]}
    rows = [[str(stage["depth"]), percent(stage["probe_first"]), percent(stage["probe_second"]),
             f"{stage['cka_first']:.2f}", f"{stage['cka_second']:.2f}", percent(stage["kept"]),
             "yes" if stage["worth_trying"] else "doubtful",
             percent(measured.get(stage["depth"]))] for stage in advice["forecast"]["stages"]]
    guessing = [1 / len(task["classes"]) for task in advice["tasks"][:2]]
    rows.append(["Guessing", *map(percent, guessing), *["–"] * 4, percent(advice["chance"])])
    table = data_table(["Depth", "Probe, first task", "Probe, second", "CKA, first",
                        "CKA, second", "Kept", "Worth trying", "Measured"], rows, "stack")
    correlation = advice["forecast"]["rank_correlation"]
    judged = ("" if correlation is None else " Its ranks and those of the measured accuracy "
              f"correlate by {correlation:+.2f} (Spearman; 1 is the same order).")
    lead = ("The forecast uses the first two tasks alone, before any trial: the accuracy of a "
            f"linear probe on each {advice['unit']}'s features, and how much of it remains "
            + ("on a task that the trunk was not trained on"
               if advice["config"]["backbone"].get("trunk", "train") == "train" else
               "of the best one at a shallower depth") + "." + judged)
    return ('<section aria-labelledby="forecast-title"><h2 id="forecast-title">Forecast</h2>'
            f"<p>{escape(lead)}</p>"
            f"{table}</section>")


def _method(advice: Mapping[str, Any]) -> str:
    words = WORDS[advice["objective"]].format(loss=in_points(advice["max_loss"]))
    cost = advice["recommendation"]["cost"]
    return (f"Objective {advice['objective']}: {words}. The cost is measured in {cost}"
            + (" of training the stream: processor time on a CPU, where trials share the machine, "
               "and wall-clock time on a GPU" if cost == "seconds" else "")
            + ("" if advice["objective"] == "cost" else
               ". Where the difference of two depths is not significant over the seeds (95 %), the "
               "cheaper one is recommended")
            + ". All choices use held-out images; accuracy on test images "
            "was measured afterwards and is only reported. Serving cost is one prediction for a "
            "task whose head is not in memory, so it includes generating the head.")


def price(value: float) -> str:
    """An amount of money, small ones with two digits that count: 1,234.50, 0.0042."""
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"
