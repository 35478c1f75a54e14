"""The search space: configuration keys with the values they may take.

    hypernet.beta: {loguniform: [0.001, 1]}     a number, drawn on a logarithmic scale
    train.learning_rate: {uniform: [0.001, 0.01]}
    hypernet.norm: {choice: [batch, instance]}  one of these, chosen by the sampler
    backbone.freeze_depth: {grid: [2, 3, 4]}    one of these, each equally often
    backbone.freeze_depth: {refine: [2, 5, 8]}  these first, then depths around the best one
    train.epochs: 10                            not searched: always this
    defaults: false                             search no key that this file does not name

A depth is a number, a block's name or a share such as 75%, and becomes a number when the space is
read. Other keys keep their default range. A range of a whole-number key gives whole numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from partialhn.config import Config, HypernetConfig
from partialhn.errors import InputError
from partialhn.yaml_text import read_yaml
from pipelines.search.depths import Depths, find_depths

DEPTH = "backbone.freeze_depth"
KINDS = ("choice", "grid", "uniform", "loguniform", "refine")
SEARCHABLE = (DEPTH, "features.views",
              *(f"hypernet.{field.name}" for field in dataclasses.fields(HypernetConfig)),
              "train.epochs", "train.batch_size", "train.learning_rate", "train.schedule",
              "train.label_smoothing")
"""All other keys are the same for all trials, which share images, trunk and features."""
ONLY_WITH = {"hypernet.hidden": ("hypernet.generator", ("additive",)),
             "hypernet.channel_dim": ("hypernet.generator", ("additive",)),
             "hypernet.embedding_dim": ("hypernet.generator", ("additive",)),
             "hypernet.code_dim": ("hypernet.generator", ("bilinear",)),
             "hypernet.fresh_columns": ("hypernet.generator", ("columns",)),
             "hypernet.dictionary": ("hypernet.generator", ("columns",)),
             "hypernet.dictionary_after": ("hypernet.generator", ("columns",)),
             "hypernet.residual": ("hypernet.generator", ("bilinear", "additive")),
             "hypernet.beta": ("hypernet.generator", ("bilinear", "additive")),
             "hypernet.norm_groups": ("hypernet.norm", ("group",))}
"""Keys that have an effect only when another key has one of some values."""
DECIDING = {other for other, _ in ONLY_WITH.values()}
"""The keys whose value decides whether others have an effect."""
MAX_COMBINATIONS = 200
FASTEST, FASTEST_FROM_NETWORK = 3.0, 1.5
"""Highest learning rate of the default space, as a multiple of the user's. Heads that keep the
network's statistics diverge at 3.3 times the default (`docs/measurements/pretrained.md`)."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]
    grid: bool = False
    """Each value equally often, whatever the search has learned."""
    start: tuple[Any, ...] = ()
    """The values that the search begins with, before it adds others around the best one (refine);
    empty: all of them."""


@dataclasses.dataclass(frozen=True)
class Range:
    """A number from low to high, both included."""

    low: float
    high: float
    log: bool
    whole: bool


Dimension = Choice | Range


