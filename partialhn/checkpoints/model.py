"""A whole trained model, saved as a checkpoint folder and loaded strictly."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints.checkpoint import load, save
from partialhn.config import Config
from partialhn.errors import IntegrityError
from partialhn.networks.backbone import build_network
from partialhn.networks.head import Head, head_start
from partialhn.networks.tensors import hash_tensors, tensors_below
from partialhn.networks.trunk import Trunk
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.task_inference import TaskInference


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
