"""The MLflow registry: one registered model version for each task of a stream.

The versions are registered under the stream's name, with the aliases `champion` (in use),
`challenger` (refused by the gate) and `task-<name>` (the version that introduced a task). Runs and
versions are found again by their tags (work, task, lineage id), so a run that is interrupted and
started again creates nothing twice. Only the files of this folder use MLflow, and only in the
driver process. It is imported when first used, because the import takes seconds.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn.checkpoints import FIELDS
from partialhn.data.experience import task_of
from partialhn.errors import InputError, IntegrityError
from partialhn.json_files import read_object
from pipelines.platform.storage import Storage
from pipelines.registry import package
from pipelines.registry.aliases import BY_HAND, Aliases, unknown_stream
from pipelines.registry.connection import Connection
from pipelines.registry.history import Entry, Kind, Move, aliases
from pipelines.registry.package import Contents
from pipelines.registry.reach import out_of_reach
from pipelines.registry.reading import OURS, RegisteredModel
from pipelines.registry.runs import Runs
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

if TYPE_CHECKING:
    import torch

    from partialhn.predict import Predictor

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclasses.dataclass(frozen=True)
class Placing:
    """The aliases that a new version gets, and the text of their history entries."""

    promote: bool = True
    """True: the version becomes champion. False: it becomes challenger and no other alias
    moves."""
    kind: Kind = "trained"
    why: str = "the newest task"
    token: int | None = None
    """Fencing token of the lease under which the version was created."""
    decision: Mapping[str, Any] | None = None
    """The gate's decision (`pipelines.gate.Decision.fields`); None without a gate."""
    champion: bool = True
    """False: only the task's alias moves to a promoted version, and the champion stays."""


def connect(storage: Storage, tracking_uri: str | None = None, create: bool = True) -> "Registry":
    """Connects to a registry. Raises: InputError, as `connection.open_client`."""
    return Registry(Connection(storage, tracking_uri, create), storage)


