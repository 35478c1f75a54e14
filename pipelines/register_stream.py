"""Registers what was learned without a registry: the models of a notebook's `Stream`.

The walk: the stream's features and models are copied to the storage, a version is registered for
each learned task as `pipelines.train` does, and the report is written. `Stream.register` finds
`register` by the entry point `partialhn.registries`.
"""

from collections.abc import Sequence
from pathlib import Path

from partialhn.checkpoints import checkpoint, shared
from partialhn.run import StreamRun, work_name
from partialhn.training.lineage import Learned
from partialhn.training.pretrain import network_key
from partialhn.training.slots import Slot
from pipelines.execution.continuation import compare, learned_before
from pipelines.features.in_use import InUse
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage, open_storage
from pipelines.registry.client import connect
from pipelines.settings import OutputConfig
from pipelines.train import Job, Registrar

MANIFEST = "manifest.json"
"""The file of a feature set that is written last: without it the features do not exist."""


def register(run: StreamRun, name: str, storage: str, tracking_uri: str | None,
             replace: bool = False) -> str:
    """Registers a version for each learned task of a run; returns the URI of the newest.

    Versions that are registered already stay as they are. Raises: InputError for a name, storage
    or server that cannot be used, and where the champion's tasks are not all among those of the
    run, unless `replace`.
    """
    output = OutputConfig(name=name, storage=storage, tracking_uri=tracking_uri, replace=replace)
    place = open_storage(output.storage)
    place.check()
    with place.explained():
        return _register(run, output, place)


def _register(run: StreamRun, output: OutputConfig, storage: Storage) -> str:
    count, strategy = len(run.known), run.config.train.strategy
    slots = run.slots()[:count]
    folder = storage.path("runs", output.name, "learned")
    registry = connect(storage, output.tracking_uri)
    first = run.experiences[:count]
    continuation = compare(learned_before(registry, storage, output.name), run.config, first,
                           run.cut.network)
    continuation.check(replace=output.replace)
    with InUse(storage, f"stream {output.name}") as in_use:
        in_use.add(manifest.key for slot in slots for manifest in slot.manifests.values())
        _copy_network(run, storage)
        _copy_features(run.root, slots, storage)
        _copy_models(run.folder, run.known, storage, folder)
        work = work_name(run.config, run.experiences)
        parent = registry.stream_run(output.name, work, run.config.to_dict())
        job = Job(run.config, output, storage, registry, parent, run.experiences, work,
                  Progress(run.config, _say_nothing), run.clock, continuation)
        registrar = Registrar(job, run.cut, folder, slots, run.lineage_ids[:count])
        for learned in run.known:
            registrar.add(strategy, *learned.epochs, learned.record)
        job.finish(registrar, run.cut, run.outcomes(), run.decoded, str(run.device),
                   notes=run.said)
        newest = registry.version_of(output.name, run.known[-1].prefix)
    assert newest is not None, "the registrar has just registered it"
    return newest.uri


def _say_nothing(line: str) -> None:
    """A notebook shows the URI that `register` returns, and no line for each version."""
    del line


def _copy_network(run: StreamRun, storage: Storage) -> None:
    """Copies the trained network, so that `train` and `retrain` find it."""
    if run.config.backbone.trains_trunk:
        key = network_key(run.config, run.experiences[0])
        target = storage.path("trunks", key)
        if checkpoint.read_fields(storage.filesystem, target) is None:
            checkpoint.upload(run.root / "trunks" / key, storage.filesystem, target)


def _copy_features(root: Path, slots: Sequence[Slot], storage: Storage) -> None:
    """Copies every feature set that the storage lacks, each with its manifest last."""
    for manifest in (found for slot in slots for found in slot.manifests.values()):
        if storage.exists(storage.path("features", manifest.key, MANIFEST)):
            continue
        files = sorted((root / "features" / manifest.key).iterdir(),
                       key=lambda file: (file.name == MANIFEST, file.name))
        for file in files:
            storage.put_if_absent(storage.path("features", manifest.key, file.name),
                                  file.read_bytes())


def _copy_models(source: str, known: Sequence[Learned], storage: Storage, folder: str) -> None:
    """Copies the model after each task that the storage lacks."""
    for learned in known:
        target = f"{folder}/{learned.prefix}"
        if checkpoint.read_fields(storage.filesystem, target) is None:
            shared.copy_model(Path(source), learned.prefix, storage.filesystem, folder)
