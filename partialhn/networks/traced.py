"""Finds the blocks of a network whose class nobody has described.

The network runs once, without numbers (on PyTorch's device `meta`), and every module that takes
one tensor and gives one is recorded. Where the very tensor that one module gives is what the next
one takes, nothing happens between them. So a path of such modules from the image to the head is
the network, whatever its class. A network that calculates anything between its blocks has no such
path, and is refused.

Legend: B batch, C channels, H W spatial, N tokens.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Layout
from partialhn.networks.division import Blocks, Piece, joined, with_ending, without_classifiers

B = 2
LAYERS = 4
"""A sequence of this many bare layers with matrices, as in VGG, is divided."""
State = tuple[int, int]
"""A tensor at one time: its identity, and how often it was changed in place."""


class Step(NamedTuple):
    """A call of a module with one tensor."""

    name: str
    taken: State
    given: State
    shape: tuple[int, ...]
    """Shape of what it gave, the batch included."""


class Plan(NamedTuple):
    """How a network is divided."""

    blocks: tuple[tuple[str, ...], ...]
    """For each block the modules that it consists of, in order."""
    layout: Layout

    def divide(self, body: nn.Module, classifiers: Sequence[str]) -> Blocks:
        """The blocks of a body of the same class by name; the last one ends with pooling."""
        blocks: Blocks = {}
        for names in self.blocks:
            modules = {name: body.get_submodule(name) for name in names}
            main = next((name for name, module in modules.items() if _matrices(module)), names[0])
            blocks[main] = joined(*modules.values())
        used = {name.partition(".")[0] for names in self.blocks for name in names}
        rest = [name for name, _ in body.named_children() if name not in used]
        return with_ending(blocks, Piece(without_classifiers(body, rest, classifiers),
                                         _pooled_end))

    @torch.no_grad()
    def holds(self, body: nn.Module, size: int) -> bool:
        """Whether a network on the device `meta` is its blocks for images of this size too.

        Some networks fill up images of odd sizes between their blocks.
        """
        steps, state, end = _record(body, size)
        called = {step.name: step for step in steps}
        for name in (name for names in self.blocks for name in names):
            if name not in called or called[name].taken != state:
                return False
            state = called[name].given
        return state == end


def _pooled_end(parts: Any, z: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(z))


@torch.no_grad()
def plan_of(body: Any, name: str, size: int) -> Plan:
    """How a network on the device `meta` is divided, found with images of `size` pixels a side.

    Raises: InputError naming the module behind which the network calculates something else.
    """
    steps, start, end = _record(body, size)
    path = _path(steps, start, end)
    if path is None:
        reached = _furthest(steps, start)
        raise InputError(f"backbone is {name!r}, a {type(body).__name__}, which cannot be cut: "
                         f"behind {reached or 'its input'} it calculates with more than what one "
                         "module gives the next; allowed: a network whose blocks follow one "
                         "another")
    parts = [part for step in path for part in _expanded(body, step, steps)]
    layout: Layout = next((found for step in reversed(parts) if (found := _layout(step.shape))),
                          "BCHW")
    groups: list[list[Step]] = []
    for step in parts:
        complete = groups and _layout(groups[-1][-1].shape) == layout and any(
            _matrices(body.get_submodule(each.name)) for each in groups[-1])
        if complete and _matrices(body.get_submodule(step.name)):
            groups.append([step])
        elif groups:
            groups[-1].append(step)
        else:
            groups = [[step]]
    return Plan(tuple(tuple(step.name for step in group) for group in groups), layout)


def _record(body: Any, size: int) -> tuple[list[Step], State, State]:
    """The calls before `forward_head`, the state of the images, and of what the head takes."""
    steps: list[Step] = []
    kept: list[Tensor] = []  # alive, so that no two tensors share an identity
    entered: dict[str, State | None] = {}
    ends: list[State] = []
    images_BCHW = torch.zeros(B, 3, size, size, device="meta")

    def state(z: Tensor) -> State:
        kept.append(z)
        return id(z), z._version

    def enter(name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        plain = len(arguments) == 1 and isinstance(arguments[0], Tensor)
        entered[name] = (state(arguments[0]) if plain and not any(
            value is not None and value is not False for value in named.values()) else None)

    def leave(name: str, given: Any) -> None:
        taken = entered[name]
        if taken is not None and isinstance(given, Tensor) and not ends:
            steps.append(Step(name, taken, state(given), tuple(given.shape)))

    handles = []
    for name, module in body.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(
                lambda _, given, named, name=name: enter(name, given, named), with_kwargs=True))
            handles.append(module.register_forward_hook(
                lambda _, __, given, name=name: leave(name, given)))

    def noted_head(z: Tensor, *_: Any, **__: Any) -> Tensor:
        ends.append(state(z))
        return z

    body.forward_head = noted_head
    try:
        start = state(images_BCHW)
        body.eval()(images_BCHW)
    finally:
        del body.forward_head
        for handle in handles:
            handle.remove()
    calls = collections.Counter(step.name for step in steps)
    return ([step for step in steps if calls[step.name] == 1 and step.taken != step.given],
            start, ends[0])


def _path(steps: Sequence[Step], start: State, end: State) -> list[Step] | None:
    """The steps from one state to another, each the outermost one that leads there."""
    onwards: dict[State, list[Step]] = collections.defaultdict(list)
    for step in sorted(steps, key=lambda step: step.name.count(".")):
        onwards[step.taken].append(step)
    dead: set[State] = set()

    def search(state: State) -> list[Step] | None:
        if state == end:
            return []
        if state not in dead:
            for step in onwards[state]:
                rest = search(step.given)
                if rest is not None:
                    return [step, *rest]
            dead.add(state)
        return None

    return search(start)


def _furthest(steps: Sequence[Step], start: State) -> str:
    """The last module that is reached from a state."""
    reached, last = {start}, ""
    for step in steps:  # in the order in which they ended: an outer module after its inner ones
        if step.taken in reached:
            reached.add(step.given)
            last = step.name
    return last


def _expanded(body: nn.Module, step: Step, steps: Sequence[Step]) -> list[Step]:
    """The step, or the blocks inside of it where it is a sequence of blocks."""
    inside = [each for each in steps if each.name.startswith(f"{step.name}.")]
    path = _path(inside, step.taken, step.given)
    if path is None:
        return [step]
    sizes = [_matrices(body.get_submodule(each.name)) for each in path]
    long = isinstance(body.get_submodule(step.name), nn.Sequential) and sum(sizes) >= LAYERS
    if max(sizes) < 2 and not long:
        return [step]
    return [part for each in path for part in _expanded(body, each, steps)]


def _matrices(module: nn.Module) -> int:
    """Number of weights with two or more dimensions."""
    return sum(value.dim() >= 2 for value in module.parameters())


def _layout(shape: tuple[int, ...]) -> Layout | None:
    """The order of a feature tensor's dimensions, where the images are square; None: unknown."""
    if shape[0] != B:
        return None
    if len(shape) == 3:
        return "BNC"
    if len(shape) == 4 and shape[1] != shape[3]:
        return "BCHW" if shape[2] == shape[3] else "BHWC" if shape[1] == shape[2] else None
    return None
