"""The table of strategies: all that can be said of a strategy without importing it.

Options, the command line, benchmarks and reports take names and labels from here. Other packages
add lines with `register_strategy` or with an entry point of the group `partialhn.strategies`.

Such a strategy declares options of its own with their defaults, `options = {"share": 0.5}`, and a
configuration sets them with `strategy_options: [share=0.3]`. A value has the type of its default.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from partialhn.errors import InputError
from partialhn.plugins import Table, load_object

Depths = Literal["all", "frozen", "own"]
Value = bool | int | float | str
"""Value of an option that a strategy of another package declares."""
_KINDS: tuple[type[Value], ...] = (bool, int, float, str)
"""Types of such values. A bool is an int, too, so it stands first."""


@dataclasses.dataclass(frozen=True)
class StrategyLine:
    """One strategy."""

    source: str | type
    """The class, or where it is, as module:Class. It is imported when it is used."""
    label: str | None = None
    """Name in reports; None: the attribute `label` of the class, or the name in the table."""
    paper: str = ""
    """Authors and year of its description, where there is one."""
    options: tuple[str, ...] = ()
    """Keys of the section `train` that this strategy reads and that others may not."""
    depths: Depths | None = None
    """Freeze depths at which a benchmark learns it: all, all where something is frozen, or the
    benchmark's own depth alone. None: benchmarks leave it out."""
    needs_every_task: bool | None = False
    """Whether each task needs the training features of all tasks before it; None: the attribute
    `needs_every_task` of the class."""

    def load(self, name: str) -> type:
        """The class. Raises: InputError where it cannot be imported, or is no class."""
        if isinstance(self.source, type):
            return self.source
        loaded = load_object(self.source, f"strategy {name!r}")
        if not isinstance(loaded, type):
            raise InputError(f"strategy {name!r} at {self.source!r} is a "
                             f"{type(loaded).__name__}; allowed: a subclass of partialhn.Strategy")
        return loaded


_HERE = "partialhn.strategies"
OWN: dict[str, StrategyLine] = {
    "partial_hn": StrategyLine(
        f"{_HERE}.partial_hn:PartialHypernet", "Partial hypernetwork", "Hemati et al. 2023",
        depths="all"),
    "separate_heads": StrategyLine(
        f"{_HERE}.separate_heads:SeparateHeads", "Separate head per task", depths="all"),
    "linear_probe": StrategyLine(
        f"{_HERE}.linear_probe:LinearProbe", "Linear classifier per task", depths="frozen"),
    "ridge": StrategyLine(
        f"{_HERE}.closed_form:RidgeHeads", "Ridge regression", depths="frozen"),
    "ncm": StrategyLine(
        f"{_HERE}.closed_form:NearestClassMean", "Nearest class mean", "Mensink et al. 2013",
        depths="frozen"),
    "joint": StrategyLine(
        f"{_HERE}.joint:Joint", "Joint training on all tasks", depths="own",
        needs_every_task=True),
    "latent_replay": StrategyLine(
        f"{_HERE}.latent_replay:LatentReplay", "Latent replay", "Pellegrini et al. 2020",
        ("buffer",), depths="all"),
    "ewc": StrategyLine(
        f"{_HERE}.ewc:Ewc", "Elastic weight consolidation", "Kirkpatrick et al. 2017",
        ("ewc_strength",), depths="own"),
    "lwf": StrategyLine(
        f"{_HERE}.lwf:Lwf", "Learning without forgetting", "Li & Hoiem 2016",
        ("lwf_strength",), depths="own"),
    "naive": StrategyLine(
        f"{_HERE}.naive:Naive", "Naive fine-tuning", depths="own"),
}
"""The strategies of this package, in the order in which reports and benchmarks show them."""


def _outside(source: str | type) -> StrategyLine:
    return StrategyLine(source, needs_every_task=None)


TABLE: Table[StrategyLine] = Table("strategy", "partialhn.strategies", OWN,
                                   lambda _name, value: _outside(value))
"""All strategies: those of this package, and those that other packages add."""


