"""Every option of the system: frozen dataclasses, one for each part, composed in `Config`.

Command-line flags and YAML files fill the same classes. This file imports nothing heavy, so
that `--help` answers at once; that is why the classes are here and not beside their owners.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from partialhn.errors import InputError
from partialhn.naming import digest, named_sections

Augment = Literal["none", "crop", "flip", "crop-flip"]
ClassOrder = Literal["shuffled", "given"]
Compression = Literal["none", "lz4"]
FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]
Generator = Literal["columns", "bilinear", "additive"]
Norm = Literal["batch", "instance", "group", "layer"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "cosine"]
StreamKind = Literal["classes", "domains"]
StartTask = Literal["first", "previous"]
StrategyName = Literal["partial_hn", "separate_heads", "linear_probe", "joint", "latent_replay",
                       "ewc", "lwf", "naive"]


_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key} is {value!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they become tasks."""

    data: str = "digits"
    """Images: a Parquet file or folder, an image folder (train/<class>/*), a directory of tasks
    (<task>/{train,test}/...), torchvision:NAME, or digits (bundled with scikit-learn)."""
    stream: StreamKind = "classes"
    """How one data set becomes tasks. classes: each task has classes of its own. domains: each has
    all classes and its share of every class's images, changed by its task_transforms."""
    tasks: int | None = None
    """Number of tasks T to cut the classes into; leave out for a directory of tasks."""
    task_sizes: tuple[int, ...] | None = None
    """Classes of each task, for example 4 3 3; default: as even as possible."""
    classes: int | None = None
    """Use only the classes labelled 0 to N-1; default: all."""
    images_per_class: int | None = None
    """Use at most so many images of each class for training, and as many for testing."""
    input_size: int = 32
    """Side of the square images the network sees, in pixels; others are resized."""
    validation: float = 0.1
    """Share of every class's training images held out to watch training, 0 to 0.5."""
    test: float = 0.2
    """Share held out for testing where the data has no test part of its own, 0.01 to 0.5."""
    task_transforms: tuple[str, ...] | None = None
    """One corruption a task for noisy streams: none, solarise, blur, grey, autocontrast, noise,
    jpeg, or several joined by + (grey+blur+autocontrast)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image stops the run (error) or is counted, listed and left out (skip)."""
    max_image_pixels: int = 50_000_000
    """Larger images are refused before they are decoded, in pixels."""
    class_order: ClassOrder = "shuffled"
    """Which classes a task gets: shuffled by stream_seed, or the next ones in the order of their
    labels, as published splits of CIFAR-10 do (given)."""
    stream_seed: int = 0
    """Seed of the split of classes into tasks and of the held-out shares."""

    def __post_init__(self) -> None:
        _require(bool(self.data), "data", self.data, "a path, a URI, torchvision:NAME or digits")
        _require(self.tasks is None or self.tasks >= 1, "tasks", self.tasks, "1 or more")
        _require(self.task_sizes is None or all(n >= 1 for n in self.task_sizes),
                 "task_sizes", self.task_sizes, "positive class counts")
        _require(self.tasks is None or self.task_sizes is None
                 or len(self.task_sizes) == self.tasks,
                 "task_sizes", self.task_sizes, f"one count for each of the {self.tasks} tasks")
        _require(self.classes is None or self.classes >= 2, "classes", self.classes, "2 or more")
        _require(self.images_per_class is None or self.images_per_class >= 2, "images_per_class",
                 self.images_per_class, "2 or more")
        _require(8 <= self.input_size <= 1024, "input_size", self.input_size, "8 to 1024 pixels")
        _require(0 <= self.validation <= 0.5, "validation", self.validation, "0 to 0.5")
        _require(0.01 <= self.test <= 0.5, "test", self.test, "0.01 to 0.5")
        _require(self.max_image_pixels >= 64, "max_image_pixels", self.max_image_pixels,
                 "64 or more")
        _require(self.stream_seed >= 0, "stream_seed", self.stream_seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The network, where it is cut, and where its trunk comes from."""

    backbone: str = "slim_resnet18"
    """slim_resnet18 (20 base filters, as in the paper) or a torchvision ResNet by name."""
    freeze_depth: int = 3
    """Execution frozen in the trunk: 0 (nothing, the full hypernetwork) to all of them (only the
    classifier is learned for each task)."""
    trunk: str = "train"
    """train (on the first task), torchvision:NAME:WEIGHTS, or a .safetensors file."""
    trunk_epochs: int = 15
    """Passes over the first task's images when the trunk is trained."""
    trunk_batch_size: int = 64
    """Images a step when the trunk is trained."""
    trunk_learning_rate: float = 3e-3
    """Peak learning rate of the trunk's training (AdamW, warm-up, cosine)."""
    trunk_precision: Precision = "float32"
    """Of its convolutions and norms while it is trained, as `precision` is of a head's; a trained
    trunk calculates in float32."""
    trunk_seed: int = 0
    """Seed of the trunk's first weights and of its batches."""

    def __post_init__(self) -> None:
        _require(self.freeze_depth >= 0, "freeze_depth", self.freeze_depth, "0 or more")
        _require(self.trunk_epochs >= 1, "trunk_epochs", self.trunk_epochs, "1 or more")
        _require(self.trunk_batch_size >= 2, "trunk_batch_size", self.trunk_batch_size,
                 "2 or more")
        _require(self.trunk_learning_rate > 0, "trunk_learning_rate", self.trunk_learning_rate,
                 "more than 0")
        _require(self.trunk_seed >= 0, "trunk_seed", self.trunk_seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How the frozen trunk's features are computed and kept."""

    views: int = 2
    """Augmented views V kept of each training image; the first is the plain image."""
    augment: Augment = "crop-flip"
    """What the views beyond the first do: crop (shift by up to an eighth), flip (left-right)."""
    feature_dtype: FeatureDtype = "float16"
    """Number type of the stored features; int8 has a scale for each channel of each shard."""
    compression: Compression = "none"
    """lz4 makes fewer bytes of some features; compressed ones are read into memory and not mapped.
    Nothing that is learned depends on it."""
    shard_rows: int = 1024
    """Images in one Arrow shard."""

    def __post_init__(self) -> None:
        _require(1 <= self.views <= 64, "views", self.views, "1 to 64")
        _require(self.shard_rows >= 1, "shard_rows", self.shard_rows, "1 or more")
        _require(self.views == 1 or self.augment != "none", "augment", self.augment,
                 "crop, flip or crop-flip when views is more than 1 (equal views cost bytes "
                 "and teach nothing)")


@dataclasses.dataclass(frozen=True)
class HypernetConfig:
    """The hypernetwork that generates the head's weights."""

    generator: Generator = "columns"
    """columns: a task opens binary columns of its own, which its code weighs, on top of another
    task's weights; nothing is forgotten. bilinear: all tasks share one set of columns, and
    each has a code. additive: one embedding a task through a small network, as published. The last
    two move for every task, held by the regulariser."""
    starts_from: StartTask = "first"
    """The task whose weights and norm a new task adds to: the first, so that tasks depend on no
    other, or the previous one, which is better where nothing is frozen (columns only)."""
    fresh_columns: int = 16
    """Columns that each task after the first opens for itself (columns only)."""
    code_dim: int = 64
    """Columns that all tasks share (bilinear only)."""
    embedding_dim: int = 32
    """Length of a task's embedding (additive only)."""
    hidden: tuple[int, ...] = (50, 32)
    """Widths of the network between embedding and rows (additive only)."""
    channel_dim: int = 32
    """Length of the embedding of an output channel (additive only)."""
    residual: bool = True
    """Generate the difference to a head that the first task trains; columns always do."""
    norm: Norm = "batch"
    """Normalisation inside the head. batch: by batch statistics while a task is learned, folded
    into its scales and shifts when it is done. The others look at one image alone."""
    norm_groups: int = 8
    """Channel groups of norm group."""
    beta: float = 0.05
    """Strength of the regulariser that keeps the earlier tasks' weights (bilinear, additive)."""

    def __post_init__(self) -> None:
        _require(self.fresh_columns >= 1, "fresh_columns", self.fresh_columns, "1 or more")
        _require(self.code_dim >= 1, "code_dim", self.code_dim, "1 or more")
        _require(self.residual or self.generator != "columns", "residual", self.residual,
                 "true with generator columns, or generator bilinear or additive")
        _require(self.embedding_dim >= 1, "embedding_dim", self.embedding_dim, "1 or more")
        _require(self.channel_dim >= 1, "channel_dim", self.channel_dim, "1 or more")
        _require(len(self.hidden) >= 1 and all(n >= 1 for n in self.hidden), "hidden",
                 self.hidden, "one or more positive widths")
        _require(self.norm_groups >= 1, "norm_groups", self.norm_groups, "1 or more")
        _require(self.beta >= 0, "beta", self.beta, "0 or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How each task is learned."""

    strategy: StrategyName = "partial_hn"
    """partial_hn (the product), or what it is held against: separate_heads, linear_probe, joint,
    latent_replay, ewc, lwf, naive."""
    compare: tuple[StrategyName, ...] = ()
    """Other strategies to train as well on the same features, for the report, for example
    separate_heads naive."""
    epochs: int = 10
    """Passes over a task's features."""
    batch_size: int = 64
    """Images a step, over all workers."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    schedule: Schedule = "cosine"
    """How the learning rate goes over a task's steps after a short rise: constant, or cosine to
    zero."""
    precision: Precision = "float32"
    """Of the head's convolutions and norms while a task is learned. What is generated, the loss
    and the weights stay float32, and so do answers."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes of the task, 0 to 0.5."""
    seed: int = 0
    """Seed of first weights, batches and views."""
    buffer: int = 200
    """Images of earlier tasks whose features are kept in all (latent_replay only)."""
    ewc_strength: float = 10_000.0
    """Strength of the penalty on moving what earlier tasks need (ewc only)."""
    lwf_strength: float = 1.0
    """Strength of the distillation from the head before the task (lwf only)."""

    @property
    def needs_every_task(self) -> bool:
        """Whether the training features of tasks that are learned already are needed again."""
        return bool(self.compare) or self.strategy == "joint"

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(0 <= self.label_smoothing <= 0.5, "label_smoothing", self.label_smoothing,
                 "0 to 0.5")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.buffer >= 1, "buffer", self.buffer, "1 or more images")
        _require(self.ewc_strength >= 0, "ewc_strength", self.ewc_strength, "0 or more")
        _require(self.lwf_strength >= 0, "lwf_strength", self.lwf_strength, "0 or more")
        _require(self.strategy not in self.compare, "compare", self.compare,
                 f"bounds other than the strategy {self.strategy!r} itself")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """What it runs on. Nothing here changes what is learned, but for rounding."""

    workers: int = 1
    """Workers that learn."""
    share: Literal["tasks", "batches"] = "tasks"
    """What several workers divide. tasks: each learns whole tasks of its own, and whole strategies
    of those to compare with, to the same bits as one worker would; where the strategy's tasks
    depend on each other (another generator than `columns`, `starts_from` previous) it is batches.
    batches: each takes a part of every batch, for few tasks that are too long for one."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu: one for each worker; auto: gpu where there is one."""
    feature_workers: int = 1
    """Workers that compute features, each with the trunk loaded once."""
    threads: int | None = None
    """CPU threads of a worker; default: the machine's cores divided by the workers."""
    cuda_graphs: bool = True
    """On a GPU: record a step once a task and replay it, where one worker learns and the task's
    features fit on the device."""
    ray_address: str | None = None
    """Cluster to join (auto, ray://host:10001), or local: a local Ray for this run. Default: no
    Ray, all in this process, where workers and feature_workers are 1; otherwise local."""
    cache: str | None = None
    """Folder on each machine for copies of remote features, shared by all that runs there;
    default: ~/.cache/partialhn/features."""
    cache_gib: float = 50.0
    """Room for those copies in GiB; those used least recently make way."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "workers", self.workers, "1 or more")
        _require(self.feature_workers >= 1, "feature_workers", self.feature_workers, "1 or more")
        _require(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        _require(self.ray_address != "", "ray_address", self.ray_address,
                 "local, auto, ray://host:10001 or host:6379")
        _require(self.cache != "", "cache", self.cache, "a folder")
        _require(self.cache_gib > 0, "cache_gib", self.cache_gib, "more than 0")


@dataclasses.dataclass(frozen=True)
class FeatureSections:
    """The sections that determine stored features."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)


@dataclasses.dataclass(frozen=True)
class Sections(FeatureSections):
    """Every section of a configuration; commands that take all options extend this class."""

    hypernet: HypernetConfig = dataclasses.field(default_factory=HypernetConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)


@dataclasses.dataclass(frozen=True)
class Config(Sections):
    """One stream, completely described."""

    @staticmethod
    def of(sections: FeatureSections) -> "Config":
        """The configuration with a command's sections; those it lacks have their defaults."""
        own = {field.name for field in dataclasses.fields(sections)}
        return Config(**{field.name: getattr(sections, field.name)
                         for field in dataclasses.fields(Config) if field.name in own})

    def to_dict(self) -> dict[str, Any]:
        """The plain nested dict that `from_dict` takes back (tuples become lists)."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Config":
        """Fills the classes from nested plain values.

        Raises: InputError naming an unknown key or a value of the wrong type.
        """
        return typing.cast(Config, build(Config, values, ""))

    def work_hash(self) -> str:
        """Names the work: equal for two configurations that learn the same thing.

        `compute` and the features' compression are left out, and so is `data.data`, which the
        data's fingerprint replaces.
        """
        work = named_sections(self)
        del work["compute"], work["data"]["data"], work["features"]["compression"]
        return digest(work, 12)


def load_config(path: str | Path) -> Config:
    """Reads a configuration file: the sections of `Config` with their keys, all optional.

    Raises: InputError for a missing file, broken YAML, an unknown key or a wrong type.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"configuration file {str(path)!r} cannot be read: {error.strerror}; "
                         "give the path of a YAML file") from error
    try:
        values = yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise InputError(f"configuration file {str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        sections = ", ".join(field.name for field in dataclasses.fields(Config))
        raise InputError(f"configuration file {str(path)!r} holds {type(values).__name__}; "
                         f"allowed: the sections {sections}")
    return Config.from_dict(values)


def build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """An options dataclass from plain values; `where` stands before keys in messages.

    Raises: InputError naming an unknown key or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"configuration {where or 'file'} holds {type(values).__name__}; allowed: "
                         "a section with keys")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise InputError(f"unknown configuration key {where}{key}; allowed: "
                             + ", ".join(where + name for name in names))
    filled = {key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()}
    return kind(**filled)


def _convert(kind: Any, value: Any, key: str) -> Any:
    """One plain value as the annotated type, or an InputError that names the key."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} is {value!r}; allowed: a section with keys of "
                             f"{typing.cast(type, kind).__name__}")
        return build(kind, value, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{key} is {value!r}; allowed: {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{key} is {value!r}; allowed: a list")
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)  # YAML 1.1 takes 1e-3, without a point, for text
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key} is {value!r}; allowed: a value of type {kind.__name__}")
    return value
