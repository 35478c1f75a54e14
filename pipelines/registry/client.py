"""The MLflow registry: one registered model version for each task of a stream.

Together with `runs`, `aliases` and `package` the only files that talk to MLflow; only the driver
uses them. One version for each task under the stream's name, with the aliases `champion` (in
use), `challenger` (refused by the gate) and `task-<name>` (the version that introduced a task).
Everything is found again by what it is (work, task, weights hash), so a run that was interrupted
and started again makes nothing twice. MLflow is imported when first used: importing it takes
seconds.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn.data.experience import task_of
from partialhn.errors import InputError
from pipelines.platform.storage import Storage
from pipelines.registry import package
from pipelines.registry.aliases import Aliases
from pipelines.registry.connection import open_client
from pipelines.registry.history import Entry, Kind, Move, aliases
from pipelines.registry.package import Contents
from pipelines.registry.runs import Runs, pages
from pipelines.registry.versions import (
    CHALLENGER,
    CHAMPION,
    DECISION,
    FILES,
    GATE,
    Registration,
    Version,
    challenger_of,
    task_alias,
)
from pipelines.settings import mask_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from partialhn.predict import Predictor

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclasses.dataclass(frozen=True)
class Placing:
    """Which aliases a new version takes, and what the history says about it."""

    promote: bool = True
    """It becomes champion; otherwise challenger, and nothing else moves."""
    kind: Kind = "trained"
    why: str = "the newest task"
    token: int | None = None
    """Fencing token of the lease it was made under."""
    decision: Mapping[str, Any] | None = None
    """The gate's decision, as `pipelines.retrain.gate.Decision.fields` gives it."""


def connect(storage: Storage, tracking_uri: str | None = None, create: bool = True) -> "Registry":
    """Connects to MLflow, as `pipelines.registry.connection.open_client` says."""
    return Registry(*open_client(storage, tracking_uri, create), storage)


