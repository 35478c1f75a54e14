"""The hypernetwork H_psi: a task's code -> the convolution weights of the head.

Every generated tensor l is a stack of rows c, one for each output channel, and the last layer of
the generator is linear in the task's own parameters. There are three such generators:

    columns    W_l(t) = W_l(s) + V_lt diag(x_lt) A_lt^T      ours, the default
    bilinear   W_l(t) = base_l + V_l diag(x_lt) A_l^T + b_l  one set of columns for all tasks
    additive   W_l(t)[c] = base_l[c] + A_l [mlp(e_t) ; v_lc] + b_l   as published (von Oswald et al.
               2020, Hemati et al. 2023)

This file holds `columns`. Where the trunk is trained on the first task, that task trains base_l,
and a later task t starts from the first task (s = 0), or from task t - 1 with `previous`. Where the
trunk's network was trained on other images, base_l are that network's own weights, which never
change, and every task starts from them (`network`). A task that is refreshed starts from its own
old slot. It has binary columns V and A of its own, weighted by its code x
(`partialhn.networks.columns`). Learned weights never change, so no earlier task can change either.
With a dictionary, tasks after the first ones have V of their own only, over shared directions in
A's place (`partialhn.networks.dictionary`).
The weights that a task starts from are generated once, so a step costs the same whatever the number
of tasks. The other two generators share parameters that change with every task
(`partialhn.networks.shared_generators`).

Legend: C output channels (rows), D row length, d columns, L generated tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.config import StartTask
from partialhn.errors import InputError
from partialhn.networks.columns import CODE, Columns, packed_bytes
from partialhn.networks.dictionary import Dictionary, OutputSides, principal_directions
from partialhn.networks.stored import StoredModules

TYPICAL = 0.1
"""Root mean square of weights for which a code starts at CODE over the root of d."""
Rows = tuple[Tensor, ...]
"""One task's generated weights: a (C, D) matrix for each generated tensor."""


class GeneratedTensor(NamedTuple):
    """One weight tensor of the head that the hypernetwork generates."""

    name: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """C, the number of output channels."""
        return self.shape[0]

    @property
    def row_length(self) -> int:
        """D, the number of weights in one output channel's filter."""
        return int(torch.Size(self.shape[1:]).numel())


class Generator(nn.Module):
    """Base class of the generators: holds base_l, and generates weights from the code of a task."""

    shares_parameters = False
    """Whether training the current task can change the weights of earlier tasks."""
    starts_from: StartTask = "previous"
    """The weights that a new task starts from: those of the task before it, of the first task, or
    of the network whose trunk is frozen."""

    @property
    def starts_from_previous(self) -> bool:
        """Whether a new task starts from the weights of the task before it."""
        return self.starts_from == "previous"

    def __init__(self, tensors: Sequence[GeneratedTensor]) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.base = nn.ParameterList(torch.zeros(t.rows, t.row_length) for t in self.tensors)

    def set_base(self, weights: Sequence[Tensor]) -> None:
        """Sets base_l, from which the first task is trained. weights: one tensor for each l."""
        for base, weight in zip(self.base, weights, strict=True):
            base.data.copy_(weight.reshape(base.shape))

    def add_task(self, task: int) -> None:
        """Adds the parameters that a task needs besides its code."""

    def start(self, task: int) -> int:
        """Index of the task that a new task starts from; -1 for none."""
        return {"previous": task - 1, "first": min(task, 1) - 1, "network": -1}[self.starts_from]

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """The initial code of a task, given the code of the task that it starts from."""
        raise NotImplementedError

    def inherits(self, task: int) -> bool:
        """Whether a task's weights are added to those of the task that it starts from."""
        del task
        return False

    def forward(self, task: int, code: Tensor, inherited: Rows | None = None) -> Rows:
        """Generates the head's convolution weights for one task; once a step, for all images.

        inherited: the weights of the task that it starts from, if it `inherits`.
        """
        raise NotImplementedError

    def begin(self, task: int) -> None:
        """Starts an experience: selects the parameters that it may change."""
        raise NotImplementedError

    def finish(self, task: int) -> Tensor | None:
        """Ends an experience; returns the factors to multiply the task's code with, or None."""
        del task
        return None

    def task_bytes(self, task: int) -> int:
        """Bytes that a learned task adds to the generator."""
        del task
        return 0

    def generating_macs(self, task: int) -> int:
        """Multiply-adds to generate a task's weights when none are cached."""
        raise NotImplementedError

    def regulariser(self, codes: Tensor) -> Tensor:
        """The loss term that keeps earlier tasks' weights in place, if it `shares_parameters`.

        codes: one row for each earlier task. A scalar.
        """
        raise NotImplementedError

    def star(self) -> dict[str, Tensor]:
        """The parameters at the start of the experience (psi*) that a checkpoint must hold."""
        return {}

    def restore_snapshot(self, star: dict[str, Tensor]) -> None:
        """Restores the result of `star` when an interrupted experience is resumed.

        Raises: InputError for tensors that this generator does not use.
        """
        if star:
            raise InputError(f"checkpoint holds {sorted(star)[:3]}, which {type(self).__name__} "
                             "does not use")


