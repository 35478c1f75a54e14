"""Labels for images as a table."""

from typing import TYPE_CHECKING

from partialhn.notebook.images import batches
from partialhn.predict import Answer, Predictor
from partialhn.task_inference import AUTO

if TYPE_CHECKING:
    import pandas as pd

    from partialhn.notebook.images import Images


def label(predictor: Predictor, images: "Images", task: str) -> "pd.DataFrame":
    """One row an image in the order given: id, label and probability; with `auto` also the task
    and its probability among all tasks.

    Raises: InputError for an unknown task or an image that cannot be used.
    """
    import pandas as pd

    ids: list[str] = []
    answers: list[Answer] = []
    for encoded, names in batches(images):
        images_BCHW = predictor.decode_all(encoded, names)
        answers += predictor.answers(predictor.features(images_BCHW), [task] * len(names))
        ids += names
    table = pd.DataFrame({"id": pd.Series(ids, dtype=object),
                          "task": pd.Series([answer.task for answer in answers], dtype=object),
                          "label": pd.Series([answer.label for answer in answers], dtype=object),
                          "probability": pd.Series([answer.probability for answer in answers],
                                                   dtype=float)})
    if task != AUTO:
        return table.drop(columns="task")
    table["task_probability"] = pd.Series([answer.task_probability for answer in answers],
                                          dtype=float)
    return table
