"""Is a registered version what it was when it was registered? Asked in a clean process.

The files are held against the hashes in the registry first, so nothing that was changed in the
artifact store is ever loaded. Then a process of its own, without credentials and with unpickling
forbidden, loads the version as MLflow serves it and answers the stored sample:

    python -m pipelines.registry.verify FOLDER      prints what it found as JSON
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
from pipelines.registry import package
from pipelines.registry.client import Registry
from pipelines.registry.versions import FILES, Version

TIMEOUT_SECONDS = 900.0
SECRET = ("AWS_", "MLFLOW_", "AZURE_", "GOOGLE_", "DATABRICKS_")
"""First letters of variables that the clean process does not get."""
MARK = "partialhn-verify: "


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was held against what the registry says."""

    name: str
    passed: bool
    found: str


def verify(registry: Registry, version: Version) -> list[Check]:
    """Checks files, weights hash, signature and the answers on the stored sample, in this order.

    After a file that is not as registered nothing is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = registry.download(version, folder)
        except Exception as error:  # the artifact store's clients raise anything
            return [Check("files", False, f"cannot be fetched: {error}")]
        files = _check_files(version, package.file_hashes(model))
        return [files, *_check_loaded(version, model)] if files.passed else [files]


def _check_files(version: Version, found: dict[str, str]) -> Check:
    if FILES not in version.tags:
        return Check("files", True, "registered without hashes of its files, by an older release")
    wanted = json.loads(version.tags[FILES])
    for path in sorted(wanted.keys() | found.keys()):
        if path not in found:
            return Check("files", False, f"{path} is missing")
        if path not in wanted:
            return Check("files", False, f"{path} was added after the registration")
        if found[path] != wanted[path]:
            return Check("files", False, f"{path} was changed: sha256 {found[path][:12]}..., "
                                         f"registered {wanted[path][:12]}...")
    return Check("files", True, f"{len(found)} files as registered")


def _check_loaded(version: Version, model: Path) -> list[Check]:
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(SECRET)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.registry.verify", str(model)], capture_output=True,
        text=True, timeout=TIMEOUT_SECONDS, cwd=model.parent,
        env=environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
                           "MLFLOW_DISABLE_TELEMETRY": "true",
                           "MLFLOW_TRACKING_URI": f"sqlite:///{model.parent}/none.db"})
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Check("loads", False, reason)]
    found = json.loads(said[-1].removeprefix(MARK))
    wanted = version.tags["weights_hash"]
    checks = [Check("weights", found["weights_hash"] == wanted,
                    f"hash {found['weights_hash'][:12]}..., registered {wanted[:12]}..."),
              Check("signature", found["signature_ok"], found["signature"])]
    sample = found["sample"]
    if sample is None:
        return [*checks, Check("sample", True, "registered without a sample of test images")]
    return [*checks, Check(
        "sample", sample["differing"] == 0,
        f"accuracy {sample['accuracy']:.3f} on {sample['images']} images, registered "
        f"{sample['expected_accuracy']:.3f}; {sample['differing']} answered otherwise")]


def inspect(folder: Path) -> dict[str, Any]:
    """Loads a version's folder as MLflow serves it and says what it is. Runs in the clean process.

    Raises: IntegrityError for anything damaged, or anything that would be unpickled.
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

    checked = None
    if package.has_artifact(folder, "sample"):
        checked = dataclasses.asdict(check_sample(
            read_sample(package.artifact(folder, "sample")), answer))
    return {"weights_hash": weights, "sample": checked,
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
