"""The command line: `partialhn COMMAND`.

Imports nothing heavy before a command runs, so that `--help` is fast. Exit codes: 0 done, 1 failed,
2 bad input.
"""

import dataclasses
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from partialhn import __version__
from partialhn.config import Config, DeviceName, Sections, load_sections
from partialhn.errors import InputError, IntegrityError
from partialhn.json_files import read_object
from partialhn.numbers import counted
from partialhn.plugins import Table
from partialhn.presets import preset_sections
from pipelines.cli import (
    backbones,
    doctor,
    export,
    features,
    models,
    reproduce,
    retrain,
    serve,
    tune,
)
from pipelines.cli.next_steps import next_steps
from pipelines.settings import Group, OutputConfig, RetrainConfig


@dataclasses.dataclass(frozen=True)
class Train(Sections):
    """Learn a stream of tasks and register a model version for each.

    The same command resumes where an interrupted one stopped. --preset NAME starts from a known
    configuration (digits, split-cifar10, split-cifar100, split-tiny-imagenet,
    split-tiny-imagenet-5x10, noisy-cifar, domain-cifar10, pretrained-cifar10,
    pretrained-tiny-imagenet), --config FILE from a YAML file (sections data, backbone, features,
    hypernet, train, compute); options given here win.
    """

    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    def run(self) -> None:
        from pipelines.report.page import text_summary
        from pipelines.train import train

        result = train(Config.of(self), self.output)
        print()
        print(text_summary(result))
        print(f"result: {self.output.result}")
        print("\n".join(next_commands(self.output, result)))