class ColumnGenerator(Generator):
    """W_l(t) = W_l(s) + V_lt diag(x_lt) A_lt^T, where each task has binary V and A of its own."""

    def __init__(self, tensors: Sequence[GeneratedTensor], width: int,
                 starts_from: StartTask = "first", directions: int = 0, openers: int = 0) -> None:
        """starts_from: `previous` pays at freeze depth 0 only (docs/measurements/first-weights.md).

        directions: number of directions in the dictionary, 0 for none; it is closed when `openers`
        tasks have columns of their own.
        """
        super().__init__(tensors)
        self.width, self.starts_from = width, starts_from
        self._directions, self._openers = directions, openers
        self.dictionary: Dictionary | None = None
        """None until it is closed."""
        self.base_is_fixed = starts_from == "network"
        """Whether no task trains the base, so that every task has columns."""
        self.columns = StoredModules()
        """The columns of each task; the first has none where it trains the base."""

    def fix_base(self) -> None:
        """The model has forgotten its first task, whose weights stay as the base of the others."""
        self.base_is_fixed = True

    def start(self, task: int) -> int:
        return -1 if self.base_is_fixed else super().start(task)

    def inherits(self, task: int) -> bool:
        return task > 0 or self.base_is_fixed

    def add_task(self, task: int) -> None:
        if not self.inherits(task):
            return
        dictionary = self._dictionary_of(len(self.columns))
        self.columns.append(Columns(self._shapes, self.width) if dictionary is None
                            else OutputSides(self._shapes, dictionary))

    def take_stored(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Lets the columns of learned tasks wait as tensors until they are used."""
        self.columns.wait(states, self._stored)

    def packed_shape(self, task: int) -> tuple[int]:
        """Shape of the signs of a learned task's columns."""
        dictionary = self._dictionary_of(task - self._without)
        numbers = (sum(C + D for C, D in self._shapes) * self.width if dictionary is None
                   else sum(C for C, _ in self._shapes) * dictionary.width)
        return (-(-numbers // 8),)

    def _stored(self, place: int, state: Mapping[str, Tensor]) -> Columns | OutputSides:
        dictionary = self._dictionary_of(place)
        return (Columns.learned(self._shapes, self.width, state["packed"]) if dictionary is None
                else OutputSides.learned(self._shapes, dictionary, state["packed"]))

    def _dictionary_of(self, place: int) -> Dictionary | None:
        """The dictionary that columns use; None for those with input sides of their own."""
        dictionary = self.dictionary
        closed = dictionary is not None and place >= int(dictionary.get_buffer("openers"))
        return dictionary if closed else None

    def open_dictionary(self, openers: int) -> None:
        """Makes room for a stored dictionary. openers: tasks with columns of their own."""
        self.dictionary = Dictionary(self._shapes, self._directions, openers)

    @property
    def closes_dictionary(self) -> bool:
        """Whether the newest task is the last one with columns of its own."""
        return (self._directions > 0 and self.dictionary is None and bool(self.tensors)
                and len(self.columns) == self._openers)

    @property
    def lacks_dictionary(self) -> bool:
        """Whether the first tasks are learned and have left no directions."""
        return (self._directions > 0 and self.dictionary is None
                and len(self.columns) >= self._openers)

    @torch.no_grad()
    def close_dictionary(self, codes: Sequence[Tensor]) -> None:
        """Fills the dictionary from the tasks so far. codes: one for each task with columns.

        Where no task has an update, because all are solved in closed form, there are no directions,
        and tasks go on to open columns of their own.
        """
        updates = [(cast(Columns, own)(), code.view(len(self.tensors), -1))
                   for own, code in zip(self.columns, codes, strict=True) if len(code)]
        found = [principal_directions(
            [(sides[index][0] * x_Ld[index], sides[index][1]) for sides, x_Ld in updates],
            self._directions) for index in range(len(self.tensors) if updates else 0)]
        if any(directions_Dd.any() for directions_Dd in found):
            self.open_dictionary(len(self.columns))
            dictionary = cast(Dictionary, self.dictionary)
            dictionary.to(self.base[0].device).fill(found)

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """The same value for every column of a tensor; a task without columns has an empty code.

        The values decide how fast the columns learn. They are in proportion to the weights of a
        network that was trained elsewhere, whose tensors differ in size more than ours do.
        """
        del previous
        if not self.inherits(task):
            return torch.empty(0)
        scales_L = torch.ones(len(self.tensors))
        if self.starts_from == "network":
            scales_L = torch.tensor([base.detach().square().mean().sqrt().item() / TYPICAL
                                     for base in self.base])
        width = self.of_task(task).width
        start: float = CODE * width ** -0.5
        return (start * scales_L).repeat_interleave(width)

    def forward(self, task: int, code: Tensor, inherited: Rows | None = None) -> Rows:
        if not self.inherits(task):
            return tuple(self.base)
        assert inherited is not None, f"task {task} needs the weights that it starts from"
        if not self.tensors:
            return ()
        own = self.of_task(task)
        if own.packed is None:
            return own.generate(own.stacked(inherited), code)
        if not len(own.packed):
            return inherited
        return tuple(torch.addmm(before_CD, v_Cd.to(x_d) * x_d, A_Dd.to(x_d).T)
                     for before_CD, x_d, (v_Cd, A_Dd)
                     in zip(inherited, code.view(len(self.tensors), -1), own(), strict=True))

    def start_rows(self, task: int, inherited: Rows) -> Rows:
        """The weights that a task starts from, as `learning` takes them: once for all steps."""
        return self.of_task(task).stacked(inherited) if self.tensors else ()

    def learning(self, task: int, code: Tensor, start: Rows, *, rounded: bool = False) -> Rows:
        """As `forward`, with a gradient, for the task that is being learned.

        rounded: whether kernels are wanted in bfloat16, as the head takes them.
        """
        if not self.tensors:
            return ()
        kernels = [tensor.shape for tensor in self.tensors] if rounded else None
        return self.of_task(task).generate(start, code, kernels)

    def begin(self, task: int) -> None:
        """Only the task's own parameters get a gradient; without columns that is the base."""
        self.base.requires_grad_(not self.inherits(task))
        for place, columns in self.columns.made():
            columns.requires_grad_(place + self._without == task)

    def finish(self, task: int) -> Tensor | None:
        if not self.inherits(task) or not self.tensors:
            return None
        return self.of_task(task).pack().flatten()

    def drop_columns(self, task: int) -> None:
        """Empties the columns of a learned task that add nothing: its weights are those that it
        starts from.
        """
        own = self.of_task(task)
        assert own.packed is not None, "the task is not learned yet"
        own.packed = own.packed.new_empty(0)

    def task_bytes(self, task: int) -> int:
        if not self.inherits(task):
            return 0
        packed = self.columns.state_of(task - self._without).get("packed")
        if packed is not None:
            return packed.nbytes
        if self.uses_dictionary(task):
            return packed_bytes([(C, 0) for C, _ in self._shapes], self._directions)
        return packed_bytes(self._shapes, self.width)

    def generating_macs(self, task: int) -> int:
        """As the base class; for a task that refreshes no other."""
        if not self.inherits(task):
            return 0
        first = self._without if self.starts_from_previous else task
        width = sum(own.width for own in map(self.of_task, range(first, task + 1))
                    if own.packed is None or len(own.packed))
        return width * sum(t.rows * t.row_length for t in self.tensors)

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        return [(tensor.rows, tensor.row_length) for tensor in self.tensors]

    def of_task(self, task: int) -> Columns | OutputSides:
        """The columns of a task that has some."""
        return cast(Columns | OutputSides, self.columns[task - self._without])

    @property
    def _without(self) -> int:
        """Number of tasks without columns: the first, where it trains the base."""
        return 0 if self.base_is_fixed else 1

    def uses_dictionary(self, task: int) -> bool:
        """Whether the columns of a task have their input sides in the dictionary."""
        return self.inherits(task) and self._dictionary_of(task - self._without) is not None

    def learned_state(self, task: int) -> dict[str, Tensor]:
        """The tensors that decide on a learned task's columns, by name; none for a task without."""
        if not self.inherits(task):
            return {}
        place = task - self._without
        own = {f"columns.{name}": value for name, value in self.columns.state_of(place).items()}
        dictionary = self._dictionary_of(place)
        return own if dictionary is None else own | {
            f"directions.{index}": value for index, value in enumerate(dictionary())}

    def state_prefix(self, task: int) -> str:
        """How the names of the parameters begin that a later task alone has."""
        return f"columns.{task - self._without}."