def register_strategy(name: str, source: str | type) -> None:
    """Makes a strategy known in this process under a name.

    Args:
        name: the name that `strategy` and `compare` take.
        source: a subclass of `partialhn.Strategy`, or where it is, as module:Class. Its attributes
            `label` and `needs_every_task` say what reports call it, and whether each task needs the
            training features of all tasks before it.

    Other processes, as the workers of a cluster, do not see it: there the package must declare an
    entry point of the group `partialhn.strategies`.

    Raises: InputError for a name that is taken.
    """
    TABLE.register(name, _outside(source))


def label_of(name: str) -> str:
    """The name of a strategy in reports; `name` itself where the table does not have it."""
    if name not in TABLE:
        return name
    line = TABLE[name]
    return line.label or getattr(line.load(name), "label", "") or name


def needs_every_task(name: str) -> bool:
    """Whether each task needs the training features of all tasks before it."""
    line = TABLE.find(name)
    if line.needs_every_task is None:
        return bool(getattr(line.load(name), "needs_every_task", False))
    return line.needs_every_task


def declared_options(name: str) -> Mapping[str, Value]:
    """The options that a strategy declares, with their defaults as Python's own values.

    Raises: InputError for a default that no option can have.
    """
    options: Mapping[str, Any] = getattr(TABLE.find(name).load(name), "options", {})
    try:
        return plain_defaults(options)
    except InputError as error:
        raise InputError(f"strategy {name!r} declares {error}") from None


def plain_defaults(options: Mapping[str, Any]) -> dict[str, Value]:
    """Defaults of options as Python's own values: numpy's float64 and the like become numbers.

    Raises: InputError for a default that no option can have.
    """
    plain = {}
    for option, default in options.items():
        value = default.item() if getattr(default, "shape", None) == () else default
        kind = next((kind for kind in _KINDS if isinstance(value, kind)), None)
        if kind is None:
            raise InputError(f"the option {option} with the default {default!r}; allowed: a "
                             "number, a text, true or false")
        plain[option] = kind(value)
    return plain


def check_options(given: Sequence[str], names: Sequence[str]) -> None:
    """Checks options, each as NAME=VALUE, against the strategies of a run by name.

    Raises: InputError for an option that no strategy declares, is given twice, or has no such
    value.
    """
    if not given:
        return
    declared = {name: declared_options(name) for name in names}
    known = {option for options in declared.values() for option in options}
    parsed: set[str] = set()
    for text in given:
        option, equals, _ = text.partition("=")
        if not equals or option not in known:
            allowed = ", ".join(f"{option}={default} ({name})" for name, options in
                                declared.items() for option, default in options.items())
            raise InputError(f"strategy_options has {text!r}; allowed: "
                             + (allowed or f"none with the strategy {', '.join(names)}, which "
                                "declares no options of its own"))
        if option in parsed:
            raise InputError(f"strategy_options has {option} twice; allowed: one value for each")
        parsed.add(option)
    for options in declared.values():
        option_values(options, given)


def options_of(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Those of some options, each as NAME=VALUE, that a strategy declares."""
    declared = declared_options(name) if given else {}
    return tuple(text for text in given if text.partition("=")[0] in declared)


def option_values(declared: Mapping[str, Any], given: Sequence[str]) -> dict[str, Value]:
    """The value of each declared option: the given one, or its default.

    given: options as NAME=VALUE; those of other strategies are left out.

    Raises: InputError for a value of another type than the default's.
    """
    texts = dict(text.split("=", 1) for text in given)
    return {option: _value(option, texts[option], default) if option in texts else default
            for option, default in plain_defaults(declared).items()}


def _value(option: str, text: str, default: Value) -> Value:
    """A text as a value of the default's type."""
    if isinstance(default, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        kind = "true or false"
    else:
        with contextlib.suppress(ValueError):
            value = type(default)(text)
            if not isinstance(value, float) or math.isfinite(value):
                return value
        kind = "a whole number" if isinstance(default, int) else "a number"
    raise InputError(f"strategy_options has {option}={text}; allowed: {kind}, such as the default "
                     f"{default}")
