"""The runs of searches in MLflow: one parent for a search, one child for each trial, each once."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.platform.storage import Storage
from pipelines.registry.connection import Connection
from pipelines.registry.reading import pages
from pipelines.registry.runs import Runs


def connect_search(storage: Storage, tracking_uri: str | None = None) -> "SearchRuns":
    """Connects to MLflow, as `pipelines.registry.connection.open_client` says."""
    return SearchRuns(Connection(storage, tracking_uri, create=True), storage)


class SearchRuns(Runs):
    """Runs of kind search and trial, found again by the search's name and the trial's id."""

    def search_run(self, name: str, settings: Mapping[str, Any]) -> str:
        """The parent run of a search, new or found again, with its options and base."""
        run_id = self._run(self._experiment(name), name, {
            "kind": "search", "search": name, "work": f"search {name}"})
        self._log_parameters(run_id, settings)
        return run_id

    def trials_of(self, parent_id: str) -> set[str]:
        """Ids of the trials whose child runs are complete."""
        where = f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.complete = 'yes'"
        experiment = self._client.get_run(parent_id).info.experiment_id
        return {run.data.tags["trial"]
                for run in pages(self._client.search_runs, [experiment], where)}

    def log_trial(self, parent_id: str, trial: str, status: str, config: Mapping[str, Any],
                  metrics: Sequence[tuple[str, float, int]], tags: Mapping[str, str]) -> str:
        """The child run of a trial that ended, once: one that was begun before is completed.

        status: finished, pruned or failed. config: its configuration, whole in config.json, which
        `train --config` takes. metrics: name, value and step.
        """
        parent = self._client.get_run(parent_id)
        own = {key: parent.data.tags[key] for key in ("search", "work")}
        run_id = self._run(parent.info.experiment_id, trial, dict(tags) | own | {
            "kind": "trial", "trial": trial, "status": status, "mlflow.parentRunId": parent_id})
        self._log_parameters(run_id, config)
        done = set(self._client.get_run(run_id).data.metrics)
        self._log_points(run_id, [point for point in metrics if point[0] not in done])
        self._client.set_terminated(run_id, {"finished": "FINISHED", "pruned": "KILLED",
                                             "failed": "FAILED"}[status])
        self._client.set_tag(run_id, "complete", "yes")
        return run_id
