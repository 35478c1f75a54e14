"""`partialhn train`: learns a stream of tasks, registers its models, writes report and result.

    data -> trunk -> features -> experiences (`pipelines.execution.choose`) -> versions (MLflow)

Every phase finds the finished results of earlier runs. So the same command resumes where it
stopped, and when a directory of tasks has grown, only the new tasks are learned.
"""

import concurrent.futures
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from partialhn.checkpoints import checkpoint, shared
from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data.experience import Experience, all_not_used, leaks
from partialhn.errors import InputError
from partialhn.evaluation.answer_sample import write_sample
from partialhn.networks.backbone import Network
from partialhn.numbers import now
from partialhn.predict import Predictor
from partialhn.run import (
    TrunkAndHead,
    check,
    cut_network,
    with_depth_number,
    work_name,
)
from partialhn.training import lineage
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import load_network
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import (
    Clock,
    Outcome,
    model_sizes,
    peak_rss_bytes,
    result_fields,
    stream_metrics,
)
from partialhn.training.review import review
from partialhn.training.slots import Slot, featured_slots
from pipelines.execution.base import Execution, our_outcome
from pipelines.execution.choose import open_execution
from pipelines.execution.continuation import (
    Continuation,
    LearnedBefore,
    compare,
    learned_before,
)
from pipelines.execution.open_data import open_data
from pipelines.features.produce import open_store
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage, open_storage
from pipelines.registry.client import Placing, Registry, connect
from pipelines.registry.connection import exists
from pipelines.registry.package import Contents
from pipelines.registry.repair import repair
from pipelines.registry.versions import CHAMPION, FILES, Registration, Version
from pipelines.report.page import write_report
from pipelines.settings import OutputConfig, mask_password

Log = Callable[[str], None]


def train(config: Config, output: OutputConfig, log: Log = print) -> dict[str, Any]:
    """Learns a stream and registers a version for each task; returns the content of `result.json`.

    Writes `output.result`. Raises: InputError for any error that the user can correct.
    """
    config = with_depth_number(config)
    check(config)
    storage = open_storage(output.storage)
    storage.check()
    with storage.explained():
        return _train(config, output, storage, log)


def _train(config: Config, output: OutputConfig, storage: Storage, log: Log) -> dict[str, Any]:
    clock = Clock()
    check_result_path(output.result)
    config = _as_begun(config, storage, output.name, log)
    experiences = open_data(config.data, storage)
    log(f"{output.name}: {stream_counts(experiences)}")
    for note in all_not_used(experiences):
        for line in note.lines():
            log(line)
    clock.lap("data")
    progress = Progress(config, log)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(_connect, storage, output)
        before = LearnedBefore(output.name)
        if exists(storage, output.tracking_uri):  # a new database cannot know the stream
            before = connecting.result()[1]
        experiences = before.ordered(experiences)
        stored = load_network(config, experiences[0], storage.filesystem, storage.root)
        continuation = compare(before, config, experiences,
                               stored.fingerprint() if stored else None)
        for line in continuation.check(replace=output.replace):
            log(line)
        for name, count in leaks(experiences).items():
            log(f"task {name!r}: {count:,} test images are training images too (the same bytes), "
                "so its accuracy says too much")
        work = work_name(config, experiences)
        beginning = pool.submit(_begin, connecting, config, output, work)
        clock.lap("startup")
        try:
            with open_execution(config, storage, output.name, progress) as execution:
                clock.lap("startup")
                _check(beginning)
                network = execution.network(experiences[0], lambda _: _check(beginning))
                clock.lap("trunk")
                registry, parent = beginning.result()
                clock.lap("startup")
                result = Job(config, output, storage, registry, parent, experiences, work,
                              progress, clock, continuation).run(execution, network)
        except BaseException:
            if beginning.exception() is None:
                registry, parent = beginning.result()
                registry.end_run(parent, failed=True)
            raise
    Path(output.result).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def stream_counts(experiences: Sequence[Experience]) -> str:
    """What a stream has; a class of several tasks counts once."""
    classes = len({name for experience in experiences for name in experience.classes})
    images = sum(len(experience.train) for experience in experiences)
    held_out = sum(len(experience.validation) for experience in experiences)
    return (f"{len(experiences)} tasks, {classes} classes, {images} training images"
            + (f", {held_out} more held out (--validation)" if held_out else ""))


