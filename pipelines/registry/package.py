"""A registered version as a folder: MLflow's "models from code" around a checkpoint.

    MLmodel, conda.yaml, requirements.txt, input_example.json   MLflow's own
    pyfunc_model.py                                             the serving script
    artifacts/<checkpoint>/model.safetensors, model.json        the model
    artifacts/sample.parquet                                    test images with known answers

Nothing in it is pickled.
"""

import dataclasses
import hashlib
import io
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn import __version__
from partialhn.errors import IntegrityError

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MAX_EXAMPLE_BYTES = 32 * 1024
REQUIREMENTS = ("torch", "torchvision", "numpy", "pandas", "pillow", "pyarrow", "pyyaml",
                "safetensors", "mlflow")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a version's folder is made of."""

    checkpoint: Path
    """Local checkpoint folder of the model."""
    task: str
    image: bytes
    """An encoded image of the task, for the input example."""
    sample: Path | None = None
    """Test images with known answers, as `partialhn.evaluation.answer_sample` writes them."""


def write(path: Path, model: Any, contents: Contents) -> None:
    """Writes the folder; `model` is the MLflow `Model` that it belongs to."""
    import mlflow.pyfunc
    import pandas as pd

    example = pd.DataFrame({"image": [_small(contents.image)], "task": [contents.task]})
    artifacts = {"checkpoint": str(contents.checkpoint)}
    if contents.sample:
        artifacts["sample"] = str(contents.sample)
    mlflow.pyfunc.save_model(
        path, mlflow_model=model, python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts=artifacts, pip_requirements=_requirements(), signature=signature(),
        input_example=example)


def artifact(folder: Path, name: str) -> Path:
    """Where a downloaded version keeps `checkpoint` or `sample`, as its MLmodel file says.

    Raises: IntegrityError where it says nothing, or leaves the folder.
    """
    from mlflow.models import Model

    try:
        saved = Model.load(str(folder)).flavors["python_function"]["artifacts"]
        path: Path = (folder / saved[name]["path"]).resolve()
    except Exception as error:  # whatever a damaged YAML file makes of MLflow's reader
        raise IntegrityError(f"version in {folder} names no {name}: {error!r}") from error
    if not path.is_relative_to(folder.resolve()):
        raise IntegrityError(f"version in {folder} has its {name} outside, at {path}")
    return path


def has_artifact(folder: Path, name: str) -> bool:
    """Whether a downloaded version has this artifact at all."""
    from mlflow.models import Model

    return name in Model.load(str(folder)).flavors.get("python_function", {}).get("artifacts", {})


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path below the folder, but for what MLflow adds on download."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "registered_model_meta"}


def signature() -> "ModelSignature":
    """What a version takes and gives, by name and type."""
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
