"""A benchmark as one self-contained HTML page: findings, table, charts, tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.benchmarks.catalogue import expected
from partialhn.benchmarks.comparison import Row, rows
from partialhn.errors import InputError
from partialhn.networks.table import cut_unit
from pipelines.benchmarks import findings
from pipelines.benchmarks.plots import plots_svg
from pipelines.benchmarks.table import table_columns, verdict
from pipelines.platform.numbers import percent, points
from pipelines.report.charts import escape
from pipelines.report.html import data_table, facts_list, figure, page, section

KEPT = ("label", "strategy", "depth", "seed", "acc", "learning_accuracy", "forgetting",
        "accuracy_matrix", "bytes_per_task", "cpu_seconds", "feature_bytes", "tasks", "task_shift",
        "forecast_kept")
"""The fields of a cell that the page needs; `result.json` holds them."""
SETTINGS = (("tasks", "data", "tasks"), ("images a class", "data", "images_per_class"),
            ("input size", "data", "input_size"), ("network", "backbone", "backbone"),
            ("trunk epochs", "backbone", "trunk_epochs"), ("views", "features", "views"),
            ("epochs a task", "train", "epochs"), ("rehearsal memory, images", "train", "buffer"))


def benchmark_page(result: Mapping[str, Any], drawn: str | None = None) -> str:
    """The page of a `result.json` that `reproduce` wrote.

    drawn: the output of `plots_svg` for it; drawn here where it is not given.
    Raises: InputError for anything else.
    """
    try:
        cells, config, name, size = (result[key] for key in ("cells", "config", "pack", "size"))
        table = rows(cells, expected(name, size))
        own, unit = config["backbone"]["freeze_depth"], cut_unit(config["backbone"]["backbone"])
        tasks = findings.task_rows(cells)
        parts = [_header(name, size, table, cells),
                 _findings(_answers(table, cells, tasks, own, unit)),
                 _table(table, unit),
                 _drawings(drawn or plots_svg(table, cells, own, unit)),
                 _tasks(tasks, findings.depths_of(cells)), _provenance(result, table)]
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


def _header(name: str, size: str, table: Sequence[Row],
            cells: Sequence[Mapping[str, Any]]) -> str:
    tasks, seeds = len(cells[0]["tasks"]), len({cell["seed"] for cell in cells})
    meta = [f"{tasks} tasks", f"{len({row.label for row in table})} strategies",
            f"{seeds} seed{'s' * (seeds > 1)}", f"{len(cells)} streams learned"]
    return ('<header><p class="over">partialhn · comparison of strategies</p>'
            f"<h1>{escape(name)}, {escape(size)}</h1>"
            f'<p class="meta">{escape(" · ".join(meta))}</p></header>')


def _findings(questions: Sequence[tuple[str, Sequence[str]]]) -> str:
    html = "".join(f"<h3>{escape(question)}</h3>"
                   + ("".join(f"<p>{escape(each)}</p>" for each in answers))
                   for question, answers in questions)
    return f'<div class="verdict good"><h2>Findings</h2>{html}</div>'


def _table(table: Sequence[Row], unit: str) -> str:
    heads, lines = table_columns(table, unit)
    return section("Every strategy at every depth",
                   "Accuracy is the mean over all tasks at the end of the stream, with the "
                   "task given. Intervals are 95 % over seeds.",
                   '<div class="scroll" tabindex="0" role="region" aria-label="all strategies">'
                   + data_table([escape(head) for head in heads],
                                [[escape(cell) for cell in line] for line in lines], "broad")
                   + "</div>")


def _drawings(svg: str) -> str:
    return section("Charts", "Each strategy has one colour in all charts.",
                   figure("Accuracy, cost and forgetting", svg[svg.index("<svg"):],
                          "Bars of forgetting show how far each task fell below its best "
                          "accuracy by the end.", "scroll", 760))


def _tasks(tasks: Sequence[findings.TaskRow], depths: Sequence[int]) -> str:
    heads = ["task", "images", "shift from the first",
             *(f"accuracy, depth {depth}" for depth in depths), "loss by depth, points"]
    lines = [[escape(row.name), "as they are" if row.transform == "none" else
              escape(row.transform), percent(row.shift, 0),
              *map(percent, row.accuracy), points(row.lost)]
             for row in tasks]
    return section("Task by task",
                   "The hypernetwork's accuracy right after each task. “Shift from the "
                   "first”: the share of the variance of a task's features outside of the "
                   "directions that hold 90 % of the variance of the first task's features, which "
                   "the trunk was trained on.",
                   '<div class="scroll" tabindex="0" role="region" aria-label="tasks">'
                   + data_table(heads, lines, "broad") + "</div>")


def _provenance(result: Mapping[str, Any], table: Sequence[Row]) -> str:
    config = result["config"]
    facts = [(name, str(config[part][key])) for name, part, key in SETTINGS]
    command = f"partialhn reproduce {result['pack']} --data IMAGES --size {result['size']}"
    return section("Provenance", verdict(table).capitalize() + ".",
                   facts_list([("command", command),
                               ("version", str(result["partialhn_version"])), *facts]))