class Registry(Runs):
    """MLflow as this project uses it, through one explicit client: runs, versions, aliases."""

    def __init__(self, client: "MlflowClient", tracking_uri: str, storage: Storage) -> None:
        super().__init__(client, tracking_uri, storage)
        self.aliases = Aliases(client, storage)

    def register_task(self, run_id: str, record: Registration, contents: Contents,
                      placing: Placing | None = None) -> Version:
        """Registers the model after a task, once: a place in the chain of tasks is one version.

        As champion it also takes the task's alias. A later task of the same work keeps an alias,
        and so does a version that a person chose when this one had been champion before. A
        decision is kept in the version's tags and, as gate.json, with the run.

        Raises: StaleTokenError for a writer that lost its lease.
        """
        placing = placing or Placing()
        self._create_model(record.stream)
        self.aliases.reconcile(record.stream)
        tags = record.tags() | _decision_tags(placing.decision)
        number = self._number_of(record.stream, record.prefix)
        if number is None:
            number = self._add_version(run_id, tags, contents, record)
        if placing.decision is not None:
            self._client.log_dict(run_id, dict(placing.decision), "gate.json")
            for key in (GATE, DECISION):  # decided anew, perhaps by another policy
                self._client.set_model_version_tag(record.stream, str(number), key, tags[key])
        for alias in self._aliases_to_take(record, number, placing):
            self.aliases.move(record.stream, Move(alias, number, placing.kind, placing.why,
                                                  token=placing.token, metrics=record.metrics(),
                                                  decision=placing.decision))
        return self._version(record.stream, number)

    def versions(self, name: str) -> list[Version]:
        """All versions of a stream that this product registered, oldest first."""
        named: dict[int, list[str]] = {}
        for alias, number in self._registered(name).aliases.items():
            named.setdefault(int(number), []).append(alias)
        return [_version_of(each, named.get(int(each.version), []))
                for each in self._search(f"name = '{name}'")]

    def streams(self) -> list[str]:
        """Names of all registered models."""
        return [model.name for model in pages(self._client.search_registered_models)]

    def version_of(self, name: str, lineage_id: str) -> Version | None:
        """The version of the model after a task, by its place in the chain; None: not there."""
        number = self._number_of(name, lineage_id)
        return None if number is None else self._version(name, number)

    def resolve(self, model_uri: str) -> Version:
        """The version behind models:/<name>@<alias> or models:/<name>/<version>.

        Raises: InputError listing the streams, aliases or versions there are.
        """
        match = _MODEL_URI.fullmatch(model_uri)
        if not match:
            raise InputError(f"model is {model_uri!r}; allowed: models:/NAME@champion, "
                             "models:/NAME@task-TASK or models:/NAME/VERSION")
        versions = self.versions(match["name"])
        for version in versions:
            if match["alias"] in version.aliases or match["version"] == str(version.version):
                return version
        wanted = f"alias {match['alias']!r}" if match["alias"] else f"version {match['version']}"
        raise InputError(f"model {match['name']!r} has no {wanted}; aliases: "
                         + _listed(alias for v in versions for alias in v.aliases)
                         + "; versions: " + _listed(str(v.version) for v in versions))

    def load_predictor(self, model_uri: str) -> tuple["Predictor", Version]:
        """Downloads a version's checkpoint and loads it, without MLflow's serving layer.

        Raises: InputError for an unknown model; IntegrityError for a damaged checkpoint.
        """
        from partialhn.predict import Predictor

        version = self.resolve(model_uri)
        with tempfile.TemporaryDirectory() as folder:
            model = self.download(version, folder)
            return Predictor.load(package.artifact(model, "checkpoint")), version

    def download(self, version: Version, folder: str | Path) -> Path:
        """Copies a version's folder, as `package` made it, below a local folder."""
        from mlflow.artifacts import download_artifacts

        source = self._client.get_model_version_download_uri(version.stream, str(version.version))
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder),
                                       tracking_uri=self.tracking_uri))

    def result(self, name: str) -> dict[str, Any]:
        """The result.json of the champion's run of a stream, and the `challenger` if there is one.

        Raises: InputError when the stream is unknown or its run has not ended.
        """
        from mlflow.artifacts import download_artifacts

        champion = self.resolve(f"models:/{name}@{CHAMPION}")
        parent = self._client.get_run(champion.run_id).data.tags["mlflow.parentRunId"]
        if not any(file.path == "result.json" for file in self._client.list_artifacts(parent)):
            raise InputError(f"stream {name!r} has no result yet: its run has not ended; start "
                             "the same `partialhn train` again to finish it")
        with tempfile.TemporaryDirectory() as folder:
            path = download_artifacts(run_id=parent, artifact_path="result.json", dst_path=folder,
                                      tracking_uri=self.tracking_uri)
            result: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        refused = challenger_of(self.versions(name))
        if refused is not None:
            result["challenger"] = {"version": refused.version, "task": refused.task,
                                    "decision": refused.decision}
        return result

    # Inside ----------------------------------------------------------------------------------

    def _create_model(self, stream: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(stream, tags={"product": "partialhn"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _search(self, where: str) -> list["ModelVersion"]:
        """The versions that this product registered, oldest first, as MLflow gives them."""
        found = pages(self._client.search_model_versions, where)
        return sorted((each for each in found if "task_index" in each.tags),
                      key=lambda each: int(each.version))

    def _number_of(self, name: str, lineage_id: str) -> int | None:
        found = self._search(f"name = '{name}' and tags.prefix = '{lineage_id}'")
        return int(found[0].version) if found else None

    def _version(self, name: str, number: int) -> Version:
        found = self._client.get_model_version(name, str(number))
        return _version_of(found, found.aliases)

    def _aliases_to_take(self, record: Registration, number: int, placing: Placing) -> list[str]:
        if not placing.promote:
            return [CHALLENGER]
        entries = self.aliases.history(record.stream).entries()
        holders, taken = aliases(entries), []
        for alias in (task_alias(task_of(record.task)), CHAMPION):
            held = holders.get(alias)
            holder = None if held is None else self._version(record.stream, held)
            later = (holder is not None and holder.tags.get("work") == record.work
                     and holder.task_index > record.task_index)
            if not later and not _person_chose_another(entries, alias, number):
                taken.append(alias)
        return taken

    def _registered(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            raise InputError(f"no stream {name!r} in the registry "
                             f"{mask_password(self.tracking_uri)}; there: "
                             + _listed(self.streams())) from error

    def _add_version(self, run_id: str, tags: dict[str, str], contents: Contents,
                     record: Registration) -> int:
        """Uploads the model and makes a version of it, tags and all, in one transaction."""
        from mlflow.models import Model

        run = self._client.get_run(run_id)
        logged = self._client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=run_id, tags=record.tags(),
            model_type="partialhn")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            package.write(path, Model(artifact_path=logged.artifact_location, run_id=run_id,
                                      model_uuid=logged.model_id, model_id=logged.model_id),
                          contents)
            tags = tags | {FILES: json.dumps(package.file_hashes(path))}
            self._client.log_model_artifacts(logged.model_id, str(path))
        self._client.finalize_logged_model(logged.model_id, "READY")
        # a database is asked directly and would look for models:/... in the default one
        source = f"models:/{logged.model_id}" if self._is_server else logged.artifact_location
        version = self._client.create_model_version(record.stream, source=source, run_id=run_id,
                                                    tags=tags, model_id=logged.model_id)
        return int(version.version)


def _version_of(found: "ModelVersion", aliases: Sequence[str]) -> Version:
    return Version(found.name, int(found.version), found.run_id or "", tuple(sorted(aliases)),
                   dict(found.tags))


def _decision_tags(decision: Mapping[str, Any] | None) -> dict[str, str]:
    if decision is None:
        return {}
    return {GATE: "passed" if decision["passed"] else "failed", DECISION: json.dumps(decision)}


def _person_chose_another(entries: Sequence[Entry], alias: str, number: int) -> bool:
    """Whether the alias was taken from this version by hand: starting the same training again
    must not undo a rollback.
    """
    moves = [entry.move for entry in entries if entry.move.alias == alias]
    return (bool(moves) and moves[-1].kind in ("rollback", "promoted")
            and any(move.to == number for move in moves))


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
