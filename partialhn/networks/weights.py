"""Finds a network's tensors among those of a file, whatever wrappers stand before their names.

A training script may have saved `conv1.weight` as `module.conv1.weight`, as
`model.backbone.conv1.weight`, or inside `state_dict` or `model_ema`. The words before the
network's own names, its prefix, are found by counting: the prefix counts below which most of the
network's tensors lie.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from partialhn.errors import InputError
from partialhn.pixels import Pixels

Tensors = Mapping[str, Tensor]
Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Renames and reshapes tensors without a prefix the way the network's family wants them."""
NORMALISATION = ("mean_C", "std_C")
"""Names under which this package's own files hold the normalisation of pixels."""
NOT_ITS_OWN = (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError,
               AssertionError)
"""Exceptions that a family's rules raise on tensors of another network."""
_COUNTER = "num_batches_tracked"
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Supply:
    """Tensors from somewhere else, with the pixels that they were trained with."""

    source: str
    """Where they are from, for messages."""
    tensors: Tensors
    pixels: Pixels | None = None
    """None: their source does not say."""
    part: str = ""
    """The prefix to take where several hold the network."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The tensors that a network needs."""

    name: str
    """The network's name, for messages."""
    tensors: Tensors
    """All of the network's tensors by its own names."""
    classifier: tuple[str, ...]
    """Beginnings of the classifier's names: its tensors may be missing or of another shape."""
    adapt: Adapt
    """How the network's family renames and reshapes tensors of other programs."""

    @property
    def needed(self) -> set[str]:
        """Names of the tensors that a file must have."""
        return {key for key in self.tensors
                if not key.startswith(self.classifier) and not key.endswith(_COUNTER)}


@dataclasses.dataclass(frozen=True)
class Matched:
    """The tensors found for a network, and what its user should know about them."""

    tensors: dict[str, Tensor]
    """float32 (whole numbers stay whole), under the network's own names; no classifier."""
    prefix: str
    """The words that stood before the names in the file."""
    notes: tuple[str, ...]


def match_weights(supply: Supply, wanted: Wanted) -> Matched:
    """Finds the network's tensors in a supply.

    Where several parts of it hold the network and none is chosen, it takes the moving average
    (EMA).

    Raises: InputError for tensors that are missing, ambiguous, of another shape, or left over
    within the network's own modules, and for numbers that no trained network has.
    """
    source, given = supply.source, supply.tensors
    prefix, notes = _choose_prefix(source, given, wanted, supply.part)
    ours = {key.removeprefix(prefix): value for key, value in given.items()
            if key.startswith(prefix)}
    adapted = _adapted(source, ours, wanted)
    taken = {key: adapted[key] for key in wanted.tensors
             if key in adapted and not key.startswith(wanted.classifier)}
    _check_complete(source, prefix, adapted, taken, wanted)
    _check_numbers(source, prefix, taken)
    left = [key for key in adapted if key not in wanted.tensors
            and not key.startswith(wanted.classifier)]
    left += [key for key in given if not key.startswith(prefix)
             and key.rpartition(".")[2] not in NORMALISATION]
    if left:
        notes.append(f"trunk {source!r} holds more than the network, which is not used: "
                     f"{_listed(left)}")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in taken.values()
                    if value.is_floating_point() and value.dtype != torch.float32})
    if kinds:
        notes.append(f"trunk {source!r} holds {' and '.join(kinds)} numbers; they are converted "
                     "to float32")
    tensors = {key: value.float() if value.is_floating_point() else value
               for key, value in taken.items()}
    return Matched(tensors, prefix, tuple(notes))


def _choose_prefix(source: str, given: Tensors, wanted: Wanted,
                   part: str) -> tuple[str, list[str]]:
    """The prefix of the network's names, and a note where there was a choice."""
    counts = _prefixes(given, wanted.needed)
    if part:
        chosen = [prefix for prefix in counts if f".{prefix}".find(f".{part}.") >= 0]
        if not chosen:
            raise InputError(f"trunk {source!r} has no part {part!r} that holds a {wanted.name}; "
                             f"allowed: {_quoted(_best(counts)) or 'none'}")
        counts = Counter({prefix: counts[prefix] for prefix in chosen})
    best = _best(counts)
    if not best or counts[best[0]] < len(wanted.needed) / 2:
        return best[0] if part else _foreign_prefix(given, wanted), []
    averages = [prefix for prefix in best if _is_average(prefix)]
    choice = averages if len(averages) == 1 else best
    if len(choice) > 1:
        raise InputError(f"trunk {source!r} holds {len(best)} sets of weights of a {wanted.name}: "
                         f"{_quoted(best)}; choose one, for example {source}#{_word(best[0])}")
    others = [prefix for prefix in _best(counts, share=0.5) if prefix != choice[0]]
    kind = "the moving average" if _is_average(choice[0]) else "the weights"
    note = (f"{kind} {_word(choice[0])!r} of trunk {source!r} is taken, beside {_quoted(others)}; "
            f"choose another with {source}#NAME")
    return choice[0], [note] if others else []


