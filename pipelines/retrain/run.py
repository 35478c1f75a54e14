"""`partialhn retrain`: one pass over a stream's inbox; it may be started again at any time.

    lease -> repair an interrupted pass -> check arrivals -> features -> learn
    -> for each task in order: gate, log, version, aliases -> report

The log is written before the registry, and finished results are found again by their names, so the
next pass completes one that was killed at any point. Several waiting tasks are learned in one run
of Ray Train. If the gate stops one of them, or its training diverges, those after it are learned
again without it.
"""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from partialhn.config import LEFT_OPEN, Config, Sections, build, load_sections
from partialhn.data.experience import arrival_of, task_of
from partialhn.errors import DivergedError, InputError
from partialhn.naming import digest_text
from partialhn.presets import preset_sections
from partialhn.run import check, with_depth_number
from partialhn.training.lineage import settings_of
from partialhn.training.result import Clock
from pipelines.gate import Policy, read_policy
from pipelines.platform.importing import seldom_collected
from pipelines.platform.lease import Lease, LeaseLostError
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage, open_storage
from pipelines.registry.client import Registry, connect
from pipelines.registry.connection import exists
from pipelines.registry.history import History
from pipelines.registry.versions import CHAMPION, Version, chain_of
from pipelines.retrain.adopt import Adoption, adoption
from pipelines.retrain.candidate import register
from pipelines.retrain.chapters import Chapters
from pipelines.retrain.context import PassContext, cut_of
from pipelines.retrain.inbox import Arrival, Inbox, Problem
from pipelines.retrain.journal import Decided, Journal, chain_to, forgotten_by
from pipelines.retrain.learning import Learning
from pipelines.retrain.outcome import PassOutcome
from pipelines.retrain.publish import publish, published
from pipelines.retrain.seen import Seen, hashes_of
from pipelines.retrain.validate import ArrivalPolicy, CheckedArrival, HashArray, check_arrival
from pipelines.settings import RetrainConfig

Log = Callable[[str], None]


def retrain(settings: RetrainConfig, log: Log = print,
            outcome: PassOutcome | None = None) -> PassOutcome:
    """Runs one pass. outcome: as `with_pass` takes it.

    Raises: InputError for any error that the user can correct.
    """
    return with_pass(settings, Pass.run, log, outcome)


def with_pass(settings: RetrainConfig, work: Callable[["Pass"], None], log: Log = print,
              outcome: PassOutcome | None = None) -> PassOutcome:
    """Opens a stream, does some work on it, and returns its outcome.

    outcome: an empty one, for a caller who wants what was done before an error, too.

    Raises: InputError for any error that the user can correct.
    """
    storage = open_storage(settings.storage)
    storage.check()
    values = dict(read_policy(settings.policy)) if settings.policy else {}
    arrivals = build(ArrivalPolicy, values.pop("inbox", None) or {}, "policy.inbox.")
    policy = build(Policy, values, "policy.")
    journal = Journal(storage, settings.name)
    clock = Clock()
    outcome = outcome or PassOutcome(settings.name, settings.dry_run)
    with seldom_collected(), storage.explained():
        registry = _registry(settings, storage, journal)
        found = _adoption(registry, storage, settings.name, journal)
        config = _config(settings, journal.config() or (found.config.to_dict() if found else None))
        check(config)
        if settings.re_evaluate:
            config = dataclasses.replace(config, compute=dataclasses.replace(
                config.compute, re_evaluate=True))
        try:
            work(Pass(settings, storage, config, policy, arrivals, journal, registry, outcome,
                      Progress(config, log), clock))
        except LeaseLostError as error:
            outcome.held_by = f"another process ({error})"
        finally:
            outcome.seconds = {key: round(value, 3) for key, value in clock.laps.items()}
    return outcome


def _registry(settings: RetrainConfig, storage: Storage, journal: Journal) -> Registry | None:
    """The registry, when it is certain that it is the stream's; None if a dry run has none yet.

    Raises: InputError if the stream's history belongs to another registry, or its log to a
    registered model that is not there: its tasks would be registered once more.
    """
    known = bool(journal.events() or History(storage, settings.name).entries())
    if settings.dry_run and not known and not exists(storage, settings.tracking_uri):
        return None
    registry = connect(storage, settings.tracking_uri, create=not known and not settings.dry_run)
    registry.aliases.check(settings.name)
    return registry


