"""Checkpoints: a folder of safetensors and JSON, written whole or not at all, read strictly.

    model.safetensors   every tensor by name
    model.json          the fields, and the SHA-256 of the tensors file; written last

Nothing is ever pickled, so loading a checkpoint cannot run code.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from partialhn.backbone import Trunk, build_network, hash_tensors, tensors_below
from partialhn.config import Config
from partialhn.errors import IntegrityError
from partialhn.model import Head, head_start
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.task_inference import TaskInference

FORMAT = 1
TENSORS, FIELDS = "model.safetensors", "model.json"


def save(folder: Path, kind: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Writes a checkpoint folder; an older one of the same name is replaced."""
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
              draft / TENSORS)
    digest = hashlib.sha256((draft / TENSORS).read_bytes()).hexdigest()
    head = {"format": FORMAT, "kind": kind, "tensors_sha256": digest}
    (draft / FIELDS).write_text(json.dumps(head | fields, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    draft.replace(folder)


def upload(folder: Path, filesystem: pafs.FileSystem, target: str) -> None:
    """Copies a checkpoint folder to any filesystem, the fields last: without them it is nothing.

    Older fields go first, so that a copy that is cut short never mixes the two.
    """
    local = isinstance(filesystem, pafs.LocalFileSystem)
    if local:
        Path(target).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{target}/{FIELDS}")
    for name in (TENSORS, FIELDS):
        path = f"{target}/{name}"
        draft = f"{path}.draft" if local else path  # S3 shows an object when it is whole
        with filesystem.open_output_stream(draft) as sink:
            sink.write((folder / name).read_bytes())
        if local:
            filesystem.move(draft, path)


def fetch(filesystem: pafs.FileSystem, source: str, folder: Path) -> bool:
    """Copies a checkpoint folder from any filesystem; False where there is no whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FIELDS, TENSORS):
        try:
            with filesystem.open_input_file(f"{source}/{name}") as stream:
                (folder / name).write_bytes(stream.readall())
        except FileNotFoundError:
            return False
    return True


def read_fields(filesystem: pafs.FileSystem, source: str) -> dict[str, Any] | None:
    """The fields of a checkpoint folder on any filesystem, without its tensors; None: not there.

    Raises: IntegrityError for fields that cannot be read.
    """
    try:
        with filesystem.open_input_file(f"{source}/{FIELDS}") as stream:
            fields = json.loads(bytes(stream.readall()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IntegrityError(f"checkpoint {source} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise IntegrityError(f"checkpoint {source} is damaged: {FIELDS} holds no fields")
    return fields


def load(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint folder.

    Raises: IntegrityError where a file is missing, damaged, or of another kind or format.
    """
    try:
        fields = json.loads((folder / FIELDS).read_text(encoding="utf-8"))
        found = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"checkpoint {folder} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise IntegrityError(f"checkpoint {folder} is damaged: {FIELDS} holds no fields")
    if fields.get("format") != FORMAT or fields.get("kind") != kind:
        raise IntegrityError(f"checkpoint {folder} is of kind {fields.get('kind')!r} in format "
                             f"{fields.get('format')!r}; expected {kind!r} in {FORMAT}")
    wanted = str(fields.get("tensors_sha256"))
    if found != wanted:
        raise IntegrityError(f"checkpoint {folder} is damaged: {TENSORS} has sha256 "
                             f"{found[:12]}..., expected tensors_sha256 {wanted[:12]}...")
    try:
        return load_file(folder / TENSORS), fields
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"checkpoint {folder} is damaged: {TENSORS} is no safetensors file: "
                             f"{error}") from error


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What a model knows of one of its tasks."""

    name: str
    classes: tuple[str, ...]


@dataclasses.dataclass
class Model:
    """A whole trained model: trunk, head weights of every task, and what they were made with."""

    config: Config
    trunk: Trunk
    strategy: Strategy
    tasks: tuple[TaskInfo, ...]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Whatever else is worth keeping: stream name, accuracy rows, feature keys."""
    inference: TaskInference | None = None
    """Finds the task of an image where it is not given; None in models made without it."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of trunk, strategy and task inference by name."""
        inference = self.inference.tensors() if self.inference else {}
        return ({f"trunk.{key}": value for key, value in self.trunk.state_dict().items()}
                | {f"strategy.{key}": value for key, value in self.strategy.state_dict().items()}
                | {f"inference.{key}": value for key, value in inference.items()})

    def weights_hash(self) -> str:
        """SHA-256 over all tensors: equal hashes answer equally."""
        return hash_tensors(self.tensors())

    def save(self, folder: Path) -> None:
        """Writes the model as a checkpoint folder."""
        save(folder, "model", self.tensors(), {
            "config": self.config.to_dict(),
            "tasks": [{"name": task.name, "classes": list(task.classes)} for task in self.tasks],
            "weights_hash": self.weights_hash(),
            "facts": self.facts})

    @staticmethod
    def load(folder: Path) -> "Model":
        """Reads a model back; every tensor must be there, fit, and hash to what was saved."""
        tensors, fields = load(folder, "model")
        try:
            config = Config.from_dict(fields["config"])
            tasks = tuple(TaskInfo(task["name"], tuple(task["classes"]))
                          for task in fields["tasks"])
            trunk, strategy = empty_parts(config)
            for index, task in enumerate(tasks):
                strategy.add_task(len(task.classes))
                strategy.finish(index)
            trunk.load_state_dict(tensors_below(tensors, "trunk."), strict=True)
            strategy.load_state_dict(tensors_below(tensors, "strategy."), strict=True)
            found = tensors_below(tensors, "inference.")
            inference = TaskInference.from_tensors(found, len(tasks)) if found else None
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError,
                OverflowError) as error:  # InputError is a ValueError
            raise IntegrityError(f"checkpoint {folder} does not fit this version: {error}"
                                 ) from error
        model = Model(config, trunk, strategy.requires_grad_(False).eval(), tasks,
                      fields.get("facts", {}), inference)
        if model.weights_hash() != fields.get("weights_hash"):
            raise IntegrityError(f"checkpoint {folder} holds other weights than it was saved with")
        return model


def empty_parts(config: Config) -> tuple[Trunk, Strategy]:
    """Trunk and strategy of the configured shapes; their weights are still to be loaded."""
    network = build_network(config.backbone.backbone, classes=2)
    depth, norm = config.backbone.freeze_depth, config.hypernet.norm
    head = Head(network, depth, norm, config.hypernet.norm_groups)
    start = head_start(network, depth, norm, 0)
    return Trunk(network, depth), STRATEGIES[config.train.strategy](head, start, config)
