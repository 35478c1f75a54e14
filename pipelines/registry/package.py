"""The folder of a registered version: a checkpoint in MLflow's "models from code" format.

    MLmodel, conda.yaml, requirements.txt, input_example.json   MLflow's own
    pyfunc_model.py                                             the serving script
    artifacts/<checkpoint>/model.json                           the model; its tensors lie in
                                                                objects/, which versions share
    artifacts/sample.parquet                                    test images with predictions

Nothing in it is pickled.
"""

import contextlib
import dataclasses
import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from partialhn import __version__
from partialhn.checkpoints import FIELDS
from partialhn.errors import IntegrityError
from partialhn.json_files import read_object

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from partialhn.checkpoints import shared

MAX_EXAMPLE_BYTES = 32 * 1024
REQUIREMENTS = ("torch", "torchvision", "numpy", "pandas", "pillow", "pyarrow", "pyyaml",
                "safetensors", "mlflow")


@dataclasses.dataclass(frozen=True)
class Contents:
    """The parts of a version's folder that come from this project."""

    checkpoint: Path
    """Local checkpoint folder of the model; the tensors that it shares may be missing."""
    task: str
    image: bytes
    """An encoded image of the task, for the input example."""
    sample: Path | None = None
    """Test images with the model's predictions (`partialhn.evaluation.answer_sample`)."""
    read: "shared.Read | None" = None
    """Reads the tensors that the model shares with others; None for one that shares none."""

    def parts(self) -> list[str]:
        """The shared objects that the model needs; empty where it has to be stored whole."""
        from partialhn.checkpoints import shared  # torch takes seconds to import

        if self.read is None:
            return []
        return shared.parts_of(read_object(self.checkpoint / FIELDS, "checkpoint"))


def write(path: Path, model: Any, contents: Contents, objects: str | None = None) -> None:
    """Writes the folder of the MLflow `Model` that is given as `model`.

    objects: URI of the folder with the model's shared tensors, which are then left out.
    """
    import mlflow.pyfunc
    import pandas as pd

    example = pd.DataFrame({"image": [_small(contents.image)], "task": [contents.task]})
    artifacts = {"checkpoint": str(contents.checkpoint)}
    if objects is not None:
        alone = path.parent / "fields" / contents.checkpoint.name
        alone.mkdir(parents=True)
        shutil.copy(contents.checkpoint / FIELDS, alone)
        artifacts["checkpoint"] = str(alone)
    if contents.sample:
        artifacts["sample"] = str(contents.sample)
    with _requirements_taken_as_given():
        mlflow.pyfunc.save_model(
            path, mlflow_model=model, python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts=artifacts, pip_requirements=_requirements(), signature=signature(),
            input_example=example, model_config=None if objects is None else {"objects": objects})


def artifact(folder: Path, name: str) -> Path:
    """Path of a downloaded version's artifact (`checkpoint` or `sample`), from its MLmodel file.

    Raises: IntegrityError if the file does not name it, or names a path outside of the folder.
    """
    try:
        path: Path = (folder / _artifacts(folder)[name]["path"]).resolve()
    except Exception as error:  # a damaged YAML file can hold anything
        raise IntegrityError(f"the MLmodel file in {folder} names no {name}: {error!r}") from error
    if not path.is_relative_to(folder.resolve()):
        raise IntegrityError(f"the MLmodel file in {folder} places its {name} outside of that "
                             f"folder, at {path}")
    return path


def has_artifact(folder: Path, name: str) -> bool:
    """Whether a downloaded version has an artifact of this name."""
    return name in _artifacts(folder)


def _artifacts(folder: Path) -> dict[str, Any]:
    """The artifacts that a version's MLmodel file lists, by name; MLflow is not imported."""
    model = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    found: dict[str, Any] = model["flavors"]["python_function"].get("artifacts", {})
    return found


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder; files that MLflow adds are left out."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "registered_model_meta"}


def difference(registered: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """The first difference between the registered hashes of a folder and those found, in words.

    Empty if there is none.
    """
    for path in sorted(registered.keys() | hashes.keys()):
        if path not in hashes:
            return f"{path} is missing"
        if path not in registered:
            return f"{path} was added after the registration"
        if hashes[path] != registered[path]:
            return (f"{path} was changed: sha256 {hashes[path][:12]}..., registered "
                    f"{registered[path][:12]}...")
    return ""


def signature() -> "ModelSignature":
    """Names and types of a version's input and output columns."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image"), ColSpec(DataType.string, "task")]),
        outputs=Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability"),
                        ColSpec(Array(DataType.string), "classes"),
                        ColSpec(Array(DataType.double), "probabilities")]))


def _requirements() -> list[str]:
    """This package and its dependencies at the installed versions, without suffixes as +cu128."""
    return [f"partialhn=={__version__}",
            *(f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS)]


@contextlib.contextmanager
def _requirements_taken_as_given() -> Iterator[None]:
    """Spares MLflow's comparison of the requirements with what is installed: they are the installed
    versions, and for the comparison MLflow lists every file of every installed package.
    """
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    compare = getattr(environment, name, None)
    if compare is None:  # another release of MLflow, which may do without
        yield
        return
    setattr(environment, name, lambda _: None)
    try:
        yield
    finally:
        setattr(environment, name, compare)


def _small(image: bytes) -> bytes:
    """The image, reduced if it is large, because every version contains a copy of the example."""
    if len(image) <= MAX_EXAMPLE_BYTES:
        return image
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(image)) as picture:
        picture.thumbnail((64, 64))
        picture.convert("RGB").save(small, "PNG")
    return small.getvalue()
