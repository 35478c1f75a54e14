"""A benchmark as one self-contained HTML page: findings, table, charts, tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.benchmarks.catalogue import expected, find_benchmark
from partialhn.benchmarks.comparison import Row, rows
from partialhn.errors import InputError
from partialhn.networks.table import cut_unit
from partialhn.numbers import date, percent, points
from pipelines.benchmarks import findings
from pipelines.benchmarks.plots import Panel, colours, panel_svg, panels
from pipelines.benchmarks.table import table_columns, verdict
from pipelines.report.charts import escape
from pipelines.report.html import data_table, facts_list, figure, page, pair, section

KEPT = ("label", "strategy", "depth", "seed", "acc", "learning_accuracy", "forgetting",
        "accuracy_matrix", "bytes_per_task", "cpu_seconds", "feature_bytes", "tasks", "task_shift",
        "forecast_kept", "class_incremental")
"""The fields of a cell that the page needs; `result.json` holds them."""


def kept_fields(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a cell for `result.json`; cells of version 0.1.0 lack the last one."""
    return {key: cell[key] for key in KEPT if key in cell}


SETTINGS = (("tasks", "data", "tasks"), ("images a class", "data", "images_per_class"),
            ("input size", "data", "input_size"), ("network", "backbone", "backbone"),
            ("trunk epochs", "backbone", "trunk_epochs"), ("views", "features", "views"),
            ("epochs a task", "train", "epochs"), ("rehearsal memory, images", "train", "buffer"))


def benchmark_page(result: Mapping[str, Any]) -> str:
    """The page of a `result.json` that `reproduce` wrote.

    Raises: InputError for anything else.
    """
    try:
        cells, config, name, size = (result[key] for key in ("cells", "config", "pack", "size"))
        table = rows(cells, expected(name, size))
        own, unit = config["backbone"]["freeze_depth"], cut_unit(config["backbone"]["backbone"])
        tasks = findings.task_rows(cells)
        parts = [_header(result, table),
                 _findings(_answers(table, cells, tasks, own, unit)),
                 _table(table, unit, cells), _drawings(table, panels(table, cells, own, unit)),
                 _tasks(tasks, findings.depths_of(cells), chance_of(cells)),
                 _provenance(result, table)]
    except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        raise InputError(f"the result cannot be shown as a benchmark ({error!r}); allowed: a "
                         "result.json that reproduce wrote, with this version") from error
    return page(f"{name}, {size} – comparison", parts)


def _answers(table: Sequence[Row], cells: Sequence[Mapping[str, Any]],
             tasks: Sequence[findings.TaskRow], own: int,
             unit: str) -> list[tuple[str, list[str]]]:
    """Questions with their answers; a question without an answer is left out."""
    answers = [
        ("How deep can the trunk be frozen, and how much accuracy is lost?",
         [findings.how_deep(cells, unit), findings.forecast_order(cells)]),
        ("Why?", [findings.why(tasks, findings.depths_of(cells), unit)]),
        ("What is the effect of corrupted images?", [findings.noise(cells, own, unit)]),
        ("Which strategies are better than the hypernetwork? (paired by seed, 95 %)",
         findings.against(table))]
    return [(question, [each for each in texts if each]) for question, texts in answers
            if any(texts)]


def chance_of(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    """Accuracy of guessing on every task."""
    return [1 / len(task["classes"]) for task in cells[0]["tasks"]]


def _header(result: Mapping[str, Any], table: Sequence[Row]) -> str:
    name, size, cells = result["pack"], result["size"], result["cells"]
    tasks, seeds = len(cells[0]["tasks"]), len({cell["seed"] for cell in cells})
    meta = [f"{tasks} tasks", f"{len({row.label for row in table})} strategies",
            f"{seeds} seed{'s' * (seeds > 1)}", f"{len(cells)} streams learned",
            *([found] if (found := date(result.get("finished"))) else [])]
    return ('<header><p class="over">partialhn · comparison of strategies</p>'
            f"<h1>{escape(name)}, {escape(size)}</h1>"
            f'<p class="meta">{escape(" · ".join(meta))}</p></header>')


def _findings(questions: Sequence[tuple[str, Sequence[str]]]) -> str:
    html = "".join(f"<h3>{escape(question)}</h3>"
                   + ("".join(f"<p>{escape(each)}</p>" for each in answers))
                   for question, answers in questions)
    return f'<div class="verdict good"><h2>Findings</h2>{html}</div>'


def _table(table: Sequence[Row], unit: str, cells: Sequence[Mapping[str, Any]]) -> str:
    chance_T = chance_of(cells)
    heads, lines = table_columns(table, unit, sum(chance_T) / len(chance_T))
    several = any(row.acc.low is not None for row in table)
    return section("Every strategy at every depth",
                   "Accuracy is the mean over all tasks at the end of the stream, with the "
                   "task given. " + ("± is half of a 95 % interval over seeds." if several else
                                     "One seed was run, so there are no intervals."),
                   data_table([escape(head) for head in heads],
                              [[escape(cell) for cell in line] for line in lines], "stack broad"))


def _drawings(table: Sequence[Row], charts: Sequence[Panel]) -> str:
    key = "".join(f'<li><i style="background:{colour}"></i>{escape(label)}</li>'
                  for colour, label in colours(table))
    drawn = [figure(chart.title, panel_svg(chart), chart.caption) for chart in charts]
    return section("Charts", "Each strategy has one colour in all charts.",
                   f'<ul class="key">{key}</ul>', pair(*drawn[:2]), pair(*drawn[2:]))


def _tasks(tasks: Sequence[findings.TaskRow], depths: Sequence[int],
           chance_T: Sequence[float]) -> str:
    heads = ["task", "images", "shift from the first", "guessing",
             *(f"accuracy, depth {depth}" for depth in depths), "loss by depth, points"]
    lines = [[escape(row.name), "as they are" if row.transform == "none" else
              escape(row.transform), percent(row.shift, 0), percent(chance),
              *map(percent, row.accuracy), points(row.lost)]
             for row, chance in zip(tasks, chance_T, strict=True)]
    return section("Task by task",
                   "The hypernetwork's accuracy right after each task. “Shift from the "
                   "first”: the share of the variance of a task's features outside of the "
                   "directions that hold 90 % of the variance of the first task's features, which "
                   "the trunk was trained on.", data_table(heads, lines, "stack broad"))


def _provenance(result: Mapping[str, Any], table: Sequence[Row]) -> str:
    config = result["config"]
    facts = [(name, str(config[part][key])) for name, part, key in SETTINGS]
    seeds = len({cell["seed"] for cell in result["cells"]})
    usual = find_benchmark(result["pack"]).sizes[result["size"]].seeds
    command = (f"partialhn reproduce {result['pack']} --data IMAGES --size {result['size']}"
               + f" --seeds {seeds}" * (seeds != usual))
    return section("Provenance", verdict(table).capitalize() + ".",
                   facts_list([("command", command),
                               ("version", str(result["partialhn_version"])), *facts]))
