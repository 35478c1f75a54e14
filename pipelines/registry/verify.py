"""Verifies in a clean process that a registered version has not changed since its registration.

First the files are compared with the hashes in the registry, so that a file that was changed in
the artifact store is never loaded. Then a separate process, without credentials and with unpickling
forbidden, loads the version as MLflow serves it and predicts the stored sample:

    python -m pipelines.registry.verify FOLDER      prints its results as JSON
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from partialhn.errors import IntegrityError
from partialhn.numbers import counted
from pipelines.registry import package
from pipelines.registry.client import Registry
from pipelines.registry.versions import FILES, Version

TIMEOUT_SECONDS = 900.0
SECRET = ("AWS_", "MLFLOW_", "AZURE_", "GOOGLE_", "DATABRICKS_")
"""Prefixes of environment variables that the clean process does not get."""
MARK = "partialhn-verify: "


@dataclasses.dataclass(frozen=True)
class VersionCheck:
    """The result of comparing one property of a version with the registry."""

    name: str
    """The property: files, loads, weights, signature or sample."""
    passed: bool
    found: str
    """The value found, in words."""


def verify(registry: Registry, version: Version) -> list[VersionCheck]:
    """Checks files, weights hash, signature and predictions on the stored sample, in this order.

    If a file differs from the registered one, nothing is loaded. Raises: InputError where the
    artifact store does not answer or denies access.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = registry.files(version, folder)
        except Exception as error:  # the artifact store's clients can raise anything
            registry.require_reach(version, error)
            return [VersionCheck("files", False, f"cannot be downloaded: {error}")]
        files = _check_files(version, package.file_hashes(model))
        try:
            if files.passed:
                registry.complete(version, model)
        except IntegrityError as error:
            files = VersionCheck("files", False, str(error))
        return [files, *_check_loaded(version, model)] if files.passed else [files]


def _check_files(version: Version, hashes: dict[str, str]) -> VersionCheck:
    if FILES not in version.tags:
        return VersionCheck("files", True, "an older release registered it without file hashes")
    found = package.difference(json.loads(version.tags[FILES]), hashes)
    return VersionCheck("files", not found, found or f"{len(hashes)} files as registered")


def _check_loaded(version: Version, model: Path) -> list[VersionCheck]:
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(SECRET)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.registry.verify", str(model)], capture_output=True,
        text=True, timeout=TIMEOUT_SECONDS, cwd=model.parent,
        env=environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                           "MLFLOW_DISABLE_TELEMETRY": "true",
                           "MLFLOW_TRACKING_URI": f"sqlite:///{model.parent}/none.db"})
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not results:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [VersionCheck("loads", False, reason)]
    found = json.loads(results[-1].removeprefix(MARK))
    registered = version.tags["weights_hash"]
    checks = [VersionCheck("weights", found["weights_hash"] == registered,
                    f"hash {found['weights_hash'][:12]}..., registered {registered[:12]}..."),
              VersionCheck("signature", found["signature_ok"], found["signature"])]
    sample = found["sample"]
    if sample is None:
        return [*checks, VersionCheck("sample", True, "registered without a sample of test images")]
    return [*checks, VersionCheck(
        "sample", sample["differing"] == 0,
        f"accuracy {sample['accuracy']:.3f} on {counted(sample['images'], 'image')}, registered "
        f"{sample['expected_accuracy']:.3f}; {sample['differing']} predictions differ")]


def inspect(folder: Path) -> dict[str, Any]:
    """Loads a version's folder as MLflow serves it; returns hash, signature and sample results.

    Runs in the clean process. Raises: IntegrityError for damaged files, or if anything would be
    unpickled.
    """
    import mlflow.pyfunc
    import pandas as pd

    from partialhn.checkpoints.model import Model
    from partialhn.evaluation.answer_sample import check_sample, read_sample

    sys.addaudithook(_no_pickle)
    weights = Model.load(package.artifact(folder, "checkpoint")).weights_hash()
    loaded = mlflow.pyfunc.load_model(str(folder))
    signature = loaded.metadata.signature

    def answer(images: list[bytes], task: str) -> tuple[list[str], list[float]]:
        rows = loaded.predict(pd.DataFrame({"image": images, "task": [task] * len(images)}))
        return rows["label"].tolist(), rows["probability"].tolist()

    sample = None
    if package.has_artifact(folder, "sample"):
        sample = dataclasses.asdict(check_sample(
            read_sample(package.artifact(folder, "sample")), answer))
    return {"weights_hash": weights, "sample": sample,
            "signature": "none" if signature is None else
            f"{_names(signature.inputs)} -> {_names(signature.outputs)}",
            "signature_ok": signature is not None
            and signature.to_dict() == package.signature().to_dict()}


def _names(schema: Any) -> str:
    return ", ".join(f"{column.name} ({column.type})" for column in schema)


def _no_pickle(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        raise IntegrityError(f"something in the version would be unpickled: {arguments}")


if __name__ == "__main__":
    print(MARK + json.dumps(inspect(Path(sys.argv[1]))))