def _as_begun(given: Config, storage: Storage, stream: str, log: Log) -> Config:
    """`partialhn.training.lineage.as_begun` of a stream, with a line where it changes something."""
    config = lineage.as_begun(given, storage.filesystem, storage.path("runs", stream, "learned"))
    if config != given:
        log(f"{stream}: begun with the defaults of 0.1.0 (epochs {config.train.epochs}, "
            f"trunk_epochs {config.backbone.trunk_epochs}), which its new tasks keep; a stream of "
            "another --name chooses them for each task")
    return config


def check_result_path(path: str) -> None:
    """Makes the folder of a result file. Raises: InputError if the file cannot be written."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"result is {path!r}, whose folder cannot be made ({error.strerror}); "
                         "allowed: a file in a folder that you may write to") from error
    if target.is_dir() or not os.access(target if target.exists() else target.parent, os.W_OK):
        raise InputError(f"result is {path!r}, which cannot be written; allowed: a file in a "
                         "folder that you may write to")


def _connect(storage: Storage, output: OutputConfig) -> tuple[Registry, LearnedBefore]:
    """The registry and what it knows of the stream; changes nothing but a new database.

    MLflow takes seconds to import and to create its database, so a thread does this, while the
    trunk is trained if the database is new.
    """
    registry = connect(storage, output.tracking_uri)
    return registry, learned_before(registry, storage, output.name)


def _begin(connecting: "concurrent.futures.Future[tuple[Registry, LearnedBefore]]",
           config: Config, output: OutputConfig, work: str) -> tuple[Registry, str]:
    """The registry, and the ID of the stream's run in it."""
    registry, _ = connecting.result()
    return registry, registry.stream_run(output.name, work, config.to_dict())


def _check(beginning: "concurrent.futures.Future[tuple[Registry, str]]") -> None:
    """Raises the error of `_begin` as soon as there is one: nothing can be registered then."""
    if beginning.done():
        beginning.result()


