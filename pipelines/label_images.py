"""`partialhn predict`: labels images with a registered version and writes a Parquet file.

`partialhn.data.layout.list_images` lists the images, `Registry.load_predictor` downloads the model,
and `partialhn.predict.Predictor` predicts; the file gets one row for each image.
"""

import dataclasses
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from partialhn.config import DeviceName
from partialhn.data.decode import BadImage
from partialhn.data.experience import task_of
from partialhn.data.image_table import ImageTable
from partialhn.data.layout import list_images
from partialhn.errors import InputError
from partialhn.networks.precision import choose_device, configure_torch
from partialhn.predict import Predictor
from partialhn.task_inference import AUTO, NONE
from pipelines.platform.storage import Storage, open_storage
from pipelines.platform.text import auto_line
from pipelines.registry.client import connect
from pipelines.registry.versions import Version
from pipelines.serving.live import EXAMPLES, FeatureRecorder, seems_new

BATCH = 256
"""Number of images labelled at a time."""
OTHER_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx")
"""Ends of names that promise another form than Parquet."""
SCHEMA = pa.schema([
    ("id", pa.string()), ("task", pa.string()), ("label", pa.string()),
    ("probability", pa.float64()), ("classes", pa.list_(pa.string())),
    ("probabilities", pa.list_(pa.float64())), ("task_probability", pa.float64())])


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The summary of a prediction, for the user."""

    images: int
    """Number of rows written."""
    bad: tuple[BadImage, ...]
    """Images left out (on_bad_image skip)."""
    task: str
    """The task's name, even if its index was given; or auto."""
    labels: dict[str, int]
    """How often each label was predicted, most frequent first; `none` counts images of no known
    task."""
    model_uri: str
    """The version behind the alias: models:/name/version."""
    output: str
    unknown: tuple[str, ...] = ()
    """Ids of the first images that seem to belong to no known task, at most EXAMPLES."""
    not_used: tuple[str, ...] = ()
    """Files of the input that are no images, a line of text for each kind of thing."""

    @property
    def new_task(self) -> bool:
        """Whether so many images are strange that a new task seems to be here."""
        strange = self.labels.get(NONE, 0)
        return seems_new(strange, strange / max(1, self.images))