class Registry(Runs):
    """This project's access to MLflow: runs, versions, aliases."""

    def __init__(self, connection: Connection, storage: Storage) -> None:
        super().__init__(connection, storage)
        self._reader = connection.reader
        self.aliases = Aliases(connection, storage)

    def register_task(self, run_id: str, record: Registration, contents: Contents,
                      placing: Placing | None = None) -> Version:
        """Registers the model after a task; a model that is registered already is not added again.

        A champion also gets the task's alias. An alias does not move away from a later task of the
        same work, nor from a version that a person chose in place of this one. A decision is stored
        in the version's tags and, as gate.json, in the run.

        Raises: StaleTokenError if the writer has lost its lease.
        """
        placing = placing or Placing()
        self.aliases.check(record.stream)
        if not self.aliases.is_registered(record.stream):
            self._create_model(record.stream)
        self.aliases.reconcile(record.stream)
        tags = record.tags() | _decision_tags(placing.decision)
        known = self.version_of(record.stream, record.prefix)
        number = (known.version if known is not None
                  else self._add_version(run_id, tags, contents, record))
        if placing.decision is not None:
            self._client.log_dict(run_id, dict(placing.decision), "gate.json")
            if known is not None:
                for key in (GATE, DECISION):  # this decision may be a new one, by another policy
                    self._client.set_model_version_tag(record.stream, str(number), key, tags[key])
        version = self._version(record.stream, number)
        self.place(version, placing, work=record.work)
        return self._version(record.stream, number)

    def place(self, version: Version, placing: Placing, work: str | None = None) -> None:
        """Moves the aliases of a registered version as `register_task` does for a new one.

        work: the work that the version is registered for; default: that of its tags.
        """
        for alias in self._aliases_to_take(version, work or version.tags["work"], placing):
            self.aliases.move(version.stream, Move(
                alias, version.version, placing.kind, placing.why, token=placing.token,
                metrics=version.metrics, decision=placing.decision))

    def versions(self, name: str) -> list[Version]:
        """All versions of a stream that this project registered, oldest first.

        Raises: InputError for an unknown stream.
        """
        self._registered(name)
        return self._reader.versions(name)

    def streams(self) -> list[str]:
        """Names of all registered models."""
        return [model.name for model in self._reader.models()]

    def knows(self, name: str) -> bool:
        """Whether a stream is registered."""
        return self.aliases.is_registered(name)

    def version_of(self, name: str, lineage_id: str) -> Version | None:
        """The version of the model with a lineage id, or None."""
        return next(iter(self._reader.versions(name, lineage_id)), None)

    def holder(self, name: str, alias: str) -> Version | None:
        """The version that has an alias; None if there is none or it is not this project's.

        Raises: InputError for an unknown stream.
        """
        number = self._registered(name).aliases.get(alias)
        return None if number is None else self._ours(name, number)

    def aliases_of(self, name: str) -> dict[int, tuple[str, ...]]:
        """The aliases of each version that has some. Raises: InputError for an unknown stream."""
        found: dict[int, tuple[str, ...]] = {}
        for alias, number in sorted(self._registered(name).aliases.items()):
            found[number] = (*found.get(number, ()), alias)
        return found

    def resolve(self, model_uri: str) -> Version:
        """The version that models:/<name>@<alias> or models:/<name>/<version> refers to.

        Raises: InputError listing the existing streams, aliases or versions.
        """
        match = _MODEL_URI.fullmatch(model_uri)
        if not match:
            raise InputError(f"model is {model_uri!r}; allowed: models:/NAME@champion, "
                             "models:/NAME@task-TASK or models:/NAME/VERSION")
        name, alias, number = match["name"], match["alias"], match["version"]
        found = self.holder(name, alias) if alias else self._ours(name, int(number))
        if found is not None:
            return found
        versions = self.versions(name)
        wanted = f"alias {alias!r}" if alias else f"version {number}"
        raise InputError(f"model {name!r} has no {wanted}; aliases: "
                         + _listed(alias for v in versions for alias in v.aliases)
                         + "; versions: " + _listed(v.version for v in versions))

    def warnings(self, model_uri: str) -> list[str]:
        """A line of text if the URI's alias points elsewhere than its history here says."""
        match = _MODEL_URI.fullmatch(model_uri)
        if not match or not match["alias"] or not self.aliases.keeps_history(match["name"]):
            return []
        return [f"warning: {line}"
                for line in self.aliases.differences(match["name"], match["alias"])]

    def load_predictor(self, model_uri: str,
                       device: "torch.device | str" = "cpu") -> tuple["Predictor", Version]:
        """Downloads a version's checkpoint and loads it without MLflow's model classes.

        device: where it predicts.

        Raises: InputError for an unknown model; IntegrityError for a damaged checkpoint.
        """
        from partialhn.predict import Predictor

        version = self.resolve(model_uri)
        with tempfile.TemporaryDirectory() as folder:
            model = self.download_sound(version, folder)
            return Predictor.load(package.artifact(model, "checkpoint"), device), version

    def require_sound(self, version: Version) -> None:
        """Raises IntegrityError, as `download_sound`, if a version's files are damaged."""
        with tempfile.TemporaryDirectory() as folder:
            self.download_sound(version, folder)

    def download_sound(self, version: Version, folder: str | Path) -> Path:
        """As `download`, for files that are those that were registered.

        Raises: IntegrityError that says which version is damaged, in what, and what to do;
        InputError where the artifact store does not answer or denies access, or where the storage
        was moved.
        """
        try:
            model = self.files(version, folder)
            found = (package.difference(json.loads(version.tags[FILES]), package.file_hashes(model))
                     if FILES in version.tags else "")
            if not found:
                self.complete(version, model)
        except IntegrityError as error:
            found = str(error)
        except Exception as error:  # the artifact store's clients can raise anything
            self.require_reach(version, error)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            found = f"its files cannot be downloaded ({reason:.120})"
        if found:
            raise IntegrityError(
                f"{version.uri} (task {version.task!r}) is damaged: {found}; to write its files "
                f"again from the learned model: partialhn models repair --name {version.stream} "
                f"--version {version.version}; to use an earlier one: partialhn models rollback "
                f"--name {version.stream}")
        return model

    def require_reach(self, version: Version, error: Exception) -> None:
        """Raises InputError, where an error says that a version's files are out of reach.

        A store that does not answer or denies access says nothing about the files in it, nor does a
        storage that was moved.
        """
        if reason := out_of_reach(error):
            if not self._storage.is_local:
                self._storage.check(write=False)  # says more: which key, bucket or endpoint
            raise InputError(f"{version.uri} (task {version.task!r}) cannot be read, so whether "
                             f"its files are as registered is unknown: {reason}; allowed: an "
                             "artifact store that answers, and the right to read it") from error
        self.aliases.require_place(version.stream)

    def stored_hashes(self, version: Version, folder: Path) -> dict[str, str]:
        """The hashes of a version's files as they are stored now; empty if there are none.

        Raises: InputError where the artifact store does not answer or denies access.
        """
        folder.mkdir()
        try:
            return package.file_hashes(self.files(version, folder))
        except Exception as error:  # the store's clients can raise anything for what is missing
            self.require_reach(version, error)
            return {}

    def write_file(self, version: Version, path: str, content: bytes) -> None:
        """Writes one file of a version. path: relative to the version's folder."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            file.write_bytes(content)
            self._artifacts(version).log_artifact(str(file), str(Path(path).parent).strip("."))

    def delete_file(self, version: Version, path: str) -> None:
        """Deletes one file of a version. path: relative to the version's folder."""
        self._artifacts(version).delete_artifacts(path)

    def _artifacts(self, version: Version) -> Any:
        """MLflow's access to the folder of a version."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self._reader.source(version), tracking_uri=self.tracking_uri,
                                       registry_uri=self.tracking_uri)

    def download(self, version: Version, folder: str | Path) -> Path:
        """Downloads a version into a local folder, which needs nothing else to be loaded.

        Raises: IntegrityError for shared tensors that are missing or damaged.
        """
        model = self.files(version, folder)
        self.complete(version, model)
        return model

    def files(self, version: Version, folder: str | Path) -> Path:
        """Downloads a version's own files (`pipelines.registry.package`) into a local folder."""
        return self._fetch(self._reader.source(version), Path(folder) / "model")

    def fields(self, version: Version) -> dict[str, Any]:
        """The fields of a version's model (`partialhn.checkpoints.FIELDS`), without its tensors.

        Raises: IntegrityError for files that are missing or damaged.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = package.artifact(self.files(version, folder), "checkpoint")
            return read_object(model / FIELDS, version.uri)

    def slots_of(self, version: Version) -> list[str] | None:
        """Names of the slots of a version's model, oldest first; None where its files cannot be
        read.
        """
        try:
            return [str(task["name"]) for task in self.fields(version)["tasks"]]
        except Exception:  # the artifact store's clients can raise anything
            return None

    def complete(self, version: Version, model: Path) -> None:
        """Adds the tensors that a downloaded version shares with others.

        Raises: IntegrityError if they are missing or damaged.
        """
        from partialhn.checkpoints import shared  # torch takes seconds to import

        if (place := self.shared_place(version)) is not None:
            shared.complete(package.artifact(model, "checkpoint"),
                            shared.reader(self._storage.filesystem, place))

    def source_of(self, version: Version) -> str:
        """URI of the version's own files."""
        return self._reader.source(version)

    def delete_version(self, version: Version) -> None:
        """Deletes a version from MLflow, with the record of its model; its files stay."""
        self._client.delete_model_version(version.stream, str(version.version))

    def shared_place(self, version: Version) -> str | None:
        """The folder whose `objects` the version shares, in the storage's filesystem; None where
        its files lie elsewhere, and are complete.
        """
        source = self._reader.source(version)
        return self._storage.path_of(models_folder(source)) if "/models/" in source else None

    def _fetch(self, uri: str, target: Path) -> Path:
        """A local copy of a folder or file of the artifact store.

        What lies in the stream's own storage is copied without MLflow, whose import takes seconds.
        """
        if (path := self._storage.path_of(uri)) is not None:
            self._storage.download(path, target)
            return target
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=uri, dst_path=str(target.parent),
                                       tracking_uri=self.tracking_uri))

    def result(self, name: str) -> dict[str, Any]:
        """The result.json of the champion's run, with a `challenger` key if there is a challenger.

        Raises: InputError if the stream is unknown or its run has not ended.
        """
        champion = self.resolve(f"models:/{name}@{CHAMPION}")
        parent = self._reader.parent_run(champion.run_id)
        uri = f"{self._reader.artifacts_of(parent)}/result.json"
        path = self._storage.path_of(uri)
        if not (self._storage.exists(path) if path is not None else any(
                file.path == "result.json" for file in self._client.list_artifacts(parent))):
            raise InputError(f"stream {name!r} has no result yet, because its run has not ended; "
                             "to finish it, start the same `partialhn train` again")
        with tempfile.TemporaryDirectory() as folder:
            copy = self._fetch(uri, Path(folder) / "result.json")
            result: dict[str, Any] = json.loads(copy.read_text(encoding="utf-8"))
        refused = challenger_of([version for version in (champion, self.holder(name, CHALLENGER))
                                 if version is not None])
        if refused is not None:
            result["challenger"] = {"version": refused.version, "task": refused.task,
                                    "decision": refused.decision}
        return result

    def _create_model(self, stream: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(stream, tags={"product": "partialhn"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _ours(self, name: str, number: int) -> Version | None:
        """A version that this project registered. Raises: InputError for an unknown stream."""
        self._registered(name)
        found = self._reader.version(name, number)
        return found if found is not None and OURS in found.tags else None

    def _version(self, name: str, number: int) -> Version:
        found = self._reader.version(name, number)
        assert found is not None, f"version {number} of {name} exists"
        return found

    def _aliases_to_take(self, version: Version, work: str, placing: Placing) -> list[str]:
        if not placing.promote:
            return [CHALLENGER]
        entries = self.aliases.history(version.stream).entries()
        current, to_take = aliases(entries), []
        for alias in (task_alias(task_of(version.task)), *[CHAMPION] * placing.champion):
            holder_number = current.get(alias)
            holder = (None if holder_number is None
                      else self._version(version.stream, holder_number))
            is_later = (holder is not None and holder.tags.get("work") == work
                        and holder.task_index > version.task_index)
            if not is_later and not _person_chose_another(entries, alias, version.version):
                to_take.append(alias)
        return to_take

    def _registered(self, name: str) -> RegisteredModel:
        model = self._reader.model(name)
        if model is None:
            raise unknown_stream(name, self._connection)
        return model

    def _add_version(self, run_id: str, tags: dict[str, str], contents: Contents,
                     record: Registration) -> int:
        """Uploads the model and creates a version of it, with its tags, in one transaction."""
        from mlflow.models import Model

        from partialhn.checkpoints import shared

        run = self._client.get_run(run_id)
        logged = self._client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=run_id, tags=record.tags(),
            model_type="partialhn")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            place = models_folder(logged.artifact_location)
            home, parts = self._storage.path_of(place), contents.parts()
            shares = bool(parts and home and not self._is_server)
            if shares and home and contents.read:
                shared.copy_objects(parts, contents.read, self._storage.filesystem, home)
            elif parts and contents.read:
                shared.complete(contents.checkpoint, contents.read)
            package.write(path, Model(artifact_path=logged.artifact_location, run_id=run_id,
                                      model_uuid=logged.model_id, model_id=logged.model_id),
                          contents, f"{place}/{shared.OBJECTS}" if shares else None)
            tags = tags | {FILES: json.dumps(package.file_hashes(path))}
            self._client.log_model_artifacts(logged.model_id, str(path))
        self._client.finalize_logged_model(logged.model_id, "READY")
        # without a server, MLflow would resolve models:/... in its default database
        source = f"models:/{logged.model_id}" if self._is_server else logged.artifact_location
        version = self._client.create_model_version(record.stream, source=source, run_id=run_id,
                                                    tags=tags, model_id=logged.model_id)
        return int(version.version)


def models_folder(source: str) -> str:
    """The folder of all models of a stream, from the URI of one: <folder>/models/<id>/artifacts."""
    return source.rpartition("/models/")[0]


def _decision_tags(decision: Mapping[str, Any] | None) -> dict[str, str]:
    if decision is None:
        return {}
    return {GATE: "passed" if decision["passed"] else "failed", DECISION: json.dumps(decision)}


def _person_chose_another(entries: Sequence[Entry], alias: str, number: int) -> bool:
    """Whether a person moved the alias from this version to another one.

    Starting the same training again must not undo a rollback.
    """
    moves = [entry.move for entry in entries if entry.move.alias == alias]
    return (bool(moves) and moves[-1].kind in BY_HAND
            and any(move.to == number for move in moves))


def _listed(names: Any) -> str:
    return ", ".join(map(str, sorted(names))) or "none"
