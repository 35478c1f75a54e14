"""A pack as one self-contained HTML page: what was found, the table, the drawings, the tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.benchmarks.catalogue import expected
from partialhn.benchmarks.comparison import Row, rows
from partialhn.errors import InputError
from pipelines.benchmarks import findings
from pipelines.benchmarks.plots import plots_svg
from pipelines.benchmarks.table import table_columns, verdict
from pipelines.report.charts import escape
from pipelines.report.html import data_table, facts_list, figure, section
from pipelines.report.page import page

KEPT = ("label", "strategy", "depth", "seed", "acc", "learning_accuracy", "forgetting",
        "accuracy_matrix", "bytes_per_task", "cpu_seconds", "feature_bytes", "tasks", "task_shift",
        "forecast_kept")
"""What the page needs of a cell; `result.json` holds it."""
SETTINGS = (("tasks", "data", "tasks"), ("images a class", "data", "images_per_class"),
            ("input size", "data", "input_size"), ("network", "backbone", "backbone"),
            ("trunk epochs", "backbone", "trunk_epochs"), ("views", "features", "views"),
            ("epochs a task", "train", "epochs"), ("rehearsal memory, images", "train", "buffer"))


def benchmark_page(result: Mapping[str, Any], drawn: str | None = None) -> str:
    """The page of a `result.json` that `reproduce` wrote; `drawn` is its `plots_svg`, drawn here
    where it is not at hand.

    Raises: InputError for anything else.
    """
    try:
        cells, config, name, size = (result[key] for key in ("cells", "config", "pack", "size"))
        found = rows(cells, expected(name, size))
        own = config["backbone"]["freeze_depth"]
        tasks = findings.task_rows(cells)
        parts = [_header(name, size, found, cells), _findings(_said(found, cells, tasks, own)),
                 _table(found), _drawings(drawn or plots_svg(found, cells, own)),
                 _tasks(tasks, findings.depths_of(cells)), _provenance(result, found)]
    except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        raise InputError(f"the result cannot be shown as a pack ({error!r}); allowed: a "
                         "result.json that reproduce wrote, with this version") from error
    return page(f"{name}, {size} – comparison", parts)


def _said(found: Sequence[Row], cells: Sequence[Mapping[str, Any]],
          tasks: Sequence[findings.TaskRow], own: int) -> list[tuple[str, list[str]]]:
    """Questions and answers; those that cannot be answered are left out."""
    answers = [
        ("How deep can one freeze, and what is lost?",
         [findings.how_deep(cells), findings.forecast_said(cells)]),
        ("Why?", [findings.why(tasks, findings.depths_of(cells))]),
        ("What do changed images do?", [findings.noise(cells, own)]),
        ("Who is better than the hypernetwork? (seed by seed, 95 %)", findings.against(found))]
    return [(question, [each for each in said if each]) for question, said in answers if any(said)]


def _header(name: str, size: str, found: Sequence[Row],
            cells: Sequence[Mapping[str, Any]]) -> str:
    tasks, seeds = len(cells[0]["tasks"]), len({cell["seed"] for cell in cells})
    meta = [f"{tasks} tasks", f"{len({row.label for row in found})} strategies",
            f"{seeds} seed{'s' * (seeds > 1)}", f"{len(cells)} streams learned"]
    return ('<header><p class="over">partialhn · comparison of strategies</p>'
            f"<h1>{escape(name)}, {escape(size)}</h1>"
            f'<p class="meta">{escape(" · ".join(meta))}</p></header>')


def _findings(said: Sequence[tuple[str, Sequence[str]]]) -> str:
    html = "".join(f"<h3>{escape(question)}</h3>"
                   + ("".join(f"<p>{escape(each)}</p>" for each in answers))
                   for question, answers in said)
    return f'<div class="verdict good"><h2>What was found</h2>{html}</div>'


def _table(found: Sequence[Row]) -> str:
    heads, lines = table_columns(found)
    return section("Every strategy at every depth",
                   "ACC is the mean accuracy over all tasks at the end of the stream, with the "
                   "task given. Intervals are 95 % over seeds.",
                   '<div class="scroll" tabindex="0" role="region" aria-label="all strategies">'
                   + data_table([escape(head) for head in heads],
                                [[escape(cell) for cell in line] for line in lines], "broad")
                   + "</div>")


def _drawings(svg: str) -> str:
    return section("Drawn", "Each strategy keeps its colour.",
                   figure("Accuracy, cost and forgetting", svg[svg.index("<svg"):],
                          "Bars of forgetting show how far each task fell below its best "
                          "accuracy by the end.", "scroll", 760))


def _tasks(tasks: Sequence[findings.TaskRow], depths: Sequence[int]) -> str:
    heads = ["task", "images", "unlike the first",
             *(f"learned, depth {depth}" for depth in depths), "depth costs, points"]
    lines = [[escape(row.name), "as they are" if row.transform == "none" else
              escape(row.transform), f"{100 * row.shift:.0f} %",
              *(f"{100 * value:.1f} %" for value in row.accuracy), f"{100 * row.lost:.1f}"]
             for row in tasks]
    return section("Task by task",
                   "The hypernetwork's accuracy right after each task. “Unlike the first”: the "
                   "share of a task's feature spread outside of the directions that hold 90 % of "
                   "the first task's, which the trunk was trained on.",
                   '<div class="scroll" tabindex="0" role="region" aria-label="tasks">'
                   + data_table(heads, lines, "broad") + "</div>")


def _provenance(result: Mapping[str, Any], found: Sequence[Row]) -> str:
    config = result["config"]
    facts = [(name, str(config[part][key])) for name, part, key in SETTINGS]
    command = f"partialhn reproduce {result['pack']} --data IMAGES --size {result['size']}"
    return section("How it was made", verdict(found).capitalize() + ".",
                   facts_list([("command", command),
                               ("version", str(result["partialhn_version"])), *facts]))
