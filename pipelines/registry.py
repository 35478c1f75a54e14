"""The MLflow registry: runs, metrics, and one registered model version for each task.

The only file that talks to MLflow; only the driver uses it. One parent run for each stream, one
child run for each task, one version for each task under the stream's name, with the aliases
`champion` (the newest) and `task-<name>` (the version that introduced a task). Everything is
found again by what it is (work, task, weights hash), so a run that was interrupted and started
again makes nothing twice. MLflow is imported when first used: importing it takes seconds.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import tempfile
import typing
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn import __version__
from partialhn.errors import InputError
from pipelines.matrix import Matrix, matrix_csv, matrix_figure
from pipelines.storage import Storage
from pipelines.versions import CHAMPION, Registration, Version, task_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

    from partialhn.predict import Predictor

MAX_PARAM = 6000
"""Characters MLflow keeps of a parameter; a longer one ends in its hash."""
MAX_EXAMPLE_BYTES = 32 * 1024
REQUIREMENTS = ("torch", "torchvision", "numpy", "pandas", "pillow", "pyarrow", "pyyaml",
                "safetensors", "mlflow")
_EPOCH_KEYS = ("loss", "cross_entropy", "regulariser", "accuracy", "validation_accuracy", "seconds")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def default_tracking_uri(storage: Storage) -> str:
    """SQLite in the storage folder, or in the working folder when the storage is remote."""
    folder = Path(storage.root) if storage.is_local else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def connect(storage: Storage, tracking_uri: str | None = None, create: bool = True) -> "Registry":
    """Connects to MLflow: `tracking_uri`, else MLFLOW_TRACKING_URI, else SQLite at the storage.

    A new SQLite database is set up here, once, under a lock. With `create=False` a database that
    does not exist is an InputError: nothing is registered there.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(storage)
    database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if database and not create and not database.exists():
        raise InputError(f"no registry at {uri}; give the --storage or --tracking-uri that "
                         "`partialhn train` was given")
    if storage.s3 and storage.s3.endpoint:  # MLflow's own uploads know the endpoint by these only
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", storage.s3.endpoint)
        if storage.s3.path_style:
            os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    _quiet()
    try:
        _check_server(uri)
        with _exclusive(database) if database else contextlib.nullcontext():
            client = MlflowClient(tracking_uri=uri)
            client.search_registered_models(max_results=1)
    except (MlflowException, OSError, ImportError) as error:
        raise InputError(f"MLflow at {uri!r} does not answer: {error}; allowed: an http(s):// "
                         "server, sqlite:///file or another database") from error
    return Registry(client, uri, storage)