@dataclasses.dataclass(frozen=True)
class Space:
    """Dimensions by configuration key, and values that every trial has."""

    dimensions: dict[str, Dimension]
    fixed: dict[str, Any]

    def grid_points(self, depths: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Every combination of the grid dimensions' values; one empty one without a grid.

        depths: the depths to combine; by default those that the search begins with.
        """
        grids = {key: (depths if depths and key == DEPTH else each.start or each.values)
                 for key, each in self.dimensions.items()
                 if isinstance(each, Choice) and each.grid}
        return [dict(zip(grids, values, strict=True))
                for values in itertools.product(*grids.values())]

    def depths(self) -> list[int]:
        """The freeze depths that the search begins with, in order."""
        found = self.dimensions.get(DEPTH)
        return (sorted(set(found.start)) if isinstance(found, Choice) and found.start
                else self.possible_depths())

    def possible_depths(self) -> list[int]:
        """The freeze depths that a trial may have, in order."""
        found = self.dimensions.get(DEPTH)
        if found is None:
            return [self.fixed[DEPTH]]
        if isinstance(found, Range):
            return list(range(int(found.low), int(found.high) + 1))
        return sorted(set(found.values))

    @property
    def refines(self) -> bool:
        """Whether depths around the best one are added during the search."""
        found = self.dimensions.get(DEPTH)
        return isinstance(found, Choice) and bool(found.start)

    def largest(self, key: str, default: int) -> int:
        """The largest whole number that a key may take."""
        found = self.dimensions.get(key)
        if found is None:
            return int(self.fixed.get(key, default))
        return int(found.high if isinstance(found, Range) else max(found.values))

    def config(self, base: Config, params: Mapping[str, Any]) -> Config:
        """The configuration of a trial.

        Raises: InputError for values that are not valid together.
        """
        return _with(base, self.fixed | dict(params))

    def to_dict(self) -> dict[str, Any]:
        """The complete space as plain values that `parse_space` reads."""
        written: dict[str, Any] = {"defaults": False} | dict(self.fixed)
        for key, each in self.dimensions.items():
            if isinstance(each, Choice):
                kind = "refine" if each.start else "grid" if each.grid else "choice"
                written[key] = {kind: list(each.start or each.values)}
            else:
                written[key] = {"loguniform" if each.log else "uniform": [each.low, each.high]}
        return written


def applies(key: str, params: Mapping[str, Any], base: Config) -> bool:
    """Whether a key has an effect, given the other values of a trial."""
    if key not in ONLY_WITH:
        return True
    other, wanted = ONLY_WITH[key]
    return params.get(other, value_of(base, other)) in wanted


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def default_space(base: Config, depths: Choice) -> Space:
    """Ranges around the configuration that the user started from, and these depths.

    Where tasks start from the network's own weights, generator and norm are not searched: these
    weights were trained with their own norm, and with another one a trial only guesses.
    """
    hypernet, train = base.hypernet, base.train
    rate = train.learning_rate
    fastest = FASTEST_FROM_NETWORK if hypernet.norm == "network" else FASTEST
    fresh, embedding = hypernet.fresh_columns, hypernet.embedding_dim
    beta = hypernet.beta or HypernetConfig().beta
    dimensions: dict[str, Dimension] = {
        DEPTH: depths,
        "hypernet.generator": _choice(hypernet.generator, "columns", "additive"),
        "hypernet.fresh_columns": _choice(fresh, max(1, fresh // 2), max(1, 2 * fresh)),
        "hypernet.embedding_dim": _choice(embedding, 2 * embedding),
        "hypernet.hidden": _choice(hypernet.hidden, (50, 32), (100, 64)),
        "hypernet.beta": Range(beta / 10, beta * 10, log=True, whole=False),
        "hypernet.norm": _choice(hypernet.norm, "batch", "instance", "group"),
        "train.learning_rate": Range(rate / 3, rate * fastest, log=True, whole=False),
        "features.views": _choice(base.features.views, max(1, base.features.views // 2)),
    }
    if hypernet.starts_from == "network":
        for name in ("generator", "norm", "embedding_dim", "hidden", "beta"):
            del dimensions[f"hypernet.{name}"]
    if train.epochs is not None:
        dimensions["train.epochs"] = _choice(train.epochs, max(1, train.epochs // 2))
    return Space(dimensions, {})


def _choice(*values: Any) -> Choice:
    return Choice(tuple(dict.fromkeys(values)))


def load_space(path: str | None, base: Config, depths: Sequence[int | str] | None) -> Space:
    """The default space, changed by a YAML file; `depths` replaces its depths.

    Raises: InputError with the key, its value and the allowed values.
    """
    if path is None:
        return parse_space({}, base, depths)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"space file {path!r} cannot be read: {error.strerror}; give the path of "
                         "a YAML file") from error
    values = read_yaml(content, f"space file {path!r}")
    if not isinstance(values, Mapping):
        raise InputError(f"space file {path!r} holds {type(values).__name__}; allowed: keys such "
                         "as hypernet.beta: {loguniform: [0.001, 1]}")
    return parse_space(values, base, depths)


def parse_space(values: Mapping[str, Any], base: Config,
                depths: Sequence[int | str] | None = None) -> Space:
    """A space from plain values, as a YAML file or `Space.to_dict` gives them.

    depths: replaces the depths of `values`; numbers, names of blocks or shares.

    Raises: InputError with the key, its value and the allowed values.
    """
    given = dict(values)
    keep = given.pop("defaults", True)
    if not isinstance(keep, bool):
        raise InputError(f"defaults is {keep!r}; allowed: true, false")
    known = find_depths(base)
    usual = _usual_depths(known) if depths is None else Choice(
        tuple(dict.fromkeys(map(known.number, depths))), grid=True)
    dimensions = dict(default_space(base, usual).dimensions) if keep else {}
    fixed: dict[str, Any] = {}
    for key, value in given.items():
        _check_key(key)
        dimensions.pop(key, None)
        value = _numbered(value, known) if key == DEPTH else value
        if isinstance(value, Mapping):
            dimensions[key] = _dimension(key, value, base)
        else:
            _with(base, {key: value})
            fixed[key] = value
    if depths is not None or (DEPTH not in dimensions and DEPTH not in fixed):
        fixed.pop(DEPTH, None)
        dimensions[DEPTH] = usual
    space = Space(dimensions, fixed)
    for key in dimensions:
        _check_values(key, space, base)
    return space


def _usual_depths(known: Depths) -> Choice:
    """Every depth of a network of few, otherwise a coarse grid that is refined."""
    everything = known.deepest + 1 == len(known.first)
    return Choice(known.first, grid=True) if everything else _refinement(known.first, known)


def _refinement(start: Sequence[int], known: Depths) -> Choice:
    return Choice(tuple(range(known.deepest + 1)), grid=True, start=tuple(dict.fromkeys(start)))


def _numbered(value: Any, known: Depths) -> Any:
    """Depths of a space as numbers; what is no list of values is refused later."""
    if not isinstance(value, Mapping):
        return known.number(value)
    return {kind: [known.number(each) for each in members] if isinstance(members, list) else members
            for kind, members in value.items()}


def _check_key(key: Any) -> None:
    if key not in SEARCHABLE:
        known = _exists(str(key))
        why = (" is the same for every trial of a search (trials share images, trunk and features)"
               if known else " is no configuration key")
        raise InputError(f"space key {key!r}{why}; allowed: {', '.join(SEARCHABLE)}")


def _exists(key: str) -> bool:
    try:
        value_of(Config(), key)
    except AttributeError:
        return False
    return True


def _dimension(key: str, value: Mapping[str, Any], base: Config) -> Dimension:
    if len(value) != 1 or next(iter(value)) not in KINDS:
        raise InputError(f"space of {key} is {dict(value)!r}; allowed: one of "
                         + ", ".join(f"{kind}: [...]" for kind in KINDS))
    kind, members = next(iter(value.items()))
    if not isinstance(members, Sequence) or isinstance(members, str) or not members:
        raise InputError(f"{kind} of {key} is {members!r}; allowed: a list of values")
    if kind == "refine" and key != DEPTH:
        raise InputError(f"space of {key} is refine; allowed: {', '.join(KINDS[:-1])}, since only "
                         f"{DEPTH} is refined")
    if kind == "refine":
        return _refinement(members, find_depths(base))
    if kind in ("choice", "grid"):
        frozen = tuple(tuple(each) if isinstance(each, list) else each for each in members)
        return Choice(tuple(dict.fromkeys(frozen)), grid=kind == "grid")
    current = value_of(base.with_first_values(), key)  # a number where None is chosen for each task
    numbers = [_number(each) for each in members]
    if isinstance(current, bool) or not isinstance(current, int | float):
        raise InputError(f"space of {key} is a {kind}; allowed: choice or grid, since {key} is no "
                         "number")
    if (len(numbers) != 2 or any(not math.isfinite(each) for each in numbers)
            or not numbers[0] < numbers[1]
            or (kind == "loguniform" and numbers[0] <= 0)):
        raise InputError(f"{kind} of {key} is {list(members)!r}; allowed: [low, high] with low < "
                         "high" + (" and both above 0" if kind == "loguniform" else ""))
    whole = isinstance(current, int)
    if whole and any(each != int(each) for each in numbers):
        raise InputError(f"{kind} of {key} is {list(members)!r}; allowed: whole numbers")
    return Range(numbers[0], numbers[1], kind == "loguniform", whole)


def _number(value: Any) -> float:
    """The value as a number, also where YAML 1.1 reads it as text (1e-3); NaN for others."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _check_values(key: str, space: Space, base: Config) -> None:
    """Checks that every value is valid with some values of the other keys. Raises: InputError."""
    each = space.dimensions[key]
    values = each.values if isinstance(each, Choice) else (_end(each, each.low),
                                                           _end(each, each.high))
    for value in values:
        first: InputError | None = None
        for others in _combinations(key, space):
            try:
                space.config(base, others | {key: value})
                first = None
                break
            except InputError as error:
                first = first or error
        if first:
            raise InputError(f"space of {key}: {first}")


def _end(each: Range, value: float) -> float | int:
    return int(value) if each.whole else value


def _combinations(key: str, space: Space) -> Iterator[dict[str, Any]]:
    """The base alone, then combinations of the values of the other keys of the same section."""
    yield {}
    section = key.partition(".")[0]
    others = {name: (each.values if isinstance(each, Choice) else
                     (_end(each, each.low), _end(each, each.high)))
              for name, each in space.dimensions.items()
              if name != key and name.startswith(f"{section}.")}
    for values in itertools.islice(itertools.product(*others.values()), MAX_COMBINATIONS):
        yield dict(zip(others, values, strict=True))


def _with(base: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with dotted keys replaced. Raises: InputError."""
    nested = base.to_dict()
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested[section][name] = list(value) if isinstance(value, tuple) else value
    return Config.from_dict(nested)
