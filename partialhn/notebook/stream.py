"""A stream of tasks for a script or a notebook: open data, learn, look, predict, keep.

It goes the way of `partialhn.run.StreamRun`, as `run_stream` does, so both learn the same weights.
Whatever is learned is in the stream's folder, and the same folder goes on where it stopped.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from partialhn.checkpoints import FIELDS
from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.evaluation.metrics import StreamMetrics
from partialhn.networks.precision import choose_device
from partialhn.notebook import display
from partialhn.notebook.folder import check_config, claim, stored_fields
from partialhn.notebook.labels import label
from partialhn.notebook.options import absolute, base_config, configure, differences
from partialhn.notebook.progress import Bars, open_bars
from partialhn.notebook.registries import installed_registry
from partialhn.predict import Predictor
from partialhn.run import StreamRun, with_depth_number
from partialhn.task_inference import AUTO
from partialhn.training import lineage
from partialhn.training.records import TaskRecord

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from partialhn.notebook.images import Images


class Stream:
    """A stream of tasks that is learned here, one task at a time or all that are left.

    Example: `Stream("digits", tasks=5, input_size=16, folder="my-stream").learn_next()`.
    """

    def __init__(self, data: str | Path | None = None, *, config: Config | str | Path | None = None,
                 preset: str | None = None, folder: str | Path = "partialhn-stream",
                 progress: bool = True, **options: object) -> None:
        """Opens the data and finds what was learned in the folder before; learns nothing.

        Args:
            data: path or name of the images, in any form that `partialhn train --data` takes;
                default: those of the configuration, or of the folder.
            config: a configuration, or the path of a YAML file; default: that of the folder where
                only the folder is given, or else every default.
            preset: a known configuration by name, in place of `config`.
            folder: where everything that is computed and learned is kept. The same folder goes on
                where an earlier session stopped.
            progress: show progress bars (standard error, or the notebook's cell).
            options: configuration keys without their section, for example `epochs=4`.

        Raises: InputError for an unknown option or a value that is not allowed, for data that
        cannot be used, and for a folder that holds another stream.
        """
        self.folder, self.progress = Path(folder), progress
        if data is not None:
            options = {"data": data} | options
        self.config = self._configured(config, preset, options)
        self._open()

    def _configured(self, config: Config | str | Path | None, preset: str | None,
                    options: dict[str, object]) -> Config:
        """The configuration as given; that of the folder where nothing is."""
        self._stored = stored_fields(self.folder)
        if config is None and preset is None and not options:
            if self._stored is None:
                raise InputError(f"folder {str(self.folder)!r} holds no stream; allowed: the "
                                 "folder of an earlier stream, or data for a new one")
            return Config.from_dict(self._stored["config"])
        given = with_depth_number(absolute(configure(base_config(config, preset), options)))
        if self._stored and not differences(given.with_first_values(), self._stored["config"]):
            given = given.with_first_values()  # begun with the defaults of 0.1.0
        check_config(self.folder, self._stored, given)
        return given

    def _open(self) -> None:
        self._run = StreamRun(self.config, self.folder, choose_device(self.config.compute.device))
        self._ready = False
        self._predictor: Predictor | None = None
        claim(self.folder, self._stored, self.config, self._run.experiences)

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks of the stream, in order."""
        return [each.name for each in self._run.experiences]

    @property
    def learned(self) -> list[str]:
        """The names of the tasks that are learned, in order."""
        return self.tasks[:len(self._run.known)]

    @property
    def results(self) -> list[display.TaskResult]:
        """One result a learned task, in order."""
        return [display.TaskResult.of(each.record, self.tasks) for each in self._run.known]

    def learn_next(self) -> display.TaskResult:
        """Learns one task, after the trunk and the features where they are missing.

        The model is in the folder before this returns. Raises: InputError where every task is
        learned, and for images that cannot be read.
        """
        if len(self.learned) == len(self.tasks):
            raise InputError(f"all {len(self.tasks)} tasks are learned ({', '.join(self.tasks)}); "
                             "allowed: learn_next() while a task is left, or new tasks in the data "
                             "and a new Stream with the same folder")
        with self._working() as bars:
            self._learn(bars, len(self.learned) + 1)
        return self.results[-1]

    def learn(self) -> "Stream":
        """Learns every task that is left, then the strategies of `compare`. Returns the stream.

        Raises: InputError for images that cannot be read.
        """
        with self._working() as bars:
            if len(self.learned) < len(self.tasks):
                self._learn(bars, len(self.tasks))
            if set(self.config.train.compare) - self._run.outcomes().keys():
                self._compare(bars)
        return self

    @contextlib.contextmanager
    def _working(self) -> Iterator[Bars]:
        """Progress bars; after an error or an interruption the stream is as its folder says."""
        self._run.clock.lap("idle")
        try:
            with open_bars(self.progress) as bars:
                yield bars
        except BaseException:
            self._open()
            raise

    def _prepare(self, bars: Bars) -> None:
        """Trains the trunk and computes the features, where that is not done."""
        if not self._ready:
            for record in self._run.fit_network():
                bars.record("trunk", record)
            for note in self._run.notes:
                warnings.warn(note, stacklevel=4)
            self._run.prepare(lambda done, total: bars.show("features", done, total, "shards"))
            self._ready = True

    def _learn(self, bars: Bars, count: int) -> None:
        """Learns until so many tasks are known."""
        self._prepare(bars)
        for record in self._run.learn():
            bars.record(f"task {record.task_index + 1}/{len(self.tasks)} {record.task!r}", record)
            if isinstance(record, TaskRecord) and len(self.learned) == count:
                break

    def _compare(self, bars: Bars) -> None:
        self._prepare(bars)
        for strategy, record in self._run.compare():
            bars.record(f"{strategy}, task {record.task_index + 1}/{len(self.tasks)}", record)

    @property
    def _rows(self) -> list[tuple[float, ...]]:
        return [known.record.accuracy_row for known in self._run.known]

    @property
    def accuracy_matrix(self) -> "pd.DataFrame":
        """Row i, column j: accuracy (0 to 1) on the test images of task j after learning task i.

        NaN above the diagonal. Raises: InputError before the first task.
        """
        import pandas as pd

        self._require_a_task()
        names = self.learned
        table_TT = [[*row, *[float("nan")] * (len(names) - len(row))] for row in self._rows]
        return pd.DataFrame(table_TT, pd.Index(names, name="after task"),
                            pd.Index(names, name="task"))

    @property
    def metrics(self) -> StreamMetrics:
        """Accuracy, learning accuracy, forgetting and backward transfer over the learned tasks.

        Raises: InputError before the first task.
        """
        self._require_a_task()
        return self._run.outcomes()[self.config.train.strategy].summary

    @property
    def comparison(self) -> "pd.DataFrame":
        """One row a strategy: the configured one, and those of `compare` after `learn()`.

        Columns: acc, learning_accuracy, forgetting, bwt (shares, 0.01 is one point),
        bytes_per_task (with the detector's, which the configured strategy alone has) and
        train_seconds. Raises: InputError before the first task.
        """
        import pandas as pd

        self._require_a_task()
        rows = {name: outcome.fields() for name, outcome in self._run.outcomes().items()}
        return pd.DataFrame.from_dict(rows, orient="index").drop(columns="accuracy_matrix")

    @property
    def model(self) -> Model:
        """The model after the newest task, as it is stored. Raises: InputError before the first."""
        self._require_a_task()
        return lineage.load_model(self._run.filesystem, self._run.folder,
                                  self._run.known[-1].prefix)

    @property
    def weights_hash(self) -> str:
        """SHA-256 over all weights: equal hashes answer equally. Raises: as `model`."""
        return self.model.weights_hash()

    def predict(self, images: "Images", task: str | int = AUTO) -> "pd.DataFrame":
        """Labels images with the classes of one task, or of the task that each seems to be of.

        Args:
            images: a path, a folder (searched deeply), encoded bytes, a PIL image, a uint8 array
                of shape (H, W), (H, W, C) or (N, H, W, C), or several of these: a list, a column
                of a data frame.
            task: the name or place of a learned task, or `auto`.

        Returns: one row an image in the order given, with the columns id (path or number), label
        and probability. With `auto` there are columns task and task_probability, and label is
        None where the image seems to be of no task.

        Raises: InputError for a task that is not learned or an image that cannot be used.
        """
        return label(self._predictor_for(str(task)), images, str(task))

    def _predictor_for(self, task: str) -> Predictor:
        """The newest model, where it knows the task. Raises: InputError."""
        self._require_a_task()
        left = self.tasks[len(self.learned):]
        places = [str(place) for place in range(len(self.learned), len(self.tasks))]
        if task in left or (task in places and task not in self.learned):
            raise InputError(f"task is {task!r}, which is not learned yet; allowed: "
                             f"{', '.join(self.learned)} or {AUTO}, or learn_next() first")
        if self._predictor is None or len(self._predictor.model.tasks) < len(self.learned):
            self._predictor = Predictor(self.model, self._run.device)
        self._predictor.check_task(task)
        return self._predictor

    def plot(self) -> "Figure":
        """A matplotlib figure: the accuracy matrix, and its mean after each task beside chance.

        Raises: InputError before the first task.
        """
        from partialhn.notebook.figure import plot

        self._require_a_task()
        return plot(self.learned, self._rows,
                    [len(task.classes) for task in self._run.experiences])

    def save(self, folder: str | Path) -> Path:
        """Writes the model after the newest task as a checkpoint folder; returns its path.

        `Predictor.load` reads it. Raises: InputError before the first task, or for a folder that
        holds something else, which would be lost.
        """
        target = Path(folder)
        if target.exists() and not (target.is_dir() and (
                (target / FIELDS).exists() or not any(target.iterdir()))):
            raise InputError(f"folder {str(target)!r} holds something else than a model; allowed: "
                             "a new or empty folder, or one that save() wrote")
        self.model.save(target)
        return target

    def register(self, name: str, storage: str = "partialhn-store",
                 tracking_uri: str | None = None) -> str:
        """Registers a version for each learned task, as `partialhn train` does.

        Args:
            name: name of the registered model: letters, digits, _ and -.
            storage: folder or s3://bucket/prefix; features and models are copied there.
            tracking_uri: MLflow server or database; default: as for `partialhn train`.

        Returns: the URI of the newest task's version, such as models:/my-digits/5. What is
        registered already is not registered again.

        Raises: InputError before the first task, where no registry is installed, and for a name,
        storage or server that cannot be used.
        """
        self._require_a_task()
        return installed_registry()(self._run, name, storage, tracking_uri)

    def _require_a_task(self) -> None:
        if not self.learned:
            raise InputError("no task is learned yet; allowed: learn_next() or learn() first")

    def __repr__(self) -> str:
        return (f"<Stream {str(self.folder)!r}: {len(self.learned)} of {len(self.tasks)} tasks "
                "learned>")

    def _repr_html_(self) -> str:
        return display.stream_html(f"Stream {self.folder}", self.tasks, self._rows)