class Registry:
    """MLflow as this project uses it, through one explicit client."""

    def __init__(self, client: "MlflowClient", tracking_uri: str, storage: Storage) -> None:
        self._client, self.tracking_uri, self._storage = client, tracking_uri, storage
        self._is_server = tracking_uri.startswith(("http://", "https://"))

    # Runs ------------------------------------------------------------------------------------

    def stream_run(self, name: str, work: str, config: Mapping[str, Any]) -> str:
        """The parent run of a stream's work, new or found again, with its configuration."""
        run_id = self._run(name, name, {"kind": "stream", "stream": name, "work": work})
        self._log_parameters(run_id, config)
        return run_id

    def task_run(self, parent_id: str, task: str, task_index: int,
                 parameters: Mapping[str, Any] | None = None) -> str:
        """The child run of one experience, new or found again."""
        parent = self._client.get_run(parent_id).data.tags
        tags = {"kind": "task", "stream": parent["stream"], "work": parent["work"], "task": task,
                "task_index": str(task_index), "mlflow.parentRunId": parent_id}
        run_id = self._run(parent["stream"], f"{task_index} {task}", tags)
        own = {"task": task, "task_index": task_index}
        self._log_parameters(run_id, own | dict(parameters or {}))
        return run_id

    def log_epochs(self, run_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Metrics of epochs (dicts as in result.json), one batch; epochs logged before stay."""
        done = {point.step for point in self._client.get_metric_history(run_id, "loss")}
        self._log_points(run_id, [(key, record[key], record["epoch"]) for record in records
                                  if record["epoch"] not in done
                                  for key in _EPOCH_KEYS if record.get(key) is not None])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Single values, for example acc and forgetting after each task (step = task index)."""
        self._log_points(run_id, [(key, value, step) for key, value in metrics.items()])

    def log_matrix(self, run_id: str, accuracy_matrix: Matrix, tasks: Sequence[str]) -> None:
        """The accuracy matrix as a figure (PNG) and tables (CSV, JSON), replacing earlier ones."""
        self._client.log_text(run_id, matrix_csv(accuracy_matrix, tasks), "accuracy_matrix.csv")
        self._client.log_dict(run_id, {"tasks": list(tasks), "accuracy_matrix":
                                       [list(row) for row in accuracy_matrix]},
                              "accuracy_matrix.json")
        self._client.log_figure(run_id, matrix_figure(accuracy_matrix, tasks),
                                "accuracy_matrix.png")

    def log_file(self, run_id: str, path: str | Path) -> None:
        """A local file, for example report.html, as an artifact of the run."""
        self._client.log_artifact(run_id, str(path))

    def log_result(self, run_id: str, result: Mapping[str, Any]) -> None:
        """result.json as an artifact of the stream's run; `result()` reads it back."""
        self._client.log_dict(run_id, dict(result), "result.json")

    def end_run(self, run_id: str, failed: bool = False) -> None:
        """Marks a run as done."""
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    # Versions --------------------------------------------------------------------------------

    def register_task(self, run_id: str, record: Registration, checkpoint: str | Path,
                      example_image: bytes) -> Version:
        """Registers the model after a task, once: the same work, task and weights are one version.

        `checkpoint` is the local checkpoint folder, `example_image` an encoded image of the task.
        Aliases move to this version unless a later task of the same work holds them.
        """
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it exists
            self._client.create_registered_model(record.stream, tags={"product": "partialhn"})
        versions = self.versions(record.stream)
        same = [v for v in versions if v.tags.get("work") == record.work
                and v.task_index == record.task_index
                and v.tags.get("weights_hash") == record.weights_hash]
        number = same[0].version if same else self._add_version(run_id, record, checkpoint,
                                                                example_image)
        for alias in (CHAMPION, task_alias(record.task)):
            holder = next((v for v in versions if alias in v.aliases), None)
            if (holder is None or holder.tags.get("work") != record.work
                    or holder.task_index <= record.task_index):
                self._client.set_registered_model_alias(record.stream, alias, str(number))
        return next(v for v in self.versions(record.stream) if v.version == number)

    def versions(self, name: str) -> list[Version]:
        """All versions of a stream that this product registered, oldest first."""
        aliases: dict[int, list[str]] = {}
        for alias, number in self._registered(name).aliases.items():
            aliases.setdefault(int(number), []).append(alias)
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [Version(name, int(v.version), v.run_id or "",
                              tuple(sorted(aliases.get(int(v.version), []))), dict(v.tags))
                      for v in page if "task_index" in v.tags]
            if not (token := page.token):
                return sorted(found, key=lambda v: v.version)

    def version_of(self, name: str, prefix: str) -> Version | None:
        """The version of the model after a task, by its place in the chain; None: not there."""
        with contextlib.suppress(InputError):  # nothing of the stream is registered yet
            return next((v for v in self.versions(name) if v.tags.get("prefix") == prefix), None)
        return None

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
        from mlflow.artifacts import download_artifacts
        from mlflow.models import Model

        from partialhn.predict import Predictor

        version = self.resolve(model_uri)
        source = self._client.get_model_version_download_uri(version.stream, str(version.version))
        with tempfile.TemporaryDirectory() as folder:
            model = Path(download_artifacts(artifact_uri=source, dst_path=folder,
                                            tracking_uri=self.tracking_uri))
            saved = Model.load(str(model)).flavors["python_function"]["artifacts"]
            return Predictor.load(model / saved["checkpoint"]["path"]), version

    def result(self, name: str) -> dict[str, Any]:
        """The result.json of the champion's run of a stream.

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
            return typing.cast(dict[str, Any], json.loads(Path(path).read_text(encoding="utf-8")))

    # Inside ----------------------------------------------------------------------------------

    def _registered(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            streams = [m.name for m in self._client.search_registered_models()]
            raise InputError(f"no stream {name!r} in the registry {self.tracking_uri}; there: "
                             + _listed(streams)) from error

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self._is_server else self._storage.uri_of("mlartifacts", name)
            return str(self._client.create_experiment(name, artifact_location=location))
        if experiment.lifecycle_stage == "deleted":
            raise InputError(f"MLflow experiment {name!r} was deleted; take another name or "
                             f"`mlflow experiments restore -x {experiment.experiment_id}`")
        return str(experiment.experiment_id)

    def _run(self, stream: str, run_name: str, tags: dict[str, str]) -> str:
        """The run with these tags, running."""
        experiment = self._experiment(stream)
        where = " and ".join(f"tags.`{key}` = '{tags[key]}'"
                             for key in ("kind", "work", "task_index") if key in tags)
        found = self._client.search_runs([experiment], where, max_results=1)
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._client.create_run(experiment, tags=tags, run_name=run_name).info.run_id
        return str(run_id)

    def _log_parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Nested values as section.key parameters, whole in config.json; the first ones stay."""
        from mlflow.entities import Param

        there = self._client.get_run(run_id).data.params
        params = [Param(key, _parameter(value)) for key, value in _flat(values)]
        new = [param for param in params if param.key not in there]
        for start in range(0, len(new), 100):
            self._client.log_batch(run_id, params=new[start:start + 100])
        if new:
            self._client.log_dict(run_id, dict(values), "config.json")

    def _log_points(self, run_id: str, points: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [Metric(key, float(value), now, step) for key, value, step in points]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[start:start + 1000])

    def _add_version(self, run_id: str, record: Registration, checkpoint: str | Path,
                     example_image: bytes) -> int:
        """Uploads the model and makes a version of it, tags and all, in one transaction."""
        from mlflow.models import Model

        tags, run = record.tags(), self._client.get_run(run_id)
        logged = self._client.create_logged_model(
            run.info.experiment_id, name="model", source_run_id=run_id, tags=tags,
            model_type="partialhn")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            _save_model(path, Model(artifact_path=logged.artifact_location, run_id=run_id,
                                    model_uuid=logged.model_id, model_id=logged.model_id),
                        checkpoint, record.task, example_image)
            self._client.log_model_artifacts(logged.model_id, str(path))
        self._client.finalize_logged_model(logged.model_id, "READY")
        # a database is asked directly and would look for models:/... in the default one
        source = f"models:/{logged.model_id}" if self._is_server else logged.artifact_location
        version = self._client.create_model_version(record.stream, source=source, run_id=run_id,
                                                    tags=tags, model_id=logged.model_id)
        return int(version.version)


def _save_model(path: Path, model: Any, checkpoint: str | Path, task: str, image: bytes) -> None:
    """An MLflow model folder: the serving script, the checkpoint, signature and example."""
    import mlflow.pyfunc
    import pandas as pd

    example = pd.DataFrame({"image": [_small(image)], "task": [task]})
    folder = Path(checkpoint)
    mlflow.pyfunc.save_model(
        path, mlflow_model=model, python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"checkpoint": str(folder)}, pip_requirements=_requirements(),
        signature=_signature(), input_example=example)


