"""MLflow runs: a parent run for each stream's work and a child run for each task.

Runs are found again by their tags (work, task), so a run that is interrupted and started again
creates nothing twice. MLflow is imported when first used, because the import takes seconds.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn.errors import InputError
from partialhn.naming import digest_text
from pipelines.platform.storage import Storage
from pipelines.registry.connection import Connection

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAM = 6000
"""Length limit of an MLflow parameter; a longer value is cut and ends in its hash."""
MOST_ROWS = 200
"""Rows of the accuracy matrix that MLflow's pages show."""
Matrix = Sequence[Sequence[float | None]]
"""The accuracy matrix: R[i][j] is the accuracy on task j after learning task i."""
_EPOCH_KEYS = ("loss", "cross_entropy", "regulariser", "accuracy", "validation_accuracy", "seconds")


class Runs:
    """This project's access to the runs of MLflow, through one explicit client."""

    def __init__(self, connection: Connection, storage: Storage) -> None:
        self._connection, self._storage = connection, storage
        self.tracking_uri = connection.uri
        self._is_server = connection.uri.startswith(("http://", "https://"))

    @property
    def _client(self) -> "MlflowClient":
        return self._connection.client

    def open(self) -> None:
        """Makes MLflow's client, if it is not made yet.

        Raises: InputError, as `pipelines.registry.connection.open_client`.
        """
        _ = self._client

    def stream_run(self, name: str, work: str, config: Mapping[str, Any]) -> str:
        """ID of the parent run of a stream's work, created if new; logs its configuration."""
        run_id = self._run(self._experiment(name), name,
                           {"kind": "stream", "stream": name, "work": work})
        self._log_parameters(run_id, config)
        return run_id

    def task_run(self, parent_id: str, task: str, task_index: int, lineage_id: str) -> str:
        """ID of the child run of one experience, created if new, with its identity in tags.

        lineage_id: names the model after the experience; another model at the same task index has
        a run of its own.
        """
        parent = self._client.get_run(parent_id)
        tags = {key: parent.data.tags[key] for key in ("stream", "work")}
        return self._run(parent.info.experiment_id, f"{task_index} {task}", tags | {
            "kind": "task", "task": task, "task_index": str(task_index), "prefix": lineage_id,
            "mlflow.parentRunId": parent_id})

    def log_task(self, run_id: str, epochs: Sequence[Mapping[str, Any]],
                 metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a task's epochs (dicts as in result.json) and of its end (metrics).

        Epochs that are logged already are not logged again.
        """
        logged = {point.step for point in self._client.get_metric_history(run_id, "loss")}
        self._log_points(run_id, [
            *((key, record[key], record["epoch"]) for record in epochs
              if record["epoch"] not in logged
              for key in _EPOCH_KEYS if record.get(key) is not None),
            *((key, value, 0) for key, value in metrics.items())])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Logs single values, for example acc and forgetting after a task (step = task index)."""
        self._log_points(run_id, [(key, value, step) for key, value in metrics.items()])

    def log_matrix(self, run_id: str, accuracy_matrix: Matrix, tasks: Sequence[str]) -> None:
        """Logs the accuracy matrix as CSV and JSON, replacing earlier ones.

        If there are more than `MOST_ROWS` tasks, these have so many evenly spread rows, and `after`
        says which; result.json has all.
        """
        rows = _evenly(len(tasks), MOST_ROWS)
        after, matrix = [tasks[row] for row in rows], [accuracy_matrix[row] for row in rows]
        self._client.log_text(run_id, matrix_csv(matrix, tasks, after), "accuracy_matrix.csv")
        self._log_json(run_id, {"tasks": list(tasks), "after": after,
                                "accuracy_matrix": [list(row) for row in matrix]},
                       "accuracy_matrix.json")

    def log_file(self, run_id: str, path: str | Path) -> None:
        """Logs a local file, for example report.html, as an artifact of the run."""
        self._client.log_artifact(run_id, str(path))

    def log_result(self, run_id: str, result: Mapping[str, Any]) -> None:
        """Logs result.json as an artifact of the stream's run; `Registry.result` reads it."""
        self._log_json(run_id, dict(result), "result.json")

    def _log_json(self, run_id: str, values: Mapping[str, Any], name: str) -> None:
        """Logs values without indentation, which takes seconds for the numbers of many tasks."""
        self._client.log_text(run_id, json.dumps(values, default=str), name)

    def end_run(self, run_id: str, failed: bool = False) -> None:
        """Marks a run as finished, or as failed."""
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self._is_server else self._storage.uri_of("mlartifacts", name)
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException as error:  # another client has created it meanwhile
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)
                assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            raise InputError(f"MLflow experiment {name!r} was deleted; give another --name, or "
                             "restore it: "
                             f"`mlflow experiments restore -x {experiment.experiment_id}`")
        return str(experiment.experiment_id)

    def _run(self, experiment: str, run_name: str, tags: dict[str, str]) -> str:
        """ID of the run with these tags, created if new; its status is set to running."""
        where = " and ".join(f"tags.`{key}` = '{tags[key]}'"
                             for key in ("kind", "work", "prefix", "trial") if key in tags)
        runs = self._client.search_runs([experiment], where, max_results=1)
        if runs:
            run_id = runs[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._client.create_run(experiment, tags=tags, run_name=run_name).info.run_id
        return str(run_id)

    def _log_parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Logs nested values as section.key parameters, and unabridged in config.json.

        Parameters that are logged already do not change.
        """
        from mlflow.entities import Param

        logged = self._client.get_run(run_id).data.params
        params = [Param(key, _parameter(value)) for key, value in _flat(values)]
        new = [param for param in params if param.key not in logged]
        for start in range(0, len(new), 100):
            self._client.log_batch(run_id, params=new[start:start + 100], synchronous=True)
        if new:
            self._client.log_dict(run_id, dict(values), "config.json")

    def _log_points(self, run_id: str, points: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        # MLflow turns infinity into 1.797e308 without a word, and keeps NaN as such
        metrics = [Metric(key, float(value) if math.isfinite(value) else math.nan, now, step)
                   for key, value, step in points]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[start:start + 1000],
                                   synchronous=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parameter(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_PARAM:
        return text
    end = f"... sha256 {digest_text(text, 16)}, whole in config.json"
    return text[:MAX_PARAM - len(end)] + end


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def matrix_csv(accuracy_matrix: Matrix, tasks: Sequence[str],
               after: Sequence[str] | None = None) -> str:
    """The matrix as CSV: a row after each task, a column for each task, empty if not measured.

    after: the tasks of the rows, where not every task has one.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after", *tasks])
    writer.writerows([task, *row] for task, row in zip(after or tasks, accuracy_matrix,
                                                       strict=True))
    return text.getvalue()
