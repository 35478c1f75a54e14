"""The tasks of a stream's champion beside those that a run is about to learn.

A run keeps what the champion knows: its tasks come first, in the order in which they were learned,
and new tasks come behind them, whatever their names are. Where a run would leave a task out, or
learn one again, `Continuation.lines` says so before anything is trained, and `check` refuses.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.checkpoints import checkpoint
from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError
from partialhn.naming import named_sections
from partialhn.training import lineage
from partialhn.training.records import Forgotten
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.registry.versions import CHAMPION, Version, chain_of

MAX_OPTIONS = 6
"""Largest number of options that a message lists."""


@dataclasses.dataclass(frozen=True)
class LearnedBefore:
    """The registered tasks that a stream's champion consists of."""

    stream: str
    champion: Version | None = None
    chain: tuple[Version, ...] = ()
    """The champion and the versions that it was learned from, oldest first."""
    taken_back: tuple[Version, ...] = ()
    """Versions learned on top of the champion, from which a person moved the alias back."""
    contents: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)
    """Fingerprints of the images of each version's task, by lineage id, where they are known."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The options, by section, with which the champion's last task was learned."""
    registered: frozenset[str] = frozenset()
    """The lineage ids of all versions."""

    @property
    def lacks_versions(self) -> bool:
        """Whether versions that the champion was learned from were deleted in MLflow."""
        return bool(self.chain) and self.chain[0].stands_on is None and bool(
            self.chain[0].tags.get("parent"))

    def ordered(self, experiences: Sequence[Experience]) -> list[Experience]:
        """The tasks in the order in which they are learned: the champion's first, then new ones.

        A task that has another name now keeps its place. Where versions are missing, the champion's
        order is not known, and the tasks stay as they are.
        """
        if self.lacks_versions:
            return list(experiences)
        rest, first = list(experiences), []
        for version in (*self.chain, *self.taken_back):
            experience = self._now(version, rest)
            if experience is not None:
                rest.remove(experience)
                first.append(experience)
        return first + rest

    def same_images(self, version: Version, experience: Experience) -> bool | None:
        """Whether a task has the images that a version learned; None if that is not known."""
        known = self.contents.get(version.tags["prefix"])
        return known <= _fingerprints(experience) if known else None

    def _now(self, version: Version, experiences: Sequence[Experience]) -> Experience | None:
        """The task that a version learned, by its name or else by its images."""
        by_name = [task for task in experiences if task.name == version.task]
        by_images = [task for task in experiences if self.same_images(version, task)]
        return next(iter(by_name + by_images), None)


def learned_before(registry: Registry, storage: Storage, stream: str) -> LearnedBefore:
    """The champion of a stream and its tasks; changes nothing.

    Raises: InputError if the stream's history belongs to another registry or storage.
    """
    registry.aliases.check(stream)
    versions = registry.versions(stream) if registry.knows(stream) else []
    champion = next((version for version in versions if CHAMPION in version.aliases), None)
    if champion is None:
        return LearnedBefore(stream)
    chain = chain_of(versions, champion)
    later = chain
    if registry.aliases.moved_by_hand(stream):
        chains = (chain_of(versions, version) for version in reversed(versions))
        later = next((longer for longer in chains if longer[:len(chain)] == chain), chain)
    store = open_store(storage)
    contents = {}
    for version in later:
        manifests = map(store.manifest, version.feature_keys)
        contents[version.tags["prefix"]] = frozenset(
            f"{manifest.recipe.data} {manifest.recipe.transform}"
            for manifest in manifests if manifest is not None)
    return LearnedBefore(stream, champion, tuple(chain), tuple(later[len(chain):]), contents,
                         _options(storage, stream, champion),
                         frozenset(version.tags["prefix"] for version in versions))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How the tasks of a run fit behind the champion's tasks."""

    before: LearnedBefore
    kept: tuple[str, ...] = ()
    """The champion's tasks that stay as they are, oldest first."""
    new: tuple[str, ...] = ()
    """Tasks that no version has."""
    known: tuple[str, ...] = ()
    """Tasks that the champion does not have, and that other versions have."""
    left_out: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """New names of the champion's tasks whose images have another name now."""
    again: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The champion's tasks that are learned again, each with the reason."""
    brought_back: tuple[str, ...] = ()
    """Tasks that a person took back, and that this run would add again."""
    remembered: tuple[Forgotten, ...] = ()
    """Tasks that the champion has forgotten, and that this run would add again."""

    @property
    def changes(self) -> bool:
        """Whether the run's model answers differently from the champion for any of its tasks."""
        return bool(self.left_out or self.renamed or self.again or self.brought_back
                    or self.remembered)

    def fields(self) -> dict[str, Any] | None:
        """The entry `continues` of result.json; None for a stream without a champion."""
        if self.before.champion is None:
            return None
        return {"champion": self.before.champion.version, "kept": list(self.kept),
                "new": list(self.new), "left_out": list(self.left_out),
                "known": list(self.known),
                "renamed": dict(self.renamed), "again": dict(self.again),
                "brought_back": [*self.brought_back, *(gone.task for gone in self.remembered)]}

    def lines(self) -> list[str]:
        """The fate of each of the champion's tasks, in words."""
        lines = [f"task {name!r} is left out: it is not among the data" for name in self.left_out]
        lines += [f"task {old!r} is named {new!r} now (the same images): {old!r} is left out, and "
                  f"{new!r} is learned" for old, new in self.renamed.items()]
        lines += [f"task {name!r} is learned again: {why}" for name, why in self.again.items()]
        lines += [f"task {gone.task!r} comes back: {gone}; `partialhn retrain` goes on without it"
                  for gone in self.remembered]
        return lines + [f"task {name!r} comes back: a person moved the champion back to a version "
                        "without it (partialhn models history)" for name in self.brought_back]

    def check(self, *, replace: bool) -> list[str]:
        """The lines to print before a run.

        Raises: InputError if the run changes what the champion knows, unless `replace`.
        """
        champion = self.before.champion
        if champion is None:
            return []
        name = f"models:/{self.before.stream}@{CHAMPION} (version {champion.version})"
        listed = "\n  ".join(self.lines())
        if self.changes and not replace:
            raise InputError(
                f"this run does not continue {name}:\n  {listed}\n"
                "allowed: the data and options with which it was learned; another --name, for a "
                "stream of its own; or --replace, with which the model of this run becomes "
                f"champion and version {champion.version} stays registered")
        if self.changes:
            return [f"replaces {name}:", *(f"  {line}" for line in self.lines())]
        more = [f"{len(names)} {word}: {', '.join(names)}"
                for word, names in (("new", self.new), ("learned before", self.known)) if names]
        return [f"continues {name}: {', '.join([f'{len(self.kept)} kept', *more])}"]