@dataclasses.dataclass
class Job:
    """One run of `train`, phase by phase."""

    config: Config
    output: OutputConfig
    storage: Storage
    registry: Registry
    parent: str
    """ID of the stream's run in the registry."""
    experiences: list[Experience]
    work: str
    progress: Progress
    clock: Clock
    continuation: Continuation

    def run(self, execution: Execution, network: Network) -> dict[str, Any]:
        cut = cut_network(self.config, network)
        lineage_ids = lineage_ids_of(self.config, cut.network, self.experiences)
        known = execution.learned(lineage_ids)
        slots, decoded = self._features(execution, cut, len(known))
        self.clock.lap("features")
        registrar = Registrar(self, cut, execution.folder, slots, lineage_ids)
        for task in known:
            registrar.add(self.config.train.strategy, *task.epochs, task.record)
        returned = execution.learn(cut, slots, lineage_ids, registrar.add)
        outcome = our_outcome(returned, self.config)
        registrar.add(self.config.train.strategy, *outcome.epochs, *outcome.finished)
        self.clock.lap("train")
        fields = self.finish(registrar, cut, returned["outcomes"], decoded, returned["device"],
                             returned["peak_rss_bytes"], execution.notes)
        execution.forget_run(lineage_ids)
        return fields

    def finish(self, registrar: "Registrar", cut: TrunkAndHead, outcomes: Mapping[str, Outcome],
               decoded: int, device: str, peak_bytes: int = 0,
               notes: Sequence[str] = ()) -> dict[str, Any]:
        """Publishes result, matrix and report of what is registered; returns the result.

        decoded: images decoded for features in this run. device: what learned, in words.
        peak_bytes: memory of other processes that took part. notes: what the user should know about
        the run.
        """
        model = registrar.newest_model()
        fields = result_fields(self.config, registrar.slots, cut.macs, decoded, outcomes,
                               self.clock.laps, [*notes, *model.strategy.notes])
        fields |= model_sizes(model) | {
            "name": self.output.name, "work": self.work, "weights_hash": model.weights_hash(),
            "checkpoint_bytes": registrar.checkpoint_bytes, "device": device,
            "peak_rss_bytes": max(peak_bytes, peak_rss_bytes()),
            "storage": self.storage.uri,
            "tracking_uri": mask_password(self.registry.tracking_uri),
            "model_uri": f"models:/{self.output.name}@{CHAMPION}",
            "champion": registrar.champion(), "continues": self.continuation.fields(),
            "versions": registrar.version_fields(), "finished": now()}
        ours = outcomes[self.config.train.strategy]
        fields["review"] = review(model, registrar.slots, open_store(
            self.storage, self.config.compute), ours.finished[-1].accuracy_row, ours.epochs,
            {each.name: each.test for each in self.experiences})
        for row, seconds in zip(fields["seconds"]["per_task"], registrar.seconds, strict=True):
            row["register"] = round(seconds, 3)
        self._publish(fields)
        return fields

    def _features(self, execution: Execution, cut: TrunkAndHead,
                  known: int) -> tuple[list[Slot], int]:
        """The features that are needed, and those of learned tasks where they are still there."""
        return featured_slots(self.config, self.experiences, known, cut.trunk,
                              open_store(self.storage),
                              lambda jobs: execution.features(jobs, cut)[1])

    def _publish(self, fields: dict[str, Any]) -> None:
        """Logs matrix, result and report to the stream's run."""
        names = [task["name"] for task in fields["tasks"]]
        self.registry.log_matrix(self.parent, fields["accuracy_matrix"], names)
        self.clock.lap("register")
        phases = {key: round(value, 3) for key, value in self.clock.laps.items()}
        fields["not_used"] = [dataclasses.asdict(note)
                              for note in all_not_used(self.experiences)]
        fields["test_images_in_training"] = leaks(self.experiences)
        fields["seconds"] |= {"stages": phases, "total": round(sum(phases.values()), 3)}
        self.registry.log_result(self.parent, fields)
        with tempfile.TemporaryDirectory() as scratch:
            self.registry.log_file(self.parent, write_report(fields, Path(scratch) / "report.html"))
        self.registry.end_run(self.parent)


