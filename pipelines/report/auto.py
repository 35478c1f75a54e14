"""The report's section on images whose task nobody says."""

from pipelines.report.charts import escape
from pipelines.report.facts import Facts, percent
from pipelines.report.html import data_table, section

METHODS = (("acc_detector", "Trunk features alone", "distance to class means"),
           ("acc_entropy", "Heads alone", "the most certain head, on fewer images"),
           ("acc_combined", "Both", "the default of task auto"))


def without_id(facts: Facts) -> str:
    """Accuracy where the task must be inferred; empty for a run that did not measure it."""
    measured = facts.result.get("without_task_id") or {}
    if "acc" not in measured:
        return ""
    lead = (f"Where the caller does not say the task, {percent(measured['task_accuracy'])} of "
            f"images find it, and {percent(measured['acc'])} get the right class; "
            f"{percent(measured['acc_given'])} of the same images do when the task is given.")
    rows = [[f"{escape(name)}<small>{escape(note)}</small>", percent(measured[key])]
            for key, name, note in METHODS if key in measured]
    return section("Without a task id", lead, data_table(["Task inferred by", "Right class"], rows),
                   f'<p class="meta after">{escape(_strangers(measured))}</p>')


def _strangers(measured: dict[str, float]) -> str:
    rejected = (f"{percent(measured['known_rejected'])} of known tasks' images are taken for "
                "images of no known task.")
    if "rejection_auroc" not in measured:
        return rejected
    return (f"Images of a task that was not learned yet are told from those of learned tasks with "
            f"an AUROC of {measured['rejection_auroc']:.2f} (0.50 is guessing, 1 is perfect; mean "
            f"over the tasks, each before it was learned). {rejected}")


def without_id_line(facts: Facts) -> list[str]:
    """The same for a terminal."""
    measured = facts.result.get("without_task_id") or {}
    if "acc" not in measured:
        return []
    auroc = measured.get("rejection_auroc")
    return [f"Without a task id: {percent(measured['acc'])} right, task found for "
            f"{percent(measured['task_accuracy'])}"
            + ("" if auroc is None else f"; unknown tasks told with AUROC {auroc:.2f}")]
