"""The product: a hypernetwork H_psi generates the head's matrices for each task.

A task owns its code, the scales and shifts of its normalisation, and its classifier. They are
frozen when its experience ends. With the generator `columns` a task owns columns too, which add to
the weights of the first task, or of the task that it refreshes. So a task depends on no other task,
unless it `starts_from` the previous one. With the generators `bilinear` and `additive` a task goes
on from the task before it, all tasks share the generator's parameters, and the regulariser limits
how far they drift.

Legend: T earlier tasks, L generated tensors, d columns.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from partialhn.config import Config, HypernetConfig
from partialhn.errors import InputError
from partialhn.features.closed_form import LinearClassifier
from partialhn.networks.draws import seeded
from partialhn.networks.head import EarlierWeights, Head, HeadStart, HeadWeights
from partialhn.networks.hypernet import ColumnGenerator, GeneratedTensor, Generator, Rows
from partialhn.networks.later_blocks import LaterBlocks
from partialhn.networks.shared_generators import AdditiveGenerator, BilinearGenerator
from partialhn.networks.tensors import hash_tensors
from partialhn.strategies.base import Classifier, OwnNorm, Strategy, numbered, renumbered

FIRST_FORGOTTEN = "first_forgotten"
"""Entry of the state of a model that has forgotten its first task, whose weights stay as the base
of the others."""
OPENERS = "hypernet.dictionary.openers"
"""Entry of the state of a model whose dictionary is closed: how many tasks have columns of their
own."""
NETWORK_NORM = "network_norm"
"""Entry of the state of a model with tasks that have the network's own head: its vectors, which all
of these tasks share."""
SMALLEST_SCALE = 1e-6
"""Scale of a class whose weights are all zero: float16 would round a smaller one to zero."""
LONG_RATE = 2.0
"""Factor on the learning rate of columns in long experiences: columns start at zero, where a plain
head starts from weights that are learned already (`docs/measurements/columns.md`)."""


class HypernetTask(OwnNorm):
    """What a task owns: its code e_t, its norm (scales and shifts) and its classifier."""

    def __init__(self, classes: int, head: Head, norm: Tensor, code: Tensor, start: int, *,
                 compact: bool = False) -> None:
        """compact: the classifier is kept in 8 bits once the task is learned."""
        super().__init__(classes, head, norm)
        self.code, self._compact = nn.Parameter(code), compact
        self.scale_K: Tensor | None = None
        self.register_buffer("start", torch.tensor(start))
        """The task it starts from; -1 for none."""
        for name in self.OPTIONAL:
            self.register_buffer(name, None)

    @classmethod
    def learned(cls, state: Mapping[str, Tensor], head: Head) -> "HypernetTask":
        """A learned task, of a copy of its tensors."""
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        own._fold, own._compact, own.scale_K = head.fold, "scale_K" in state, None
        for name in ("start", "statistics", *cls.OPTIONAL):
            value = state.get(name)
            own.register_buffer(name, None if value is None else value.clone())
        for name in ("classifier_KF", "bias_K", "norm", "code", "scale_K"):
            if name in state:
                setattr(own, name, nn.Parameter(state[name].clone(), requires_grad=False))
        return own

    linear_KF: Tensor | None
    """Classifier of cells of the trunk's features, float16, for a task without a generated head;
    linear_K is its bias."""
    linear_K: Tensor | None
    earlier_KE: Tensor | None
    """The classifier's part for features before the last block's, float16, for a task with the
    network's own head."""
    earlier_blocks: Tensor | None
    """The numbers of the blocks that it sees, int64 (`EarlierWeights`)."""
    OPTIONAL = ("linear_KF", "linear_K", "earlier_KE", "earlier_blocks")

    @staticmethod
    def unused(names: Collection[str]) -> tuple[str, ...]:
        """The tensors that a learned task's answers do not use and that are therefore empty; models
        of older releases hold them.

        names: those that the task has.
        """
        if "linear_KF" in names:
            return ("code", "norm", "classifier_KF", "bias_K", "scale_K")
        return ("code", "norm") if "earlier_KE" in names else ()

    @property
    def shares_norm(self) -> bool:
        """Whether it has the network's own head, whose vectors the model holds for all of them."""
        return self.earlier_KE is not None and not len(self.norm)

    def drop_unused(self) -> None:
        """Empties what a learned task's answers do not use; a code that is not zero stays."""
        for name in self.unused(self.state_dict()):
            value = getattr(self, name)
            if value is not None and not (name == "code" and value.any()):
                setattr(self, name, nn.Parameter(value.new_empty(0, *value.shape[1:]),
                                                 requires_grad=False))

    def expect(self, state: Mapping[str, Any], prefix: str) -> None:
        """Makes room for the tensors that a state may have, or for none."""
        device = self.bias_K.device
        for name in self.OPTIONAL:
            value = state.get(prefix + name)
            setattr(self, name, None if value is None else torch.empty_like(value, device=device))
        for name in self.unused(self.state_dict()):
            value = state.get(prefix + name)
            if value is not None and not len(value):
                setattr(self, name, nn.Parameter(torch.empty_like(value, device=device),
                                                 requires_grad=False))

    def take_classifier(self, other: Classifier) -> None:
        """As the base class; a task that is answered by cells has left none."""
        if len(other.bias_K):
            super().take_classifier(other)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str,
                              *rest: Any) -> None:
        if prefix + "code" in state_dict:  # a state of other tasks says nothing about this one
            self.expect(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fold(self) -> None:
        """A learned task's norm and classifier are kept in float16; a compact task's classifier in
        8 bits, with a scale for each class.
        """
        super().fold()
        if self._compact:
            classifier_KF = self.classifier_KF.detach()
            scale_K = (classifier_KF.abs().amax(1) / 127).clamp_min(SMALLEST_SCALE).half()
            self.scale_K = nn.Parameter(scale_K, requires_grad=False)
            eight_KF = (classifier_KF / scale_K[:, None].float()).round().clamp(-127, 127)
            self.classifier_KF = nn.Parameter(eight_KF.to(torch.int8), requires_grad=False)
        for name in ("norm", "bias_K") if self._compact else ("norm", "classifier_KF", "bias_K"):
            value = getattr(self, name)
            setattr(self, name, nn.Parameter(value.detach().half(), value.requires_grad))

    @property
    def plain_KF(self) -> Tensor:
        if self.scale_K is None:
            return super().plain_KF
        return self.classifier_KF.float() * self.scale_K[:, None].float()

    def weights(self, matrices: dict[str, Tensor]) -> HeadWeights:
        weights = super().weights(matrices)
        if self.earlier_KE is not None and self.earlier_blocks is not None:
            weights = weights._replace(earlier=EarlierWeights(
                self.earlier_KE.float(), tuple(self.earlier_blocks.tolist())))
        if weights.norm.dtype != torch.half:
            return weights
        return weights._replace(norm=weights.norm.float(), bias_K=weights.bias_K.float(),
                                classifier_KF=self.plain_KF.float())


class PartialHypernet(Strategy):
    """Cross-entropy, and where shared parts drift + beta * mean over earlier tasks of
    |H(e_j) - H*(e_j)|^2 (Hemati et al. 2023).
    """

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head, start, config)
        options = config.hypernet
        self.beta = options.beta
        with seeded(self.seed):
            self.hypernet = build_generator(options, head.matrices)
        self._residual = options.residual
        self._dictionary, self._dictionary_after = options.dictionary, options.dictionary_after
        if options.residual:
            self.hypernet.set_base(start.matrices)
        self.register_buffer("next_norm", start.norm.clone())
        self.register_buffer(NETWORK_NORM, None)
        self._running = -1
        """The task that is being learned; -1 between tasks."""
        self._inherited: Rows | None = None
        """Weights that the running task starts from; they do not change while it is learned."""
        self._earlier: Tensor | None = None
        """Codes of the tasks before the running one; they do not change while it is learned."""
        self._base: str | None = None
        """Hash of the generator's base."""
        self._starts: dict[int, str] = {}
        """`answers_by` of tasks that others start from."""
        self._reference: tuple[Tensor, LaterBlocks] | None = None
        """The network's own head with vectors that it was asked for last."""

    def new_task(self, classes: int, refreshes: int | None) -> HypernetTask:
        """A task that starts where the generator says, and from the norm of the first task, or of
        the task before it where the generator starts from the previous task.

        A refreshed task starts from the weights of its own old slot. Its old norm has been
        folded, so it starts from the same norm as any other.
        """
        task = len(self.tasks)
        self.hypernet.add_task(task)
        start = self.hypernet.start(task) if refreshes is None else refreshes
        code = self.hypernet.next_code(self._own(start).code.detach() if start >= 0 else None, task)
        generator = self.hypernet
        compact = isinstance(generator, ColumnGenerator) and generator.uses_dictionary(task)
        return HypernetTask(classes, self.head, self.get_buffer("next_norm"), code, start,
                            compact=compact)

    @property
    def takes_linear(self) -> bool:  # type: ignore[override]
        """A generator that all tasks share goes on from the task before; images are no features."""
        return self.independent and not self.head.at_pixels

    def take_linear(self, task: int, classifier: LinearClassifier) -> None:
        own = self._own(task)
        # contiguous, as a loaded one is: products round differently by the layout
        own.linear_KF = classifier.weight_KF.to(own.bias_K.device).half().contiguous()
        own.linear_K = classifier.bias_K.to(own.bias_K.device).half()
        generator = cast(ColumnGenerator, self.hypernet)
        if not self._dictionary or generator.uses_dictionary(task):  # no dictionary waits for it
            self._without_columns(own)

    def _without_columns(self, own: HypernetTask) -> None:
        own.code.data.zero_()  # then the columns add nothing
        own.get_buffer("start").fill_(-1)
        self._forget()

    @torch.no_grad()
    def take_network(self, task: int, classifier: LinearClassifier,
                     blocks: Sequence[int]) -> None:
        own, statistics = self._own(task), self.start.statistics
        self._without_columns(own)
        own.norm.copy_(self.start.norm)
        if own.statistics is not None and statistics is not None:
            own.statistics.copy_(statistics)
        weight_KF, earlier_KE = classifier.weight_KF.tensor_split([self.head.width], 1)
        own.set_classifier(weight_KF, classifier.bias_K)
        own.earlier_KE = earlier_KE.to(own.bias_K.device).half().contiguous()
        own.earlier_blocks = torch.tensor(list(blocks), dtype=torch.int64).to(own.bias_K.device)

    def load_task_state(self, task: int, task_state: dict[str, Tensor]) -> None:
        own = self._own(task)
        own.expect(task_state, f"tasks.{task}.")
        if own.shares_norm:
            self._share_norm()
        super().load_task_state(task, task_state)

    def _share_norm(self) -> None:
        """Keeps the vectors of the network's own head, which its tasks then need not hold."""
        if getattr(self, NETWORK_NORM) is None:
            norm = self.reference_norm
            assert norm is not None, "a task has the network's own head, and there is none"
            self.register_buffer(NETWORK_NORM, norm.to(self.get_buffer("next_norm").device).half())

    @property
    def independent(self) -> bool:
        return not self.hypernet.starts_from_previous

    def task_state_prefixes(self, task: int) -> tuple[str, ...]:
        prefixes = super().task_state_prefixes(task)
        own = cast(ColumnGenerator, self.hypernet).state_prefix(task)
        return (*prefixes, f"hypernet.{own}") if task else prefixes

    def load_tasks(self, classes: Sequence[int], state: dict[str, Tensor],
                   finished: int | None = None) -> None:
        if FIRST_FORGOTTEN in state:
            self._forget_first()
        if OPENERS in state:
            cast(ColumnGenerator, self.hypernet).open_dictionary(int(state[OPENERS]))
        if NETWORK_NORM in state:
            self.register_buffer(NETWORK_NORM, torch.empty_like(
                state[NETWORK_NORM], device=self.get_buffer("next_norm").device))
        super().load_tasks(classes, state, finished)

    def take_stored(self, classes: Sequence[int], state: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = self.hypernet
        if not isinstance(generator, ColumnGenerator) or not generator.tensors:
            return state
        tasks, rest = numbered(state, "tasks.", len(classes))
        columns, rest = numbered(rest, "hypernet.columns.",
                                 sum(map(generator.inherits, range(len(classes)))))
        first = len(classes) - len(columns)
        if not all(self._fits(task, count, tasks[task],
                              columns[task - first] if task >= first else {})
                   for task, count in enumerate(classes)):
            return state  # which is refused with what does not fit, or is that of another release
        self.classes += classes
        self.tasks.wait(tasks, self._stored)
        generator.take_stored(columns)
        return rest

    def _fits(self, task: int, classes: int, own: Mapping[str, Tensor],
              columns: Mapping[str, Tensor]) -> bool:
        """Whether a learned task can be made of these tensors, and would have them as they are."""
        generator = cast(ColumnGenerator, self.hypernet)
        compact = generator.uses_dictionary(task)
        signs = {"packed": (generator.packed_shape(task), torch.uint8)} if (
            generator.inherits(task)) else {}
        width = (self._dictionary if compact else generator.width) if signs else 0
        wanted = {"classifier_KF": ((classes, self.head.width),
                                    torch.int8 if compact else torch.half),
                  "bias_K": ((classes,), torch.half), "norm": (
                      tuple(self.get_buffer("next_norm").shape), torch.half),
                  "code": ((width * len(generator.tensors),), torch.float32),
                  "start": ((), torch.int64)}
        if compact:
            wanted["scale_K"] = (classes,), torch.half
        for name in HypernetTask.unused(own):
            if name in own and not len(own[name]):
                wanted[name] = (0, *wanted[name][0][1:]), wanted[name][1]
        if signs and "code" in own and not len(own["code"]):
            signs = {"packed": ((0,), torch.uint8)}
        found = {name: (tuple(value.shape), value.dtype) for name, value in own.items()
                 if name not in HypernetTask.OPTIONAL}
        return found == wanted and signs == {
            name: (tuple(value.shape), value.dtype) for name, value in columns.items()}

    def _stored(self, task: int, state: Mapping[str, Tensor]) -> HypernetTask:
        del task
        return HypernetTask.learned(state, self.head)

    def state_without(self, tasks: Collection[int]) -> dict[str, Tensor]:
        """As the base class. The base of the columns stays, although the first task trained it."""
        kept = [task for task in range(len(self.tasks)) if task not in tasks]
        places = {old: new for new, old in enumerate(kept)}
        state = renumbered(self.state_dict(), "tasks.", places)
        for old, new in places.items():
            start = self._start(old)
            if start in tasks and self.hypernet.inherits(start):
                raise InputError(
                    f"task number {start} cannot be forgotten: the weights of task number {old} "
                    "are added to its own (hypernet.starts_from is "
                    f"{self.hypernet.starts_from!r}); allowed: the tasks that no other starts "
                    "from, or a new stream without it")
            state[f"tasks.{new}.start"] = torch.tensor(places.get(start, -1))
        if not isinstance(self.hypernet, ColumnGenerator):
            return state
        before = after = 1 - int(self.hypernet.inherits(0))
        if before and 0 in tasks:
            after, state[FIRST_FORGOTTEN] = 0, torch.tensor(True)
        columns = {old - before: new - after for old, new in places.items()}
        if OPENERS in state:
            state[OPENERS] = torch.tensor(sum(
                0 <= old < int(state[OPENERS]) for old in columns))
        return renumbered(state, "hypernet.columns.", columns)

    def shared_with(self, tasks: Collection[int]) -> list[str]:
        if self.hypernet.shares_parameters:
            return ["the hypernetwork's parameters, which all tasks share"]
        shared = []
        if 0 in tasks and not self.hypernet.inherits(0):
            shared.append("the hypernetwork's base, to which every other task adds")
        generator = self.hypernet
        if isinstance(generator, ColumnGenerator) and generator.dictionary is not None and any(
                generator.inherits(task) and not generator.uses_dictionary(task)
                for task in tasks):
            shared.append("the dictionary of directions, which the first tasks left to later ones")
        return shared

    @property
    def reference_norm(self) -> Tensor | None:
        """As the base class: where every task starts from the network's own weights."""
        statistics = self.start.statistics
        if (self.hypernet.starts_from != "network" or not self._residual
                or not self.hypernet.tensors or statistics is None):
            return None
        start = self.start.norm.detach()
        return self.head.fold(start, statistics) if len(statistics) else start

    @torch.no_grad()
    def reference_features(self, z_BCHW: Tensor, norm: Tensor,
                           blocks: Sequence[int] | None = None,
                           spreads: Sequence[int] = ()) -> list[Tensor]:
        if self._reference is None or self._reference[0] is not norm:
            base = [row_CD.view(tensor.shape) for tensor, row_CD
                    in zip(self.head.matrices, self.hypernet.base, strict=True)]
            none = base[0].new_zeros(1, self.head.width)
            self._reference = norm, LaterBlocks(self.head, HeadWeights(
                self.head.named(base), norm.to(none.device), none, none[:, 0]))
        return self._reference[1](z_BCHW.to(self.hypernet.base[0].device), blocks, spreads)

    def _forget_first(self) -> None:
        cast(ColumnGenerator, self.hypernet).fix_base()
        self.register_buffer(FIRST_FORGOTTEN, torch.tensor(True))

    def answers_by(self, task: int) -> str | None:
        if not self.independent:
            return None
        if self._base is None:
            self._base = hash_tensors({str(index): base for index, base
                                       in enumerate(self.hypernet.base)})
        state = self.tasks.state_of(task)
        own = {f"task.{name}": value for name, value in state.items()}
        if "earlier_KE" in state and not len(state["norm"]):
            own[NETWORK_NORM] = self.get_buffer(NETWORK_NORM)
        own |= cast(ColumnGenerator, self.hypernet).learned_state(task)
        start = self._start(task) if self.hypernet.inherits(task) else -1
        if start >= 0 and start not in self._starts:
            self._starts[start] = self.answers_by(start) or ""
        return hash_tensors(own, self._base if start < 0 else self._starts[start])

    def begin(self, task: int) -> None:
        super().begin(task)
        self.hypernet.begin(task)
        self._forget()
        self._running = task

    def finish(self, task: int) -> None:
        """Later tasks start from a norm as it was learned, before it is folded."""
        own = self._own(task)
        if self.hypernet.starts_from_previous or (
                task == 0 and not self.hypernet.inherits(0)):
            self.get_buffer("next_norm").copy_(own.norm.detach())
        super().finish(task)
        factor = self.hypernet.finish(task)
        if factor is not None:
            own.code.data.mul_(factor)
        if own.earlier_KE is not None:
            self._share_norm()
        own.drop_unused()
        if factor is not None and not len(own.code):
            cast(ColumnGenerator, self.hypernet).drop_columns(task)
        self._forget()
        self._running = -1

    def conclude(self, task: int) -> None:
        """Closes the dictionary after the last task that has columns of its own."""
        generator = self.hypernet
        if isinstance(generator, ColumnGenerator) and generator.closes_dictionary:
            generator.close_dictionary([self._own(each).code for each in range(task + 1)
                                        if generator.inherits(each)])

    @property
    def notes(self) -> tuple[str, ...]:
        generator = self.hypernet
        if not (isinstance(generator, ColumnGenerator) and generator.lacks_dictionary):
            return ()
        return (f"there is no dictionary (--dictionary {self._dictionary}): the first tasks, which "
                "were to fill it, are all ridge regression and have no columns; later tasks open "
                "columns of their own. With --closed-form never or --epochs the first tasks are "
                "trained",)

    def needs(self, task: int, refreshes: int | None, known: int) -> int:
        """As the base class; the last task with columns of its own, for those that may come after
        it. Where tasks were forgotten the dictionary may be closed earlier, and the last known
        model has it.
        """
        start = super().needs(task, refreshes, known)
        if not self._dictionary:
            return start
        opener = min(task - 1, self._dictionary_after) if task >= self._dictionary_after else 0
        return max(start, known - 1, opener)

    def weights(self, task: int) -> HeadWeights:
        own = self._own(task)
        if own.linear_KF is not None and own.linear_K is not None:
            return HeadWeights({}, own.bias_K.new_empty(0, dtype=torch.float32),
                               own.linear_KF.float(), own.linear_K.float())
        if task == self._running and self.hypernet.inherits(task):
            generator = cast(ColumnGenerator, self.hypernet)
            if self._inherited is None:
                self._inherited = generator.start_rows(task, self._inherited_rows(task))
            rows = generator.learning(task, own.code, self._inherited,
                                      rounded=self.head.training and self.head.rounds)
        else:
            rows = self._rows(task)
        weights = own.weights({tensor.name: row_CD.view(tensor.shape) for tensor, row_CD
                               in zip(self.head.matrices, rows, strict=True)})
        if own.shares_norm:
            weights = weights._replace(norm=self.get_buffer(NETWORK_NORM).float())
        return weights

    def _rows(self, task: int) -> Rows:
        """A task's generated weights as they stand."""
        if not self.hypernet.inherits(task):
            return cast(Rows, self.hypernet(task, self._own(task).code))
        ancestors = [task]
        while self.hypernet.inherits(ancestors[-1]) and self._start(ancestors[-1]) >= 0:
            ancestors.append(self._start(ancestors[-1]))
        rows: Rows | None = tuple(self.hypernet.base)
        with torch.no_grad():
            for ancestor in reversed(ancestors):
                rows = self.hypernet(ancestor, self._own(ancestor).code, rows)
        return cast(Rows, rows)

    def _inherited_rows(self, task: int) -> Rows:
        """The weights that a task is added to: those of a task, or the network's own."""
        start = self._start(task)
        return self._rows(start) if start >= 0 else tuple(self.hypernet.base)

    def _start(self, task: int) -> int:
        return int(self.tasks.state_of(task)["start"])

    def _forget(self) -> None:
        """Drops what is kept of weights and codes, which is then generated again."""
        self._reference = None
        self._inherited, self._earlier, self._base = None, None, None
        self._starts = {}

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        self._forget()  # it would stay where it was: on another device, or of another number type
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self._forget()
        return super().load_state_dict(*arguments, **options)

    def regulariser(self, task: int) -> Tensor | None:
        if not self.hypernet.shares_parameters or self.beta == 0 or not self.hypernet.tensors:
            return None
        if self._earlier is None:
            self._earlier = torch.stack([self._own(index).code.detach() for index in range(task)])
        return self.beta * self.hypernet.regulariser(self._earlier)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """A task's columns, and the code that weighs them, are a group of their own."""
        (group,) = super().parameter_groups(learning_rate)
        if not self.hypernet.inherits(self._running):
            return [group]
        own = [self._own(self._running).code, *self.hypernet.parameters()]
        columns = [value for value in own if value.requires_grad]
        apart = set(map(id, columns))
        group["params"] = [value for value in group["params"] if id(value) not in apart]
        return [group, {"params": columns, "peak": group["peak"],
                        "long_peak": LONG_RATE * group["long_peak"]}]

    def task_bytes(self, task: int) -> int:
        own = sum(value.nbytes for name, value in self.tasks.state_of(task).items()
                  if name not in ("start", "statistics", "earlier_blocks"))
        return own + self.hypernet.task_bytes(task)

    def experience_state(self) -> dict[str, Tensor]:
        return self.hypernet.star()

    def restore_experience(self, state: dict[str, Tensor]) -> None:
        self.hypernet.restore_snapshot(state)

    def _own(self, task: int) -> HypernetTask:
        return cast(HypernetTask, self.tasks[task])


def build_generator(config: HypernetConfig, tensors: Sequence[GeneratedTensor]) -> Generator:
    """The generator that the configuration names."""
    if config.generator == "columns":
        return ColumnGenerator(tensors, config.fresh_columns, config.starts_from,
                               config.dictionary, config.dictionary_after)
    if config.generator == "bilinear":
        return BilinearGenerator(tensors, config.code_dim, residual=config.residual)
    return AdditiveGenerator(tensors, config.embedding_dim, config.hidden, config.channel_dim,
                             residual=config.residual)
