"""The report's section on images that come without a task id."""

from partialhn.numbers import percent
from pipelines.report.charts import escape
from pipelines.report.facts import Facts
from pipelines.report.html import data_table, section

METHODS = (("acc_detector", "Trunk features alone", "the detector over the classes of all tasks"),
           ("acc_entropy", "Heads alone", "the most certain head, on fewer images"),
           ("acc_combined", "Both", "task auto"))
LISTED = 12
"""Up to this many tasks every accuracy is listed."""


def without_id(facts: Facts) -> str:
    """Accuracy with the task inferred; empty for a run that did not measure it."""
    measured = facts.result.get("without_task_id") or {}
    if "acc" not in measured:
        return ""
    lead = (f"When the caller does not give the task, the model infers the right task for "
            f"{percent(measured['task_accuracy'])} of images and the right class for "
            f"{percent(measured['acc'])}. When the task is given, "
            f"{percent(measured['acc_given'])} of the same images get the right class.")
    rows = [[f"{escape(name)}<small>{escape(note)}</small>", percent(measured[key])]
            for key, name, note in METHODS if key in measured]
    classes = len(facts.classes)
    if classes:
        rows.append([f"Guessing<small>one of {classes:,} classes</small>", percent(1 / classes)])
    notes = f"{_after_each(facts)} {_detection(measured)}".strip()
    return section("Where nobody says the task", lead,
                   data_table(["Task inferred by", "Right class"], rows),
                   f'<p class="meta after">{escape(notes)}</p>')


def _after_each(facts: Facts) -> str:
    """Class-incremental accuracy after each task; empty where it was not measured."""
    found = facts.result.get("class_incremental") or {}
    if "average_incremental" not in found:
        return ""
    values = [percent(value) for value in found["after_task"] if value is not None]
    listed = ", ".join(values) if len(values) <= LISTED else (
        f"from {values[0]} after the first to {values[-1]} after the last, measured after "
        f"{len(values)} tasks")
    return (f"The same accuracy after each task (class-incremental): {listed}; average "
            f"{percent(found['average_incremental'])}.")


def _detection(measured: dict[str, float]) -> str:
    rejected = ("" if "known_rejected" not in measured else
                f"The accuracies count every image; the model rejects "
                f"{percent(measured['known_rejected'])} of the images of known tasks as images of "
                "no known task, and gives them no label.")
    if "rejection_auroc" not in measured:
        return rejected
    return ("Detection of images from a task that the model has not learned yet has an AUROC of "
            f"{measured['rejection_auroc']:.2f} (0.50 is guessing, 1 is perfect; mean over the "
            f"tasks, each before it was learned). {rejected}")


def without_id_line(facts: Facts) -> list[str]:
    """The same for a terminal."""
    measured = facts.result.get("without_task_id") or {}
    if "acc" not in measured:
        return []
    auroc, rejected = measured.get("rejection_auroc"), measured.get("known_rejected")
    average = (facts.result.get("class_incremental") or {}).get("average_incremental")
    return [f"Where nobody says the task: accuracy {percent(measured['acc'])}, the right task for "
            f"{percent(measured['task_accuracy'])}",
            *([] if average is None else
              [f"The same accuracy, mean over the moments after each task: {percent(average)}"]),
            *([] if rejected is None else
              [f"{percent(rejected)} of these images would get no label, because they look like "
               "images of no known task"]),
            *([] if auroc is None else
              ["Images of tasks not yet learned are told from the others with an AUROC of "
               f"{auroc:.2f} (0.50 is guessing)"])]
