"""The base of every strategy: weights of the head for each task, learned one task at a time.

Legend: F features before the classifier, K classes of a task.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.batches import FeatureBatch
from partialhn.features.closed_form import LinearClassifier
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.draws import seeded
from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.networks.stored import StoredModules
from partialhn.strategies.table import Value, option_values

LINEAR_RATE = 10.0
"""Factor on the learning rate where the head is one linear layer: at the rate that suits
convolutions it is far from trained when the epochs are over
(`docs/measurements/learning-rates.md`)."""
NETWORK_RATE = 0.3
"""Factor on the learning rate where a head keeps the network's statistics: without those of the
batch, which cancel the size of the weights, the full rate diverges
(`docs/measurements/pretrained.md`)."""


class Strategy(nn.Module):
    """Owns all parameters that are learned over a stream, for a head that holds none.

    A subclass defines at least `new_task` and `weights`. A task is added with `add_task` and
    trained after `begin`, which freezes whatever must not change any more. `weights` gives the head
    weights of any task at any time. A strategy that needs other data than the running batch gets it
    in `before_experience` and `after_experience`.

    Args:
        head: applies weights to features; all strategies of a run share it.
        start: weights that the first head starts from.
        config: the whole configuration; a strategy reads the keys that it needs.
    """

    label = ""
    """Name in reports, for strategies of other packages; default: the name they are registered
    with."""
    needs_every_task = False
    """Whether each task needs the training features of all tasks before it, for strategies of
    other packages."""
    options: ClassVar[Mapping[str, Value]] = {}
    """Options of a strategy of another package, with their defaults; `settings` has the values."""
    takes_linear = False
    """Whether `take_linear` can replace a task's head."""
    closed_form = False
    """Whether `solve` learns a task at once; it then takes no gradient steps."""
    recordable = True
    """Whether all steps of an experience run the same operations on the same memory, so that a
    GPU may record a step and replay it."""

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__()
        self.head, self.start, self.seed = head, start, config.train.seed
        self.settings = option_values(type(self).options, config.train.strategy_options)
        self.classes: list[int] = []
        self.tasks = StoredModules()

    def add_task(self, classes: int, refreshes: int | None = None) -> None:
        """Adds a task with K = `classes`, initialised from the seed and the task's position.

        refreshes: the earlier slot of the same task, from which the new one starts.

        Raises: InputError for less than one class.
        """
        if classes < 1:
            raise InputError(f"a task has {classes} classes; allowed: 1 or more")
        with seeded(self.seed * 1_000_003 + len(self.classes)):
            own = self.new_task(classes, refreshes)
        if refreshes is not None:
            own.take_classifier(cast(Classifier, self.tasks[refreshes]))
        self.tasks.append(own)
        self.classes.append(classes)

    def new_task(self, classes: int, refreshes: int | None) -> "Classifier":
        """The parameters that belong to the new task alone."""
        raise NotImplementedError

    def begin(self, task: int) -> None:
        """Prepares training of one task: earlier tasks' own parameters are frozen."""
        for index, module in self.tasks.made():
            module.requires_grad_(index == task)

    def before_experience(self, earlier: Sequence[tuple[str, FeatureSet | None]]) -> None:
        """Receives name and training features of each earlier task before an experience starts or
        goes on. The features are None where they are no longer stored.
        """

    def after_experience(self, task: int, features: FeatureSet, seed: Sequence[int]) -> None:
        """Keeps what later tasks need of the training features of a task that has been trained."""

    def solve(self, task: int, features: FeatureSet) -> None:
        """Learns a task from its training features, for strategies with `closed_form`."""
        raise NotImplementedError

    def take_linear(self, task: int, classifier: LinearClassifier) -> None:
        """Replaces a task's head by a classifier of cells of the features, where `takes_linear`."""
        raise NotImplementedError

    def take_network(self, task: int, classifier: LinearClassifier,
                     blocks: Sequence[int]) -> None:
        """Replaces the head of the task that is being learned by the network's own, with a
        classifier of its features, where there is a `reference_norm`.

        blocks: numbers above the cut of those blocks before the last that the classifier sees, as
        `partialhn.training.answers.network_features` gives their means.
        """
        raise NotImplementedError

    def finish(self, task: int) -> None:
        """Ends the training of a task: running statistics become part of its weights."""
        own = self.tasks[task]
        if isinstance(own, OwnNorm):
            own.fold()

    def conclude(self, task: int) -> None:
        """Called once a new task's parameters are final, whether it was learned here or loaded."""

    @property
    def independent(self) -> bool:
        """Whether training a task changes only parameters that the task owns, and reads only these
        and the model after the task that it `needs`.
        """
        return False

    def needs(self, task: int, refreshes: int | None, known: int) -> int:
        """The task after which the model has all that training a later task reads, where tasks are
        `independent`.

        refreshes: as in `add_task`. known: number of tasks that are learned.
        """
        del task, known
        return refreshes or 0

    def answers_by(self, task: int) -> str | None:
        """A hash of everything that determines a learned task's answers; None where a later task
        may change them.
        """
        del task
        return None

    def task_state(self, task: int) -> dict[str, Tensor]:
        """The entries of `state_dict` that a learned task owns, where tasks are `independent`."""
        prefixes = self.task_state_prefixes(task)
        return {name: value for name, value in self.state_dict().items()
                if name.startswith(prefixes)}

    def load_task_state(self, task: int, task_state: dict[str, Tensor]) -> None:
        """Loads a task that another instance has learned and given as `task_state`.

        Raises: KeyError where an entry is missing or belongs to another task.
        """
        if task_state.keys() != self.task_state(task).keys():
            raise KeyError(f"task {task} owns {sorted(self.task_state(task))}, found "
                           f"{sorted(task_state)}")
        self.load_state_dict(task_state, strict=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True,
                        assign: bool = False) -> Any:
        """As PyTorch's method, which goes through the entries of all tasks for each task.

        Raises: RuntimeError for missing or unexpected entries if `strict`, and for other shapes.
        """
        rest, missing, unexpected = dict(state_dict), list[str](), list[str]()
        by_module: dict[str, dict[str, Any]] = {}
        listed: dict[str, nn.ModuleList] = {}
        for name, modules in self.named_modules():  # a list before those in it
            if isinstance(modules, nn.ModuleList) and not name.startswith(tuple(listed)):
                listed[f"{name}."] = modules
        for key in state_dict:
            prefix = next((prefix for prefix in listed if key.startswith(prefix)), None)
            place, dot, name = key[len(prefix or ""):].partition(".")
            if prefix is not None and dot:
                by_module.setdefault(f"{prefix}{place}.", {})[name] = rest.pop(key)
        for prefix, modules in listed.items():
            for number in range(len(modules)):
                own = by_module.pop(f"{prefix}{number}.", {})
                if not own and isinstance(modules, StoredModules) and modules.waits(number):
                    continue  # it has its tensors already
                keys = modules[number].load_state_dict(own, strict=False, assign=assign)
                missing += [f"{prefix}{number}.{key}" for key in keys.missing_keys]
                unexpected += [f"{prefix}{number}.{key}" for key in keys.unexpected_keys]
        unexpected += [prefix + key for prefix, own in by_module.items() for key in own]
        keys = super().load_state_dict(rest, strict=False, assign=assign)
        missing += [key for key in keys.missing_keys if not key.startswith(tuple(listed))]
        unexpected += keys.unexpected_keys
        if strict:
            self._require_none(missing, unexpected)
        return type(keys)(missing, unexpected)

    def _require_none(self, missing: Sequence[str], unexpected: Sequence[str]) -> None:
        if missing or unexpected:
            raise RuntimeError(f"state of {type(self).__name__}. Missing keys: {missing}. "
                               f"Unexpected keys: {unexpected}")

    def task_state_prefixes(self, task: int) -> tuple[str, ...]:
        """Prefixes of the names of a task's entries; shared entries belong to the first task."""
        return (f"tasks.{task}.",) if task else ("",)

    def load_tasks(self, classes: Sequence[int], state: dict[str, Tensor],
                   finished: int | None = None) -> None:
        """Adds tasks to an empty strategy and loads their `state_dict`.

        classes: number of classes of each task. finished: number of tasks that are learned;
        default: all. Raises: RuntimeError for a state of other tasks.
        """
        device = next(iter((*self.parameters(), *self.buffers())), torch.empty(0)).device
        learned = len(classes) if finished is None else finished
        rest = self.take_stored(classes[:learned], state)
        waiting = len(self.tasks)
        for count in classes[waiting:]:
            self.add_task(count)
        self.to(device)
        for task in range(waiting, learned):
            self.finish(task)
        keys = self.load_state_dict(rest, strict=False)
        self._require_none([key for key in keys.missing_keys if key not in state],
                           keys.unexpected_keys)

    def take_stored(self, classes: Sequence[int], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Lets the learned tasks of a state wait as tensors until they are used, where the strategy
        can do so and their tensors fit; returns the rest of the state.

        classes: number of classes of each learned task.
        """
        del classes
        return state

    def state_without(self, tasks: Collection[int]) -> dict[str, Tensor]:
        """The `state_dict` of this strategy without some tasks; the others keep their order.

        Raises: InputError where the others need them, or where the strategy has no such state.
        """
        del tasks
        raise InputError(f"strategy {type(self).__name__} cannot forget a task, because all tasks "
                         "share what it has learned; allowed: strategies with parts of a task's "
                         "own (partial_hn, separate_heads, ridge, ncm)")

    def shared_with(self, tasks: Collection[int]) -> list[str]:
        """The parts, in words, that learned from these tasks and stay when they are forgotten."""
        del tasks
        return []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the learned model and cannot see in its numbers."""
        return ()

    @property
    def reference_norm(self) -> Tensor | None:
        """The vectors of the network's own head, in a strategy that has learned nothing yet and
        whose `reference_features` no task changes; otherwise None.
        """
        return None

    def reference_features(self, z_BCHW: Tensor, norm: Tensor,
                           blocks: Sequence[int] | None = None,
                           spreads: Sequence[int] = ()) -> list[Tensor]:
        """Pooled features of blocks of the network's own head, then spreads, (B, C of the block)
        each.

        norm: its `reference_norm`. blocks, spreads: their numbers, as `LaterBlocks` takes them.
        """
        raise NotImplementedError

    def weights(self, task: int) -> HeadWeights:
        """omega_t: the head's weights for a task."""
        raise NotImplementedError

    def forward(self, z_BCHW: Tensor, task: int) -> Tensor:
        """Features z_BCHW to logits_BK of one task."""
        logits_BK: Tensor = self.head(z_BCHW, self.weights(task))
        return logits_BK

    def loss_terms(self, task: int, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        """logits_BK of a batch of `task`, and a term to add to its cross-entropy, or None."""
        return self(batch.z_BCHW, task), self.regulariser(task)

    def regulariser(self, task: int) -> Tensor | None:
        """The loss term of the weights alone while `task` is trained, or None."""
        del task
        return None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The parameters that the running experience trains, in groups with the peak learning rate
        of a short experience (`peak`) and of a long one (`long_peak`).
        """
        trainable = [value for value in self.parameters() if value.requires_grad]
        peak = learning_rate * (NETWORK_RATE if self.head.keeps_statistics
                                else 1.0 if self.head.matrices else LINEAR_RATE)
        return [{"params": trainable, "peak": peak, "long_peak": peak}]

    def experience_state(self) -> dict[str, Tensor]:
        """Tensors that a running experience needs beside the parameters, for its checkpoint."""
        return {}

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        """Restores `experience_state`. Raises: InputError for tensors of another strategy."""
        if state:
            raise InputError(f"checkpoint holds {sorted(state)[:3]}, which "
                             f"{type(self).__name__} does not use")

    def task_bytes(self, task: int) -> int:
        """Bytes that a task adds to the checkpoint."""
        return sum(value.numel() * value.element_size()
                   for value in self.tasks[task].parameters())


def renumbered(state: Mapping[str, Tensor], prefix: str,
               places: Mapping[int, int]) -> dict[str, Tensor]:
    """A state whose entries `<prefix><number>.<name>` have new numbers.

    places: new numbers by old ones; entries with other numbers are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            found[name] = value
            continue
        number, _, rest = name[len(prefix):].partition(".")
        if int(number) in places:
            found[f"{prefix}{places[int(number)]}.{rest}"] = value
    return found


def numbered(state: Mapping[str, Tensor], prefix: str,
             count: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The entries `<prefix><number>.<name>` of a state for each number below `count`, by name; and
    the rest of the state.
    """
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        number, _, own = name[len(prefix):].partition(".")
        if name.startswith(prefix) and number.isdecimal() and int(number) < count:
            found[int(number)][own] = value
        else:
            rest[name] = value
    return found, rest


class Classifier(nn.Module):
    """A task's own classifier: classifier_KF and bias_K."""

    def __init__(self, classes: int, head: Head) -> None:
        super().__init__()
        bound = 1 / math.sqrt(head.width)
        self.classifier_KF = nn.Parameter(torch.empty(classes, head.width).uniform_(-bound, bound))
        self.bias_K = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def train(self, mode: bool = True) -> Self:
        """As PyTorch's method; quick where there are no modules, as in a model of many tasks."""
        return super().train(mode) if any(True for _ in self.children()) else self

    @property
    def plain_KF(self) -> Tensor:
        """classifier_KF as numbers, whatever form it is kept in."""
        return self.classifier_KF

    def take_classifier(self, other: "Classifier") -> None:
        """Copies the classifier of another task with the same classes."""
        self.set_classifier(other.plain_KF, other.bias_K)

    @torch.no_grad()
    def set_classifier(self, weight_KF: Tensor, bias_K: Tensor) -> None:
        """Replaces the numbers of the classifier, whatever type and device these have."""
        self.classifier_KF.copy_(weight_KF)
        self.bias_K.copy_(bias_K)


class OwnNorm(Classifier):
    """A task's own normalisation (scales and shifts) and classifier."""

    statistics: Tensor | None

    def __init__(self, classes: int, head: Head, norm: Tensor) -> None:
        super().__init__(classes, head)
        self.norm = nn.Parameter(norm.detach().clone())
        self.register_buffer("statistics", head.first_statistics())
        self._fold = head.fold

    def fold(self) -> None:
        """Folds batch norm's running statistics, where there are any, into scales and shifts."""
        if self.statistics is not None:
            with torch.no_grad():
                self.norm.copy_(self._fold(self.norm, self.statistics))
            self.statistics = None

    def weights(self, matrices: dict[str, Tensor]) -> HeadWeights:
        """The head weights omega_t with these matrices."""
        return HeadWeights(matrices, self.norm, self.classifier_KF, self.bias_K,
                           self.statistics)
