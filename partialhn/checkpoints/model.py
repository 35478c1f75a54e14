"""A complete trained model, saved as a checkpoint folder and loaded strictly."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints.checkpoint import load, save
from partialhn.config import Config
from partialhn.detector.detector import Detector
from partialhn.errors import IntegrityError
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import Head, head_start
from partialhn.networks.tensors import hash_tensors, tensors_below
from partialhn.networks.trunk import Trunk
from partialhn.pixels import Pixels
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.task_inference import Inference, stored_inference


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Name and classes of one of a model's tasks."""

    name: str
    classes: tuple[str, ...]


@dataclasses.dataclass
class Model:
    """A complete trained model: trunk, head weights of every task, and their configuration."""

    config: Config
    trunk: Trunk
    strategy: Strategy
    tasks: tuple[TaskInfo, ...]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further facts to keep with the model: stream name, accuracy rows, feature keys."""
    inference: Inference | None = None
    """Infers the task of an image when the caller gives none; None in models trained without it."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of trunk, strategy and task inference, by name."""
        inference = self.inference.tensors() if self.inference else {}
        return ({f"trunk.{key}": value for key, value in self.trunk.state_dict().items()}
                | {f"strategy.{key}": value for key, value in self.strategy.state_dict().items()}
                | {f"inference.{key}": value for key, value in inference.items()})

    def weights_hash(self) -> str:
        """SHA-256 over all tensors: models with equal hashes give equal predictions."""
        return hash_tensors(self.tensors(), self.trunk.pixels.geometry)

    def save(self, folder: Path) -> None:
        """Writes the model as a checkpoint folder."""
        save(folder, "model", self.tensors(), self.fields())

    def fields(self) -> dict[str, Any]:
        """The fields of the model's checkpoint, beside those that every checkpoint has."""
        return {
            "config": self.config.to_dict(),
            "tasks": [{"name": task.name, "classes": list(task.classes)} for task in self.tasks],
            "weights_hash": self.weights_hash(),
            "facts": self.facts,
            **({"pixels": self.trunk.pixels.fields()} if self.trunk.pixels.geometry else {})}

    @staticmethod
    def load(folder: Path) -> "Model":
        """Reads a checkpoint folder that `save` wrote.

        Raises: IntegrityError if a tensor is missing, does not fit, or the weights hash differs.
        """
        tensors, fields = load(folder, "model")
        try:
            config = Config.from_dict(fields["config"])
            tasks = tuple(TaskInfo(task["name"], tuple(task["classes"]))
                          for task in fields["tasks"])
            trunk, strategy = empty_parts(config)
            strategy.load_tasks([len(task.classes) for task in tasks],
                                tensors_below(tensors, "strategy."))
            trunk.load_state_dict(tensors_below(tensors, "trunk."), strict=True)
            trunk.pixels = Pixels.from_fields(fields.get("pixels", {}))
            trunk.arithmetic = config.backbone.trunk_arithmetic
            known = tensors_below(tensors, "inference.")
            empty = Detector(config.train.detector_features, config.train.false_alarms)
            inference = stored_inference(known, len(tasks), empty) if known else None
            if isinstance(inference, Detector):
                inference.see(strategy.eval())
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError,
                OverflowError) as error:  # InputError is a ValueError
            raise IntegrityError(f"checkpoint {folder} does not fit this version of partialhn: "
                                 f"{error}") from error
        model = Model(config, trunk, strategy.requires_grad_(False).eval(), tasks,
                      fields.get("facts", {}), inference)
        if model.weights_hash() != fields.get("weights_hash"):
            raise IntegrityError(f"checkpoint {folder} is damaged: the hash of its weights differs "
                                 "from its weights_hash")
        return model


def empty_parts(config: Config) -> tuple[Trunk, Strategy]:
    """Trunk and strategy of the configured shapes, whose weights must still be loaded."""
    network = build_network(config.backbone.backbone, 2, input_size=config.data.input_size)
    cut = CutNetwork.of(network, config.backbone.depth)
    options = config.hypernet
    head = Head(cut, options.norm, options.norm_groups, generate=options.generate)
    start = head_start(cut, options.norm, 0, options.generate)
    return cut.trunk, STRATEGIES[config.train.strategy](head, start, config)