class Registrar:
    """Registers the model of each finished task, in order and only once."""

    def __init__(self, job: Job, cut: TrunkAndHead, folder: str, slots: Sequence[Slot],
                 lineage_ids: Sequence[str]) -> None:
        self.job, self.folder = job, folder
        self.seconds: list[float] = []
        self.checkpoint_bytes = 0
        self._epochs: dict[tuple[int, int], EpochRecord] = {}
        """By task and epoch, because a worker that was started again may send a record twice."""
        self._trunk = cut.trunk.fingerprint()
        self.slots, self._lineage_ids = slots, lineage_ids
        self._records: list[TaskRecord] = []
        self._scratch = tempfile.TemporaryDirectory()

    def add(self, strategy: str, *records: EpochRecord | TaskRecord) -> None:
        """Adds records in their order; registers a task when its record comes."""
        for record in records:
            if strategy != self.job.config.train.strategy:
                continue
            if isinstance(record, EpochRecord):
                self._epochs[record.task_index, record.epoch] = record
            elif record.task_index == len(self._records):
                self._register(record)

    def _register(self, record: TaskRecord) -> None:
        clock = Clock()
        job = self.job
        self._records.append(record)
        summary, metrics = stream_metrics(self._records)
        total = len(self._records)
        job.registry.log_metrics(job.parent, metrics, step=record.task_index)
        version = job.registry.version_of(job.output.name, self._lineage_ids[record.task_index])
        new, last = version is None, total == len(self._lineage_ids)
        # while a run learns the champion's tasks again, the champion stays the one that has them
        placing = Placing(champion=last or not job.continuation.changes)
        if placing.champion:
            self._check_champion()
        if version is not None and last and FILES in version.tags:
            for line in repair(job.registry, job.storage, version):
                job.progress.line(f"  repaired {line}")
        if version is None or version.tags["work"] == job.work:
            version = self._version(record, metrics, placing)
        elif last:
            job.registry.place(version, placing)
        clock.lap("register")
        self.seconds.append(clock.laps["register"])
        job.progress.registered(version.uri, record, summary, new=new)

    def _check_champion(self) -> None:
        """Raises InputError if another command has given the stream a champion meanwhile that this
        run does not continue.
        """
        registry, stream = self.job.registry, self.job.output.name
        now = registry.holder(stream, CHAMPION) if registry.knows(stream) else None
        before = self.job.continuation.before.champion
        if (now is None or now.tags["prefix"] in self._lineage_ids
                or (before is not None and now.version == before.version)):
            return
        raise InputError(f"models:/{stream}@{CHAMPION} has become version {now.version} (task "
                         f"{now.task!r}) while this run learned, and this run does not continue "
                         "it; allowed: another --name, for a stream of its own, or the same "
                         "command again when the other run has ended")

    def _version(self, record: TaskRecord, metrics: Mapping[str, float],
                 placing: Placing) -> Version:
        """Registers a task's model, with a child run of its own under the stream's run."""
        job, index = self.job, record.task_index
        slot, experience = self.slots[index], job.experiences[index]
        folder = self._fetch(index)
        run = job.registry.task_run(job.parent, record.task, index, self._lineage_ids[index])
        job.registry.log_task(run, [dataclasses.asdict(epoch) for epoch in self._epochs.values()
                                    if epoch.task_index == index], metrics)
        version = job.registry.register_task(run, Registration(
            stream=job.output.name, work=job.work, task=record.task, task_index=index,
            classes=slot.classes, trunk_fingerprint=self._trunk,
            feature_keys=tuple(manifest.key for manifest in slot.manifests.values()),
            weights_hash=checkpoint.load(folder, "model")[1]["weights_hash"],
            acc=metrics["acc"], learning_accuracy=metrics["learning_accuracy"],
            forgetting=metrics["forgetting"], storage=job.storage.uri,
            prefix=self._lineage_ids[index], parent=self._lineage_ids[index - 1] if index else "",
            without_task_id=record.without_id),
            Contents(folder, record.task, experience.test.take([0]).read()[0],
                     self._sample(index),
                     shared.reader(job.storage.filesystem, self.folder)), placing)
        job.registry.end_run(run)
        return version

    def _sample(self, index: int) -> Path:
        """Writes test images of the tasks so far with predictions, for `models verify`."""
        path = Path(self._scratch.name) / "sample.parquet"
        predictor = Predictor.load(self._fetch(index))
        write_sample(path, predictor, self.job.experiences[:index + 1])
        return path

    def newest_model(self) -> Model:
        """The model after the last task."""
        return Model.load(self._fetch(len(self._records) - 1))

    def version_fields(self) -> list[dict[str, Any]]:
        """The versions of the stream's models, for `result.json`."""
        versions = self.job.registry.versions(self.job.output.name)
        return [version.fields() for version in versions
                if version.tags.get("prefix") in self._lineage_ids]

    def champion(self) -> int:
        """The champion's version; a line says so where it is not the last task's version.

        Starting a run again does not undo a rollback.
        """
        registry, stream = self.job.registry, self.job.output.name
        champion = registry.resolve(f"models:/{stream}@{CHAMPION}")
        newest = registry.version_of(stream, self._lineage_ids[len(self._records) - 1])
        assert newest is not None, "every task has just been registered"
        if champion.version != newest.version:
            move = registry.aliases.last_move(stream, CHAMPION)
            self.job.progress.line(
                f"champion stays version {champion.version} (task {champion.task!r}): "
                f"{move.kind} by {move.who}, {move.why!r}; to go forward: partialhn models promote "
                f"--name {stream} --version {newest.version}")
        return champion.version

    def _fetch(self, task_index: int) -> Path:
        folder = Path(self._scratch.name) / f"{task_index:04d}"
        if not folder.exists():
            lineage.fetch_model(self.job.storage.filesystem, self.folder,
                              self._lineage_ids[task_index], folder)
        self.checkpoint_bytes = sum(file.stat().st_size for file in folder.iterdir())
        return folder