def predict_to_parquet(model: str, task: str, images: str, output: str,
                       storage: str = "partialhn-store", tracking_uri: str | None = None,
                       on_bad_image: Literal["error", "skip"] = "error", record: bool = False,
                       progress: Callable[[int, int], None] | None = None,
                       image_column: str | None = None,
                       log: Callable[[str], None] | None = None,
                       device: DeviceName = "cpu") -> Predicted:
    """Labels all images of a folder, a file or a Parquet file with the classes of one task.

    Args:
        model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION.
        task: a task's name, its index from 0, or auto to have each image's task inferred.
        images: image folder (with sub-folders), image file, or Parquet with an image column; a
            local path or s3://.
        output: Parquet file to write, local or s3://; it appears only when complete. Columns:
            id (the image's path below `images`, with #row for Parquet), task, label,
            probability, and classes and probabilities (lists in the same order). With task
            auto, task is each image's likeliest, task_probability its probability among all
            tasks, and label is null for an image of no known task.
        storage: the storage that `partialhn train` was given, with the default registry.
        tracking_uri: MLflow server or database, as for `partialhn train`.
        on_bad_image: an unreadable image is an error, or is skipped and listed.
        record: keep a bounded sample of trunk features (no images) in the storage, for drift.
        progress: called with the number of images done and of all images.
        image_column: the column of images in Parquet files; default: image or img.
        log: called with lines before the first image: where task is auto, and where the alias
            points elsewhere than its history says.
        device: where the model predicts.

    Raises: InputError for an unknown model, task or path, an output named as another form, a GPU
        that is not there, or naming an unreadable image.
    """
    if (ending := Path(output).suffix.lower()) in OTHER_ENDINGS:
        raise InputError(f"output is {output!r}, but predictions are a Parquet file; allowed: a "
                         f"name that does not end in {ending}, such as predictions.parquet")
    chosen = choose_device(device)
    if chosen.type == "cuda":
        configure_torch()
    source = open_storage(images)
    if not source.is_local:
        source.check(write=False)  # Arrow finds nothing, and no error, in a bucket that is missing
    table, not_used = list_images(source.uri, source.filesystem, image_column)
    store = open_storage(storage)
    registry = connect(store, tracking_uri, create=False)
    predictor, version = registry.load_predictor(model, chosen)
    if log:
        for line in registry.warnings(model):
            log(line)
    target = open_storage(output)
    if target.is_local and Path(target.root).is_dir():
        raise InputError(f"output {output!r} is a folder; allowed: a file to write, for example "
                         f"{output.rstrip('/')}/predictions.parquet")
    predictor.check_task(task)
    name = AUTO if task == AUTO else task_of(
        predictor.model.tasks[predictor.task_index(task)].name)
    if log and task == AUTO:
        log(auto_line(predictor.auto_accuracy))
    recorder = FeatureRecorder(store, version.stream) if record else None
    label = _Labeller(predictor, name, on_bad_image, recorder)
    counts, bad, unknown, done = Counter[str](), list[BadImage](), list[str](), 0
    with tempfile.TemporaryDirectory(prefix=".partialhn-", dir=_folder_of(target)) as folder:
        draft = Path(folder) / "predictions.parquet"
        with pq.ParquetWriter(draft, SCHEMA.with_metadata(_origin(version))) as writer:
            base = _base(table, source.root)
            ids = [name.removeprefix(base) for name in table.ids()]
            for rows, images_B in table.batches(BATCH):
                answers, skipped = label(images_B, ids[rows.start:rows.stop])
                writer.write_table(answers)
                counts.update(label or NONE for label in answers.column("label").to_pylist())
                unknown += answers.filter(pc.is_null(answers["label"]))["id"].to_pylist()
                bad += skipped
                done += len(images_B)
                if progress:
                    progress(done, len(table))
        _publish(draft, target)
    if recorder:
        recorder.flush()
    return Predicted(len(table) - len(bad), tuple(bad), name, dict(counts.most_common()),
                     version.uri, target.uri, tuple(unknown[:EXAMPLES]), tuple(not_used.lines()))


def _origin(version: Version) -> dict[str, str]:
    """The origin of the predictions, for the metadata of the file's schema."""
    return {"model_uri": version.uri, "run_id": version.run_id,
            "weights_hash": version.tags["weights_hash"]}


@dataclasses.dataclass(frozen=True)
class _Labeller:
    """Predicts batches of images with one task or `auto`."""

    predictor: Predictor
    task: str
    on_bad: Literal["error", "skip"]
    recorder: FeatureRecorder | None = None

    def __call__(self, images: list[bytes], ids: list[str]) -> tuple[pa.Table, list[BadImage]]:
        """A table with SCHEMA, and the unreadable images, which have no row in it."""
        decoded = self.predictor.decode(images, ids, self.on_bad)
        z_BCHW = self.predictor.features(decoded.images_BCHW)
        answers = self.predictor.answers(z_BCHW, [self.task] * len(z_BCHW))
        if self.recorder and answers:
            self.recorder.add(self.predictor.model.trunk.fingerprint(), z_BCHW, answers,
                              lambda row: ids[decoded.index_B[row]])
        columns = zip(*((a.task, a.label, a.probability, a.classes, a.probabilities,
                         a.task_probability) for a in answers), strict=True
                      ) if answers else [[]] * 6
        return pa.table([[ids[i] for i in decoded.index_B], *map(list, columns)],
                        schema=SCHEMA), decoded.bad


def _base(table: ImageTable, root: str) -> str:
    """The common start of all ids, which is left out of the output: the given folder."""
    return (root.rpartition("/")[0] if root in table.files else root) + "/"


def _folder_of(target: Storage) -> str | None:
    """A folder for the draft from which it can be moved atomically; None if any folder will do."""
    if not target.is_local:
        return None
    folder = Path(target.root).parent
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _publish(draft: Path, target: Storage) -> None:
    if target.is_local:
        draft.replace(target.root)
    else:
        with draft.open("rb") as file, target.filesystem.open_output_stream(target.root) as sink:
            shutil.copyfileobj(file, sink)