def compare(before: LearnedBefore, config: Config, experiences: Sequence[Experience],
            network: str | None) -> Continuation:
    """Compares the tasks of a run, in the order of `LearnedBefore.ordered`, with the champion's.

    network: fingerprint of the network that the trunk is cut from; None if it is still to be
    trained, so that every task is learned again.
    """
    names = [task.name for task in experiences]
    ids = () if network is None else lineage.lineage_ids_of(config, network, experiences)
    places = [ids.index(version.tags["prefix"]) if version.tags["prefix"] in ids else -1
              for version in before.chain]
    forgotten = before.champion.forgotten if before.champion else ()
    back_again = tuple(gone for gone in forgotten if gone.task in names)
    first = len(places)
    if forgotten:  # a later id stands for the forgotten task, too
        ends = ["", *(version.tags["prefix"] for version in before.chain)]
        first = next((place for place, version in enumerate(before.chain)
                      if version.tags["parent"] != ends[place] or version.stands_on is not None),
                     first)
        places[first:] = [-1] * (len(places) - first)
    kept = max(places, default=-1) + 1  # a lineage id stands for all tasks up to its own
    left_out, renamed, again = [], {}, {}
    for number, version in enumerate(before.chain):
        if places[number] >= 0:
            continue
        now = before._now(version, experiences[kept:])
        if now is None:
            left_out.append(version.task)
        elif now.name != version.task:
            renamed[version.task] = now.name
        else:
            again[version.task] = _why(before, config, version, now, network,
                                       forgotten if number >= first else ())
    known = ({version.task for version in before.chain} | set(renamed.values())
             | {gone.task for gone in back_again})
    learned = {name for name, lineage_id in zip(names, ids, strict=bool(ids))
               if lineage_id in before.registered}
    back = [version.task for version in before.taken_back
            if version.task in names and len(learned) < len(names)]
    more = [name for name in names[kept:] if name not in known and name not in back]
    return Continuation(before, tuple(names[:kept]),
                        tuple(name for name in more if name not in learned),
                        tuple(name for name in more if name in learned),
                        tuple(left_out), renamed, again, tuple(back), back_again)


def _why(before: LearnedBefore, config: Config, version: Version, now: Experience,
         network: str | None, forgotten: Sequence[Forgotten]) -> str:
    """The reason for which a task is learned again. forgotten: tasks that its model forgot."""
    if before.same_images(version, now) is False:
        return "its images, or the parts into which they are split, are not the same"
    now_options, then_options = (_flat(each) for each in (_named(config), before.options))
    options = [f"{key} is {now_options.get(key, 'default')!r}, was "
               f"{then_options.get(key, 'default')!r}"
               for key in sorted({*now_options, *then_options})
               if then_options and now_options.get(key) != then_options.get(key)]
    if len(options) > MAX_OPTIONS:
        options[MAX_OPTIONS:] = [f"and {len(options) - MAX_OPTIONS} more"]
    if options:
        return "; ".join(options)
    if forgotten:
        names = ", ".join(repr(gone.task) for gone in forgotten)
        return (f"its model has forgotten {names}, and train does not go on from such a model; "
                "`partialhn retrain` does")
    if version is not before.chain[0]:
        return "a task before it is not the same"
    if before.lacks_versions:
        return ("versions that it was learned from were deleted in MLflow, and train finds the "
                "order of the tasks by their versions")
    return ("the trunk's weights are not the same" if network is not None or not then_options
            else "the trunk is not trained yet on the images that come first now")


def _fingerprints(experience: Experience) -> frozenset[str]:
    """The fingerprints of a task's images as `LearnedBefore.contents` has them."""
    return frozenset(f"{table.fingerprint()} {experience.transform}"
                     for table in (experience.train, experience.validation, experience.test))


def _named(config: Config) -> dict[str, dict[str, Any]]:
    """The options that determine a model: those of its lineage ids, and those of its trunk."""
    settings = lineage.settings_of(config)
    return settings | {"backbone": named_sections(config)["backbone"]}


def _options(storage: Storage, stream: str, champion: Version) -> Mapping[str, Any]:
    """The options of a learned model; empty if its folder is gone or from another release."""
    folder = storage.path("runs", stream, "learned", champion.tags["prefix"])
    fields = checkpoint.read_fields(storage.filesystem, folder)
    try:
        return _named(Config.from_dict(fields["config"])) if fields else {}
    except (InputError, KeyError, TypeError):
        return {}


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items()
            for key, value in values.items()}