def _champion(registry: Registry | None, stream: str) -> Version | None:
    """The champion; None before the first pass."""
    if registry is None or not registry.knows(stream):
        return None
    return registry.holder(stream, CHAMPION)


def _adoption(registry: Registry | None, storage: Storage, stream: str,
              journal: Journal) -> Adoption | None:
    """What the log lacks of the champion's tasks; only then are versions asked for."""
    champion, logged = _champion(registry, stream), journal.decided()
    if registry is None or champion is None or (
            champion.tags["prefix"] in {task.prefix for task in logged}):
        return None
    return adoption(storage, stream, chain_of(registry.versions(stream), champion), logged)


def _config(settings: RetrainConfig, founded: Mapping[str, Any] | None) -> Config:
    """The stream's configuration: the one it was started with, or a given one that fits it.

    Raises: InputError for a given value that would change the stream.
    """
    first = Config.from_dict(founded) if founded is not None else None
    sections = (load_sections(settings.config) if settings.config
                else preset_sections(settings.preset) if settings.preset else None)
    if sections and first:
        sections = _as_begun(sections, first)
    given = with_depth_number(Config.of(sections)) if sections else None
    if given is not None and given.train.compare:
        given = dataclasses.replace(given, train=given.train.alone())
    if first is None:
        return given or with_depth_number(Config())
    if given is None:
        return first
    fixed = [("data", "input_size"), ("data", "stream_seed"), ("train", "strategy"),
             ("train", "seed")]
    fixed += [(section, field.name) for section in ("backbone", "features", "hypernet")
              for field in dataclasses.fields(getattr(first, section))]
    for section, key in fixed:
        was, now = (getattr(getattr(config, section), key) for config in (first, given))
        if was != now:
            raise InputError(f"{section}.{key} is {now!r}, but stream {settings.name!r} was "
                             f"started with {was!r}; allowed: the same, or another --name")
    return given


def _as_begun(sections: Sections, first: Config) -> Sections:
    """Sections in which what is left open is as it was decided when the stream began."""
    for section, key, still_open, _ in LEFT_OPEN:
        options = getattr(sections, section)
        if getattr(options, key) == still_open:
            begun = {key: getattr(getattr(first, section), key)}
            sections = dataclasses.replace(
                sections, **{section: dataclasses.replace(options, **begun)})
    return sections