def _foreign_prefix(given: Tensors, wanted: Wanted) -> str:
    """The prefix before names that the network's family must rename first: the one that renaming
    fits best, of those before a third of the tensors or more.
    """
    counts = Counter(".".join(words[:end]) + "." for words in (key.split(".") for key in given)
                     for end in range(1, len(words)))
    scores = {"": 0} | {prefix: 0 for prefix, count in counts.items() if count >= len(given) / 3}
    for prefix in scores:
        with contextlib.suppress(*NOT_ITS_OWN):
            renamed = wanted.adapt({key.removeprefix(prefix): value
                                    for key, value in given.items() if key.startswith(prefix)})
            scores[prefix] = len(wanted.needed & renamed.keys())
    return max(scores, key=lambda prefix: scores[prefix])


def _prefixes(given: Iterable[str], needed: set[str]) -> "Counter[str]":
    """For each prefix, how many of the needed names lie below it."""
    counts: Counter[str] = Counter()
    for key in given:
        words = key.split(".")
        for start in range(len(words)):
            if ".".join(words[start:]) in needed:
                counts["".join(f"{word}." for word in words[:start])] += 1
    return counts


def _best(counts: "Counter[str]", share: float = 1.0) -> list[str]:
    """The prefixes with the largest count, or with at least this share of it."""
    top = max(counts.values(), default=0)
    return sorted(prefix for prefix, count in counts.items() if count >= share * top)


def _is_average(prefix: str) -> bool:
    words = prefix.replace("_", ".").lower().split(".")
    return any(word in ("ema", "teacher", "averaged") for word in words)


def _word(prefix: str) -> str:
    return prefix.rstrip(".")


def _quoted(prefixes: Sequence[str]) -> str:
    return ", ".join(repr(_word(prefix)) for prefix in prefixes)


def _adapted(source: str, ours: dict[str, Tensor], wanted: Wanted) -> dict[str, Tensor]:
    """The tensors as the network's family wants them."""
    try:
        return wanted.adapt(dict(ours))
    except NOT_ITS_OWN as error:
        raise InputError(f"trunk {source!r} is not a {wanted.name}: its tensors cannot be "
                         f"converted ({error}); it begins with {_listed(list(ours))}") from error


def _check_complete(source: str, prefix: str, adapted: Tensors, taken: Tensors,
                    wanted: Wanted) -> None:
    """Raises InputError where tensors are missing, of another shape, or of a deeper network."""
    missing = sorted(wanted.needed - taken.keys())
    modules = ({key.split(".")[0] for key in wanted.needed}
               - {key.split(".")[0] for key in wanted.classifier})
    extra = sorted(key for key in adapted.keys() - wanted.tensors.keys()
                   if key.split(".")[0] in modules and not key.startswith(wanted.classifier))
    wrong = [f"{prefix}{key} is {tuple(value.shape)} in the file and "
             f"{tuple(wanted.tensors[key].shape)} in the network"
             for key, value in sorted(taken.items()) if value.shape != wanted.tensors[key].shape]
    whole = [f"{prefix}{key}" for key, value in sorted(taken.items())
             if wanted.tensors[key].is_floating_point() and not value.is_floating_point()]
    problems = [text for text, names in (
        (f"missing {_listed(missing)}", missing), (f"extra {_listed(extra)}", extra),
        (f"of another shape: {'; '.join(wrong[:_SHOWN])}", wrong),
        (f"whole numbers in {_listed(whole)}", whole)) if names]
    if problems:
        raise InputError(f"trunk {source!r} is not a {wanted.name}: {', '.join(problems)} "
                         f"({len(taken)} of {len(wanted.tensors)} tensors have the network's "
                         "names); allowed: the weights of the network that --backbone names")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"


def _check_numbers(source: str, prefix: str, tensors: Tensors) -> None:
    """Raises InputError for numbers that no trained network has, naming the tensor."""
    for key, value in sorted(tensors.items()):
        name = f"tensor {prefix + key!r} of trunk {source!r}"
        if not torch.isfinite(value.float()).all():
            raise InputError(f"{name} holds NaN or infinity; allowed: finite numbers")
        if key.endswith("running_var") and (value < 0).any():
            raise InputError(f"{name} is {value.min():g} at its least; allowed: a variance of 0 "
                             "or more")