@dataclasses.dataclass(frozen=True)
class Predict:
    """Label images with a registered model, each with the classes of a given or inferred task."""

    model: str
    """Model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION."""
    task: str
    """Name of the task, its index from 0, or auto to have each image's task inferred."""
    input: str
    """Images: a folder (with its sub-folders), an image file or a Parquet file; local or s3://."""
    output: str = "preds.parquet"
    """Parquet file to write: id, task, label, probability, classes, probabilities, and with task
    auto the probability of the task."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image stops the run (error) or is reported and left out (skip)."""
    record: bool = False
    """Keep a bounded sample of trunk features (no images) in the storage, for drift."""
    image_column: str | None = None
    """Column of the images in Parquet files; default: image or img."""
    device: DeviceName = "cpu"
    """Where the model predicts: cpu, gpu, or auto (a GPU if there is one). Probabilities of the two
    differ by rounding."""

    def run(self) -> None:
        from partialhn.task_inference import AUTO
        from pipelines.label_images import predict_to_parquet

        done = predict_to_parquet(self.model, self.task, self.input, self.output, self.storage,
                                  self.tracking_uri, self.on_bad_image, self.record,
                                  image_column=self.image_column, log=print,
                                  device=self.device)
        task = "without their task" if done.task == AUTO else f"of task {done.task!r}"
        print(f"{counted(done.images, 'image')} {task} labelled by {done.model_uri}: "
              + ", ".join(f"{label} {count}" for label, count in done.labels.items()))
        for line in done.not_used:
            print(line)
        for bad in done.bad:
            print(f"  left out {bad.id}: {bad.reason}")
        if done.unknown:
            print(f"images of no known task, for example: {', '.join(done.unknown)}")
        if done.new_task:
            print("so many of them may be images of a new task; put labelled images of it into the "
                  "inbox")
        print(f"predictions: {done.output}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Write the report of a stream as one HTML page, which needs no network."""

    name: str = "stream"
    """Name of the stream."""
    output: str = "report.html"
    """File to write."""
    result: str | None = None
    """Use this result.json instead of the one in the registry."""
    benchmark: Annotated[str | None, tyro.conf.arg(aliases=["--pack"])] = None
    """Write the page of a benchmark instead: the folder, or the result.json, that reproduce
    wrote."""
    policy: str | None = None
    """YAML file with the limits by which the report judges, as for retrain; default: those of the
    stream's passes of retrain, or else the gate's defaults."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""

    def __post_init__(self) -> None:
        if self.result and self.benchmark:
            raise InputError("--result and --benchmark are given; allowed: one of them")

    def run(self) -> None:
        from pipelines.report.page import render, write_page

        if self.benchmark:
            from pipelines.benchmarks.page import benchmark_page

            path = Path(self.benchmark)
            html = benchmark_page(_read_result(path / "result.json" if path.is_dir() else path,
                                          "reproduce"))
        else:
            html = render(self._fields() | self._judged_by())
        print(f"report: {write_page(html, self.output)}")

    def _judged_by(self) -> dict[str, Any]:
        if self.policy is None:
            return {}
        from pipelines.gate import load_policy

        return {"policy": dataclasses.asdict(load_policy(self.policy))}

    def _fields(self) -> dict[str, Any]:
        if self.result is None:
            from pipelines.platform.storage import open_storage
            from pipelines.registry.client import connect

            return connect(open_storage(self.storage), self.tracking_uri,
                           create=False).result(self.name)
        return _read_result(Path(self.result), "train")


def _read_result(path: Path, writer: str) -> dict[str, Any]:
    try:
        return read_object(path, f"result {str(path)!r}")
    except IntegrityError as error:
        raise InputError(f"{error}; allowed: a result.json that {writer} wrote") from error


@dataclasses.dataclass(frozen=True)
class Show:
    """Show a stream: its tasks, versions, aliases, metrics, and the folders of its features."""

    name: str = "stream"
    """Name of the stream."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""

    def run(self) -> None:
        from pipelines.show import show

        print(show(self.name, self.storage, self.tracking_uri))


@dataclasses.dataclass(frozen=True)
class Demo:
    """Learn scikit-learn's handwritten digits, 5 tasks of 2 classes, as `train` does."""

    folder: str = "demo"
    """Folder for all results; a second run starts over but reuses the stored features."""
    size: Literal["full", "small"] = "full"
    """small: fewer epochs, for a quick check that everything works."""

    def run(self) -> None:
        from pipelines.demo import demo

        demo(Path(self.folder), self.size)


COMMANDS: dict[str, Any] = {"train": Train, "predict": Predict, "report": Report, "show": Show,
                            "demo": Demo, **models.COMMANDS, **retrain.COMMANDS,
                            **serve.COMMANDS, **tune.COMMANDS, **features.COMMANDS,
                            **reproduce.COMMANDS, **backbones.COMMANDS, **doctor.COMMANDS,
                            **export.COMMANDS}
"""Every command by name: a class with a `run` method, or a `Group` of such classes."""
RESUMING = ("train", "retrain", "tune", "reproduce")
"""Commands that keep each finished step and go on after it when they are started again."""


def next_commands(output: OutputConfig, result: dict[str, Any]) -> list[str]:
    """Commands that a user may want to run after training."""
    first = result["tasks"][0]
    classes = ", ".join(first["classes"][:8]) + ", ..." * (len(first["classes"]) > 8)
    return [*next_steps((f"report --name {output.name}", f"show --name {output.name}",
                         f"predict --model {result['model_uri']} --task {first['name']} "
                         "--input NEW_IMAGES"), output.storage, output.tracking_uri),
            f"  (task {first['name']} has the classes {classes}; show lists those of every task)"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # shows progress in a pipe or a log file, too
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns 0 (done), 1 (failed), 2 (bad input), or the command's own code."""
    words = list(arguments)
    if words in (["--version"], ["-V"]):
        print(f"partialhn {__version__}")
        return 0
    try:
        code = _run(words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except IntegrityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the process that reads our output has ended
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + ": the same command resumes from here" * _resumes(words),
              file=sys.stderr)
        return 1
    except Exception as error:
        from partialhn.networks.device_memory import explanation, is_out_of_memory
        from pipelines.platform.disk import folders_of, full_disk, refused_path

        if is_out_of_memory(error):
            print(f"error: {explanation(error, 'this command', 'device cpu, or more memory')}",
                  file=sys.stderr)
            return 2
        if text := full_disk(error, folders_of(words)):
            print(f"error: {text}", file=sys.stderr)
            return 1
        if text := refused_path(error):
            print(f"error: {text}", file=sys.stderr)
            return 2
        traceback.print_exc()
        if _resumes(words):
            print("failed: the same command resumes after the last finished step", file=sys.stderr)
        return 1
    return int(code)


def _resumes(words: Sequence[str]) -> bool:
    """Whether the command that the words name goes on where it stopped."""
    return bool(words) and words[0] in RESUMING


def _run(words: list[str]) -> int:
    """Runs a command; an error of S3 becomes an InputError that explains a bucket it names."""
    try:
        return _parse(words).run() or 0
    except (InputError, IntegrityError, BrokenPipeError):
        raise
    except Exception as error:
        from pipelines.platform.storage import check_buckets

        check_buckets(error, words)
        raise


CHOICES = ConstructorRegistry()


@CHOICES.primitive_rule
def _names_of_a_table(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """An option that names a line of a table, as `strategy` does: its help lists the names."""
    if not (isinstance(info.type, type) and hasattr(info.type, "table")):
        return None
    table: Table[Any] = info.type.table
    return PrimitiveConstructorSpec(
        nargs=1, metavar="{" + ",".join([*table, *table.patterns]) + "}",
        choices=None if table.patterns else tuple(table),
        instance_from_str=lambda words: words[0], is_instance=lambda value: value in table,
        str_from_instance=lambda value: [value])


def _parse(words: list[str]) -> Any:
    """The command with its options; tyro prints help and its own errors (exit code 2)."""
    if words[:1] == ["retrain"]:
        _check_retrain(words[1:])
    words, default = _configured(words)
    kinds, path = dict(COMMANDS), ["partialhn"]
    description = __doc__.split("\n\n")[0]
    while words and words[0] in kinds:
        kind = kinds[words[0]]
        path.append(words[0])
        words = words[1:]
        if not issubclass(kind, Group):
            return tyro.cli(kind, prog=" ".join(path), args=words, config=(OmitArgPrefixes,),
                            registry=CHOICES, **default)
        kinds, description = kind.COMMANDS, kind.__doc__ or ""
    if words and not words[0].startswith("-"):
        raise InputError(f"command is {' '.join([*path[1:], words[0]])!r}; allowed: "
                         + ", ".join(kinds))
    return tyro.extras.subcommand_cli_from_dict(kinds, prog=" ".join(path), args=words,
                                                description=description,
                                                registry=CHOICES)


def _check_retrain(words: Sequence[str]) -> None:
    """Raises InputError for an option that only train has: retrain takes those from a file."""
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    own = {field.name for field in dataclasses.fields(RetrainConfig)}
    for word in words:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        for section, kind in sections.items():
            if word.startswith("--") and isinstance(kind, type) and key not in own and key in {
                    field.name for field in dataclasses.fields(kind)}:
                option = word.partition("=")[0]
                raise InputError(f"{option} is an option of train; retrain takes it from --config "
                                 f"FILE.yaml, as {{{section}: {{{key}: ...}}}}, or from the "
                                 "stream's first pass")


def _configured(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Removes --config or --preset from a command's words; returns it as tyro's default values."""
    kinds = {"train": Train, "tune": COMMANDS["tune"], "features plan": features.PlanFeatures}
    kind = kinds.get(" ".join(words[:1])) or kinds.get(" ".join(words[:2]))
    words, config = _take_config(words) if kind else (words, None)
    if config is None or kind is None:
        return words, {}
    sections = {field.name for field in dataclasses.fields(Config)}
    return words, {"default": kind(**{field.name: getattr(config, field.name) for field in
                                      dataclasses.fields(kind) if field.name in sections})}


def _take_config(words: list[str]) -> tuple[list[str], Sections | None]:
    """Removes --config FILE or --preset NAME from the words; returns their configuration, too.

    Raises: InputError if both are given, or one of them twice.
    """
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("--config", "--preset"):
            continue
        if not equals and index + 1 == len(words):
            raise InputError(f"{option} has no value; allowed: --config FILE.yaml, --preset NAME")
        value = value if equals else words[index + 1]
        other_words = words[:index] + words[index + (1 if equals else 2):]
        other_words, second = _take_config(other_words)
        if second:
            raise InputError("--config or --preset is given more than once; allowed: one of them, "
                             "once")
        return other_words, (load_sections if option == "--config" else preset_sections)(value)
    return words, None