@dataclasses.dataclass
class Pass:
    """A stream that is open, and the steps of one pass over its inbox."""

    settings: RetrainConfig
    storage: Storage
    config: Config
    policy: Policy
    arrival_policy: ArrivalPolicy
    journal: Journal
    registry: Registry | None
    done: PassOutcome
    progress: Progress
    clock: Clock

    def __post_init__(self) -> None:
        self.inbox, self.seen = Inbox(self.storage), Seen()
        both = [dataclasses.asdict(self.policy), dataclasses.asdict(self.arrival_policy)]
        self.policy_id = digest_text(json.dumps(both), 12)
        self.training_id = digest_text(json.dumps(settings_of(self.config)), 12)

    def run(self) -> None:
        """Learns what has arrived; a dry run says what it would do."""
        self.hold(self._look, self._work)

    def hold(self, look: Callable[[], None], work: Callable[[PassContext], None]) -> None:
        """Works under the stream's lease; `look` takes its place in a dry run."""
        lease = Lease(self.storage, self.settings.name)
        holder = lease.holder() if self.settings.dry_run else lease.acquire()
        if holder is not None:
            self.done.held_by = str(holder)
        elif self.settings.dry_run:
            look()
        else:
            assert self.registry is not None, "only a dry run does without a registry"
            with lease:
                work(PassContext(self.storage, self.settings.name, self.config, self.registry,
                                 self.journal, lease, self.progress, self.clock, self.seen))

    def _look(self) -> None:
        """A dry run: says what a pass would do, after the checks that the pass makes."""
        base = self.look_at_base()
        waiting = self._arrivals(base)
        if waiting and base:
            cut_of(self.storage, self.settings.name, self.config, base, self.seen)
        self.done.would += [f"learn {checked.arrival.slot} ({len(checked.experience.train)} "
                            "training images)" for checked in waiting if checked.experience]

    def look_at_base(self) -> list[Decided]:
        """The tasks of the champion, for a dry run."""
        found = self._adoption()
        tasks = found.tasks if found else ()
        self.done.would += [f"take {task.slot} over, which `partialhn train` learned"
                            for task in tasks]
        return self._base([*self.journal.decided(), *tasks])

    def take_base(self, context: PassContext) -> list[Decided]:
        """The tasks of the champion, after what `train` has learned and what an interrupted pass
        has left is in order.
        """
        if (found := self._adoption()) is not None:
            context.cut(self._base([*self.journal.decided(), *found.tasks]))
            found.write(self.journal, context.lease)
            self.done.adopted += [task.slot for task in found.tasks]
        base = self._repair(context)
        self.clock.lap("startup")
        return base

    def _work(self, context: PassContext) -> None:
        """The steps that need the lease."""
        base = self.take_base(context)
        waiting = self._arrivals(base)
        self.clock.lap("look")
        if waiting:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                opening = pool.submit(context.registry.open)  # takes seconds; features meanwhile
                base = Learning(context, base, self.policy, self.policy_id, self.training_id,
                                self.done, self._reject_diverged, opening.result).run(waiting)
        self.conclude(context, base)

    def conclude(self, context: PassContext, base: Sequence[Decided]) -> None:
        """Publishes the report of the champion's tasks, unless it is published already."""
        if base and published(self.journal) != base[-1].prefix:
            publish(context, base, self.done.notes, self.done.images_decoded)
            context.lease.check()
            context.chapters.write(base, self.seen)
            self.clock.lap("report")
        champion = _champion(self.registry, self.settings.name)
        self.done.champion = champion.version if champion else None

    def _adoption(self) -> Adoption | None:
        return _adoption(self.registry, self.storage, self.settings.name, self.journal)

    def _base(self, decided: Sequence[Decided]) -> list[Decided]:
        """The tasks of the champion, on top of which new tasks are learned."""
        champion = _champion(self.registry, self.settings.name)
        return chain_to(decided, champion.tags["prefix"]) if champion else []

    def _repair(self, context: PassContext) -> list[Decided]:
        """Completes an interrupted pass: sets aliases, registers versions that only the log has."""
        name, aliases = self.settings.name, context.registry.aliases
        self.done.repaired += [str(repair) for repair in aliases.reconcile(name)]
        decided = self.journal.decided()
        promoted: set[int | None] = set()
        if decided and aliases.keeps_history(name):
            promoted = {entry.move.to for entry in aliases.history(name).entries()
                        if entry.move.alias == CHAMPION}
        noted = self.journal.versions()
        doubtful = [task for task in decided if not (task.adopted or task.stands_for)
                    and task.prefix not in noted]
        registered = (context.registry.versions(name)
                      if doubtful and context.registry.knows(name) else [])
        versions = {version.tags.get("prefix", ""): version for version in registered}
        for task in doubtful:
            version = versions.get(task.prefix)
            if version is None or (task.passed and version.version not in promoted):
                context.lease.check()
                version = register(context, decided, task)
                versions[task.prefix] = version
                self.done.repaired.append(f"{task.slot} was learned, now {version.uri}")
        self.journal.note_versions(context.lease, [versions[task.prefix] for task in doubtful])
        return self._base(decided)

    def _arrivals(self, base: Sequence[Decided]) -> list[CheckedArrival]:
        """The arrivals to learn, in order: ready, not decided before, and without problems.

        Raises: InputError for a task to learn again that is not forgotten and not known.
        """
        classes = {task_of(task.slot): task.classes for task in base}
        gone, decided = forgotten_by(base), self.journal.decided()
        self._check_learn_again(classes, gone, decided)
        found = self.inbox.scan({arrival_of(task.slot): task.signature for task in base},
                                self.settings.quiet_minutes)
        self.done.waiting, self.done.not_used = found.waiting, found.not_used
        self.done.waiting += [f"{task}: is to be learned again, but there is no folder inbox/{task}"
                              for task in self.settings.learn_again if task not in classes
                              and not self.storage.exists(f"{self.inbox.folder}/{task}")]
        hashes: dict[str, HashArray] = {}
        ready: list[CheckedArrival] = []
        for arrival in found.arrivals:
            if arrival.task in gone and arrival.task not in self.settings.learn_again:
                self.done.forgotten.append(f"{arrival.slot}: {gone[arrival.task]}; to learn it "
                                           f"again: --learn-again {arrival.task}")
                continue
            if reason := self._decided_before(arrival, decided, base):
                self.done.skipped.append(f"{arrival.slot} ({reason})")
                continue
            if self.inbox.rejected(arrival, self.policy_id, self.training_id):
                self.done.skipped.append(f"{arrival.slot} (rejected)")
                continue
            if arrival.part and arrival.task not in classes:
                self.done.waiting.append(f"{arrival.slot}: its task is not learned yet")
                continue
            if not hashes:
                Chapters(self.storage, self.settings.name).recall(base, self.seen)
                hashes = hashes_of(self.storage, self.settings.name, base, self.seen)
            problems: Sequence[Problem] = self.inbox.name_problems(arrival, list(classes))
            if not problems:
                checked = check_arrival(self.storage, arrival, self.config.data,
                                        self.arrival_policy, hashes,
                                        classes[arrival.task] if arrival.part else None)
                problems = checked.problems
            if problems:
                self._reject(arrival, problems)
                continue
            assert checked.experience is not None
            if checked.experience.not_used:
                self.done.not_used += [line.removeprefix("not used in ") for line in
                                       checked.experience.not_used.lines()]
            ready.append(checked)
            hashes[arrival.slot] = checked.hashes
            classes[arrival.task] = checked.experience.classes
        return ready

    def _reject(self, arrival: Arrival, problems: Sequence[Problem],
                training: str | None = None) -> None:
        """Rejects an arrival. training: as `Inbox.reject` takes it."""
        self.done.rejected.append({"task": arrival.slot,
                                   "reasons": [problem.text for problem in problems],
                                   "codes": [problem.code for problem in problems]})
        if not self.settings.dry_run:
            self.inbox.reject(arrival, self.policy_id, problems, training)

    def _reject_diverged(self, arrival: Arrival, error: DivergedError) -> None:
        self._reject(arrival, [Problem("diverged", str(error))], self.training_id)

    def _check_learn_again(self, known: Collection[str], gone: Collection[str],
                           decided: Sequence[Decided]) -> None:
        """Raises InputError for a name that was neither forgotten nor rolled back.

        A task that the champion knows is no error: a pass that is repeated with the same options
        has learned it again.
        """
        passed = [task_of(task.slot) for task in decided if task.passed]
        lacking = [task for task in dict.fromkeys([*gone, *passed]) if task not in known]
        allowed = ", ".join(lacking) or "no name, because the champion lacks no task"
        for task in self.settings.learn_again:
            if task not in known and task not in lacking:
                raise InputError(f"--learn-again names {task!r}, which was neither forgotten nor "
                                 f"rolled back; allowed: {allowed}")

    def _decided_before(self, arrival: Arrival, decided: Sequence[Decided],
                        base: Sequence[Decided]) -> str:
        """Why an arrival that was decided on is not learned; empty if it is to be learned.

        One that passed and is not among the champion's tasks was rolled back. Learning it again on
        the model that it was learned on would give the same version, so that is promoted instead.
        """
        same = [task for task in decided if arrival_of(task.slot) == arrival.slot
                and task.signature == arrival.signature]
        passed = [task for task in same if task.passed]
        if any(not task.passed and task.policy == self.policy_id
               and task.training in ("", self.training_id)
               for task in (same[-1:] if passed else same)):
            return ("stopped; learned again when a file, the policy or the options of training "
                    "change")
        if not passed:
            return ""
        newest, name = passed[-1], self.settings.name
        ends_there = bool(base) and newest.parent == base[-1].prefix
        if arrival.task in self.settings.learn_again and not ends_there:
            return ""
        number, _ = self.journal.versions().get(newest.stands_for or newest.prefix, ("N", ""))
        return (f"decided; version {number} has it and the champion does not: `partialhn models "
                f"promote --name {name} --version {number}` makes that version champion" + (
                    "" if ends_there else f", and --learn-again {arrival.task} learns it on top of "
                    "the champion"))