def _signature() -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "task")]),
        outputs=Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability"),
                        ColSpec(Array(DataType.string), "classes"),
                        ColSpec(Array(DataType.double), "probabilities")]))


def _requirements() -> list[str]:
    """This package and what it needs, at the installed versions (without +cu128 and the like)."""
    return [f"partialhn=={__version__}",
            *(f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS)]


def _small(image: bytes) -> bytes:
    """The image, made small if it is large: an example is copied into every version."""
    if len(image) <= MAX_EXAMPLE_BYTES:
        return image
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(image)) as picture:
        picture.thumbnail((64, 64))
        picture.convert("RGB").save(small, "PNG")
    return small.getvalue()


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
    end = f"... sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}, whole in config.json"
    return text[:MAX_PARAM - len(end)] + end


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _quiet() -> None:
    """MLflow's and its migrations' progress lines are no news to our users; warnings are."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic", "matplotlib"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # it warns where pip is not installed, as in an environment made by uv
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def _check_server(uri: str) -> None:
    """Fails within seconds where no server is; MLflow alone would try again for minutes."""
    if uri.startswith(("http://", "https://")):
        # an HTTPError is an answer too, if only a request for credentials
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=15).close()


@contextlib.contextmanager
def _exclusive(database: Path) -> Iterator[None]:
    """One process at a time sets up a database: MLflow's migrations race."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
