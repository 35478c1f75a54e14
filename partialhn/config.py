"""All options of the system: frozen dataclasses, one for each section, composed in `Config`.

Command-line flags and YAML files fill the same classes. This file imports nothing heavy, so that
`--help` answers at once; that is why the classes are here and not beside the code that uses them.
"""

import contextlib
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from partialhn.errors import InputError
from partialhn.features.table import NUMBER_TYPES
from partialhn.naming import digest, named_sections
from partialhn.networks.table import (
    BACKBONES,
    begins_elsewhere,
    cut_at_every_block,
    expected_size,
)
from partialhn.plugins import Table
from partialhn.strategies.table import TABLE as STRATEGIES
from partialhn.strategies.table import check_options, needs_every_task, options_of
from partialhn.yaml_text import read_yaml

Arithmetic = Literal["ieee", "tf32", "bfloat16"]
Augment = Literal["none", "crop", "flip", "crop-flip"]
ClassOrder = Literal["shuffled", "given"]
Compression = Literal["none", "lz4"]
DeviceName = Literal["auto", "cpu", "gpu"]
Generator = Literal["columns", "bilinear", "additive"]
Norm = Literal["auto", "batch", "network", "instance", "group", "layer"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "cosine"]
StreamKind = Literal["classes", "domains"]
StartTask = Literal["auto", "first", "previous", "network"]
BATCH_NORMS: tuple[Norm, ...] = ("batch", "network")
"""Norms that are batch norm; the others take its place, and a network's weights do not fit them."""
if TYPE_CHECKING:
    StrategyName = str
    BackboneName = str
    FeatureDtype = str
else:
    class _NameType(type):
        """Any str is an instance, so that nobody needs to wrap a name."""

        def __instancecheck__(cls, value):
            return isinstance(value, str)

    class Name(str, metaclass=_NameType):
        """The type of an option that names a line of a table.

        The command line and `Config.from_dict` find the allowed names by the type.
        """

        table: ClassVar[Table[Any]]

    class StrategyName(Name):
        """The name of a strategy."""

        table = STRATEGIES

    class BackboneName(Name):
        """The name of a backbone."""

        table = BACKBONES

    class FeatureDtype(Name):
        """The name of a number type of stored features."""

        table = NUMBER_TYPES

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key} is {value!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images are learned, and how they become tasks."""

    data: str = "digits"
    """The images: a Parquet file or folder, an image folder (train/<class>/*), a directory of tasks
    (<task>/{train,test}/...), hf:OWNER/NAME[:CONFIG] (a data set of the Hugging Face Hub, or the
    folder of a clone), torchvision:NAME, or digits (bundled with scikit-learn)."""
    stream: StreamKind = "classes"
    """How one data set becomes tasks. classes: each task has classes of its own. domains: each task
    has all classes, a share of every class's images, and a corruption from task_transforms."""
    tasks: int | None = None
    """Number of tasks that the classes are divided into; leave it out for a directory of tasks."""
    task_sizes: tuple[int, ...] | None = None
    """Number of classes of each task, for example 4 3 3; default: as even as possible."""
    classes: int | None = None
    """Use only the classes labelled 0 to N-1; default: all."""
    images_per_class: int | None = None
    """Largest number of training images, and of test images, of each class; default: all."""
    input_size: int = 0
    """Side of the square images that the network takes, in pixels; other images are resized. 0:
    what the weights of a trunk that was trained elsewhere expect, and 32 for one trained here."""
    validation: float = 0.1
    """Share of every class's training images that is held out to validate training, 0 to 0.5."""
    test: float = 0.2
    """Share of every class's images that is held out for testing where the data has no test split
    of its own, 0.01 to 0.5."""
    task_transforms: tuple[str, ...] | None = None
    """One corruption for each task of a noisy stream: none, solarise, blur, grey, autocontrast,
    noise, jpeg, or several joined by + (grey+blur+autocontrast)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does. error: it stops the run. skip: it is counted, listed and left
    out."""
    max_image_pixels: int = 50_000_000
    """Largest image that is decoded, in pixels; a larger one counts as unreadable."""
    class_order: ClassOrder = "shuffled"
    """Order in which classes are divided among tasks. shuffled: drawn from stream_seed. given: the
    order of their labels, as in published splits of CIFAR-10."""
    stream_seed: int = 0
    """Seed of the division of classes into tasks and of the held-out shares."""
    image_column: str | None = None
    """Column of the images in Parquet files, or of the file names in a table metadata.csv, .jsonl
    or .parquet beside images; default: image or img, or file_name."""
    label_column: str | None = None
    """Column of the labels in Parquet files, or in a table beside images; default: label, labels
    or fine_label."""

    def __post_init__(self) -> None:
        _require(bool(self.data), "data", self.data,
                 "a path, a URI, hf:OWNER/NAME, torchvision:NAME or digits")
        _require(self.tasks is None or self.tasks >= 1, "tasks", self.tasks, "1 or more")
        _require(self.task_sizes is None or all(n >= 1 for n in self.task_sizes),
                 "task_sizes", self.task_sizes, "positive class counts")
        _require(self.tasks is None or self.task_sizes is None
                 or len(self.task_sizes) == self.tasks,
                 "task_sizes", self.task_sizes, f"one count for each of the {self.tasks} tasks")
        _require(self.classes is None or self.classes >= 2, "classes", self.classes, "2 or more")
        _require(self.images_per_class is None or self.images_per_class >= 2, "images_per_class",
                 self.images_per_class, "2 or more")
        _require(self.input_size == 0 or 8 <= self.input_size <= 1024, "input_size",
                 self.input_size, "8 to 1024 pixels, or 0 for what the trunk's weights expect")
        _require(0 <= self.validation <= 0.5, "validation", self.validation, "0 to 0.5")
        _require(0.01 <= self.test <= 0.5, "test", self.test, "0.01 to 0.5")
        _require(self.max_image_pixels >= 64, "max_image_pixels", self.max_image_pixels,
                 "64 or more")
        _require(self.stream_seed >= 0, "stream_seed", self.stream_seed, "0 or more")
        for key in ("image_column", "label_column"):
            _require(getattr(self, key) != "", key, "", "the name of a column")


STAGE_DEPTH = 3
"""Depth at which a network of four stages is cut where nobody says a depth."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Which network is used, where it is cut, and where its trunk comes from."""

    backbone: BackboneName = "slim_resnet18"
    """The network: slim_resnet18 (20 base filters, as in the paper), or a torchvision ResNet, cut
    at its four stages; timm:NAME, torchvision:NAME or partialhn:slim_resnet18, cut at every
    block."""
    freeze_depth: int | str = "auto"
    """Where the network is cut: the number of blocks that are frozen in the trunk, from 0 (nothing
    is frozen; the hypernetwork generates all blocks) to all of them (each task learns its
    classifier only); the name of the last frozen block; or a share of the blocks such as 75%. auto:
    3 of the four stages, or 75%. `partialhn backbones NAME` lists the blocks."""
    trunk: str = "train"
    """Where the trunk's weights come from: train (trained on the first task); timm:NAME,
    hf-hub:OWNER/NAME or torchvision:NAME:WEIGHTS (downloaded); package:efficientnet-lite0; or a
    file of weights, safetensors or a PyTorch checkpoint."""
    adapt_trunk: bool = False
    """Whether a network of other weights than train is trained once more on the first task, all of
    it and at a low rate, before the trunk is frozen. Its budget is the trunk's own."""
    adapt_learning_rate: float = 1e-4
    """Peak learning rate of adapt_trunk."""
    trunk_epochs: int | None = None
    """Passes over the first task's images while the trunk is trained. Default: 15, and more or
    fewer where these are less than trunk_min_steps or more than trunk_max_steps; training then
    stops when the held-out loss does not improve any more, and the best state is kept."""
    trunk_min_steps: int = 400
    """Least number of steps that the trunk is trained for where trunk_epochs is not given."""
    trunk_max_steps: int = 20_000
    """Largest number of steps that the trunk is trained for where trunk_epochs is not given."""
    trunk_batch_size: int = 64
    """Number of images in a step of the trunk's training."""
    trunk_learning_rate: float = 3e-3
    """Peak learning rate of the trunk's training (AdamW, warm-up, cosine)."""
    trunk_arithmetic: Arithmetic = "ieee"
    """Arithmetic of the trunk, in its training and in every feature. ieee: float32. tf32: float32
    whose products a GPU rounds to 19 bits (a CPU computes as with ieee). bfloat16: products of
    bfloat16. Features of another arithmetic are stored under another key."""
    trunk_precision: Precision = "float32"
    """Number type while the trunk is trained, with features in float32: bfloat16 is how a trunk was
    trained before trunk_arithmetic, which takes its place."""
    trunk_seed: int = 0
    """Seed of the trunk's first weights and of its batches."""

    @property
    def trains_trunk(self) -> bool:
        """Whether weights of the trunk are learned on the first task."""
        return self.trunk == "train" or self.adapt_trunk

    @property
    def training_arithmetic(self) -> Arithmetic:
        """Arithmetic of the trunk's training."""
        return "bfloat16" if self.trunk_precision == "bfloat16" else self.trunk_arithmetic

    @property
    def depth(self) -> int:
        """The freeze depth, once it is a number. Raises: InputError where it is not yet."""
        depth = self.freeze_depth
        _require(isinstance(depth, int), "freeze_depth", depth, "a number, which "
                 "partialhn.run.with_depth_number finds")
        return typing.cast(int, depth)

    def __post_init__(self) -> None:
        _require(self.backbone in BACKBONES, "backbone", self.backbone, BACKBONES.allowed())
        depth = self.freeze_depth
        if isinstance(depth, str) and depth.isdecimal():
            depth = int(depth)
        if depth == "auto" and not cut_at_every_block(self.backbone):
            depth = STAGE_DEPTH
        object.__setattr__(self, "freeze_depth", depth)  # a frozen dataclass allows no other way
        _require(not isinstance(depth, int) or depth >= 0, "freeze_depth", depth,
                 "0 or more, a block's name, or a share such as 75%")
        _require(self.trunk_epochs is None or self.trunk_epochs >= 1, "trunk_epochs",
                 self.trunk_epochs, "1 or more")
        _require(self.trunk_min_steps >= 1, "trunk_min_steps", self.trunk_min_steps, "1 or more")
        _require(self.trunk_max_steps >= self.trunk_min_steps, "trunk_max_steps",
                 self.trunk_max_steps, f"trunk_min_steps ({self.trunk_min_steps}) or more")
        _require(self.trunk_batch_size >= 2, "trunk_batch_size", self.trunk_batch_size,
                 "2 or more")
        _require(self.trunk_learning_rate > 0, "trunk_learning_rate", self.trunk_learning_rate,
                 "more than 0")
        _require(self.trunk_seed >= 0, "trunk_seed", self.trunk_seed, "0 or more")
        _require(self.adapt_learning_rate > 0, "adapt_learning_rate", self.adapt_learning_rate,
                 "more than 0")
        _require(self.trunk != "train" or not self.adapt_trunk, "adapt_trunk", self.adapt_trunk,
                 "false where trunk is train, which is trained on the first task anyway; a trunk "
                 "from a file of weights, timm:NAME or torchvision:NAME:WEIGHTS can be adapted")


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """How the frozen trunk's features are computed and stored."""

    views: int = 2
    """Number of augmented views of each training image whose features are stored; the first view is
    the plain image."""
    augment: Augment = "crop-flip"
    """How the views after the first differ from the image: crop (a shift by up to an eighth of the
    side), flip (left-right), crop-flip (both), or none."""
    feature_dtype: FeatureDtype = "float16"
    """Number type of the stored features; int8 has a scale for each channel of each shard."""
    compression: Compression = "none"
    """Compression of the stored features. lz4 saves bytes where features have many zeros, but
    compressed features are read into memory and not mapped. It does not change what is learned."""
    shard_rows: int = 1024
    """Number of images whose features are in one Arrow shard."""

    def __post_init__(self) -> None:
        _require(self.feature_dtype in NUMBER_TYPES, "feature_dtype", self.feature_dtype,
                 NUMBER_TYPES.allowed())
        _require(1 <= self.views <= 64, "views", self.views, "1 to 64")
        _require(self.shard_rows >= 1, "shard_rows", self.shard_rows, "1 or more")
        _require(self.views == 1 or self.augment != "none", "augment", self.augment,
                 "crop, flip or crop-flip when views is more than 1 (equal views cost bytes "
                 "and teach nothing)")


@dataclasses.dataclass(frozen=True)
class HypernetConfig:
    """How the hypernetwork generates the head's weights."""

    generator: Generator = "columns"
    """Form of the hypernetwork. columns: each task adds binary columns of its own, weighed by its
    code, to another task's weights; nothing is forgotten. bilinear: all tasks share one set of
    columns, and each has a code. additive: one embedding for each task through a small network, as
    published. With bilinear and additive the shared parameters change at every task, and the
    regulariser limits how far."""
    starts_from: StartTask = "auto"
    """Weights and norm that a new task starts from (columns only). first: those of the first task.
    previous: those of the task before it, which is better where nothing is frozen. network: those
    of the network whose trunk is frozen; no task depends on another. auto: network where the trunk
    of a network that is cut at every block was trained elsewhere and norm is auto, batch or
    network, otherwise first."""
    generate: str = "all"
    """Which of the head's matrices the hypernetwork generates; the others stay as the trunk's
    network has them. all, attention, mlp, or a pattern of names such as *.qkv.*"""
    fresh_columns: int = 16
    """Number of columns that each task after the first adds (columns only)."""
    dictionary: int = 0
    """Number of directions in the dictionary that later tasks share (columns only). When the first
    tasks have columns of their own, the dictionary keeps the input directions that these have in
    common, and a task after them stores only the output sides of so many columns. 0: no dictionary,
    every task has columns of its own."""
    dictionary_after: int = 10
    """Number of tasks with columns of their own after which the dictionary is closed."""
    code_dim: int = 64
    """Number of columns that all tasks share (bilinear only)."""
    embedding_dim: int = 32
    """Length of a task's embedding (additive only)."""
    hidden: tuple[int, ...] = (50, 32)
    """Widths of the network between embedding and rows (additive only)."""
    channel_dim: int = 32
    """Length of the embedding of an output channel (additive only)."""
    residual: bool = True
    """Whether the hypernetwork generates the difference to a head that the first task trains;
    columns always do."""
    norm: Norm = "auto"
    """Normalisation inside the head. batch: by batch statistics while a task is learned, folded
    into its scales and shifts afterwards. network: batch norm with the statistics that the network
    has, so a head starts as the network's own; its classifier then starts as ridge regression on
    the features of this head, and its learning rate is lower. instance, group, layer: by the
    statistics of each image alone; the network's weights fit none of them, so the first task trains
    new ones, and starts_from auto is first. auto: network where tasks start from the network,
    otherwise batch."""
    norm_groups: int = 8
    """Number of channel groups (norm group only)."""
    beta: float = 0.05
    """Strength of the regulariser that keeps the earlier tasks' weights (bilinear, additive)."""

    def __post_init__(self) -> None:
        _require(bool(self.generate), "generate", self.generate,
                 "all, attention, mlp, or a pattern of names such as *.qkv.*")
        _require(self.fresh_columns >= 1, "fresh_columns", self.fresh_columns, "1 or more")
        _require(self.dictionary >= 0, "dictionary", self.dictionary, "0 or more")
        _require(self.dictionary == 0 or self.generator == "columns", "dictionary",
                 self.dictionary, f"0 with generator {self.generator}, or generator columns")
        _require(self.dictionary_after >= 1, "dictionary_after", self.dictionary_after,
                 "1 or more")
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
    """Strategy that learns the stream: partial_hn (the product), or one of the baselines."""
    compare: tuple[StrategyName, ...] = ()
    """Other strategies that learn the same features for the report, for example
    separate_heads naive."""
    epochs: int | None = None
    """Passes over a task's features. Default: 10, and more or fewer where these are less than
    min_steps or more than max_steps; a task then stops when its held-out loss does not improve any
    more, and its best state is kept."""
    min_steps: int = 300
    """Least number of steps that a task is trained for where epochs is not given."""
    max_steps: int = 15_000
    """Largest number of steps that a task is trained for where epochs is not given."""
    closed_form: Literal["auto", "never"] = "auto"
    """Whether ridge regression in closed form helps a task of partial_hn where epochs is not given.
    auto: it takes the head's place with fewer than 30 images a class or fewer than 20 held-out
    images in all (with the default validation, two classes of up to 94 images each), or where
    its held-out loss is smaller; otherwise the classifier of the trained head is averaged with
    it."""
    batch_size: int = 64
    """Number of images in a step, over all workers."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    schedule: Schedule = "cosine"
    """Course of the learning rate over a task's steps after a short rise: constant, or cosine to
    zero."""
    precision: Precision = "float32"
    """Number type of the head's matrices and norms while a task is learned. Generated weights,
    losses and predictions are float32."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes of the task, 0 to 0.5."""
    seed: int = 0
    """Seed of first weights, batches and views."""
    buffer: int = 200
    """Number of images of earlier tasks whose features are kept, over all tasks (latent_replay
    only)."""
    ewc_strength: float = 10_000.0
    """Strength of the penalty on changing weights that earlier tasks need (ewc only)."""
    lwf_strength: float = 1.0
    """Strength of the distillation from the head as it was before the task (lwf only)."""
    strategy_options: tuple[str, ...] = ()
    """Options that a strategy of another package declares, each as NAME=VALUE."""
    detector_features: int = 500
    """Number of random features of the detector, which finds the task where the caller gives none.
    A model stores 2 D^2 bytes for it, D being this number, twice the trunk's channels and, on a
    trunk that was trained elsewhere, up to 2304 numbers of the network's later blocks; spreads
    among them take the place of random features."""
    false_alarms: float = 0.05
    """Share of the images of known tasks that task auto may take for images of no known task."""

    @property
    def needs_every_task(self) -> bool:
        """Whether the training features of tasks that are learned already are needed again."""
        return bool(self.compare) or needs_every_task(self.strategy)

    def __post_init__(self) -> None:
        for key, name in (("strategy", self.strategy), *(("compare", each) for each in
                                                         self.compare)):
            _require(name in STRATEGIES, key, name, ", ".join(STRATEGIES))
        _require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.min_steps >= 1, "min_steps", self.min_steps, "1 or more")
        _require(self.max_steps >= self.min_steps, "max_steps", self.max_steps,
                 f"min_steps ({self.min_steps}) or more")
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(0 <= self.label_smoothing <= 0.5, "label_smoothing", self.label_smoothing,
                 "0 to 0.5")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.buffer >= 1, "buffer", self.buffer, "1 or more images")
        _require(self.ewc_strength >= 0, "ewc_strength", self.ewc_strength, "0 or more")
        _require(self.lwf_strength >= 0, "lwf_strength", self.lwf_strength, "0 or more")
        _require(0 <= self.detector_features <= 100_000, "detector_features",
                 self.detector_features, "0 to 100000")
        _require(0 <= self.false_alarms < 1, "false_alarms", self.false_alarms,
                 "0 to less than 1")
        _require(self.strategy not in self.compare, "compare", self.compare,
                 f"strategies other than the strategy {self.strategy!r} itself")
        check_options(self.strategy_options, (self.strategy, *self.compare))

    def alone(self, strategy: StrategyName | None = None) -> "TrainConfig":
        """The same for one strategy, by default its own, with none to compare with and without the
        options of others.
        """
        name = strategy or self.strategy
        return dataclasses.replace(self, strategy=name, compare=(),
                                   strategy_options=options_of(name, self.strategy_options))


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Which machines and processes are used; except for rounding, the result does not change."""

    workers: int = 1
    """Number of workers that learn."""
    share: Literal["tasks", "batches"] = "tasks"
    """How several workers share the work. tasks: each learns whole tasks, and whole strategies to
    compare with, to the same bits as one worker would. Where tasks depend on each other (another
    generator than columns, or starts_from previous) it is batches. batches: each takes a part of
    every batch, for few tasks that take long."""
    tasks_at_once: int | None = None
    """Number of tasks that a worker learns at once, each in a thread, where tasks do not depend on
    each other. The result is the same. Default: as many as fit on a GPU, up to 8; on a CPU one."""
    device: DeviceName = "auto"
    """Device of each worker. gpu: one GPU for each worker. auto: gpu where there is one."""
    feature_workers: int = 1
    """Number of workers that compute features, each with its own copy of the trunk."""
    threads: int | None = None
    """CPU threads of a worker; default: the machine's cores divided by the workers, and by
    tasks_at_once where it is given."""
    cuda_graphs: bool = True
    """Whether a GPU records a step once for each task and replays it, where one worker learns and
    the task's features fit on the device."""
    ray_address: str | None = None
    """Ray cluster to join (auto: that of RAY_ADDRESS or of this machine; or ray://host:10001), or
    local for a Ray of this run's own.
    Default: no Ray where workers and feature_workers are 1, otherwise local."""
    re_evaluate: bool = False
    """Measure every earlier task again after each task, although its weights, its stored features
    and the code are the same; without it a few are, and all if one of them differs."""
    cache: str | None = None
    """Folder on each machine for copies of remote features, shared by all runs there; default:
    ~/.cache/partialhn/features."""
    cache_gib: float = 50.0
    """Size limit of those copies in GiB; the least recently used are removed first."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, "workers", self.workers, "1 or more")
        _require(self.tasks_at_once is None or self.tasks_at_once >= 1, "tasks_at_once",
                 self.tasks_at_once, "1 or more")
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


FIRST_VALUES: Mapping[str, Mapping[str, Any]] = {
    "backbone": {"trunk_epochs": 15}, "train": {"epochs": 10}}
"""Defaults of version 0.1.0 that are None today: the value is then chosen for each task."""


class LeftOpen(typing.NamedTuple):
    """An option that may be left open, because other sections decide it."""

    section: str
    key: str
    still_open: Any
    """The value that leaves it open."""
    decide: Callable[[Sections], Any]
    """The value that the other sections make of it."""


LEFT_OPEN: Sequence[LeftOpen] = (
    LeftOpen("data", "input_size", 0, lambda given: expected_size(
        given.backbone.backbone, given.backbone.trunk)),
    LeftOpen("hypernet", "starts_from", "auto", lambda given: (
        "network" if begins_elsewhere(given.backbone.backbone, given.backbone.trunk)
        and given.hypernet.norm in ("auto", *BATCH_NORMS) else "first")),
    LeftOpen("hypernet", "norm", "auto", lambda given: (
        "network" if given.hypernet.starts_from == "network" else "batch")))
"""The options that `Config` decides where they are left open; later ones may need earlier ones."""


@dataclasses.dataclass(frozen=True)
class Config(Sections):
    """One stream, completely described."""

    def __post_init__(self) -> None:
        """Decides what is left open in one section and depends on another."""
        for section, key, still_open, decide in LEFT_OPEN:
            options = getattr(self, section)
            if getattr(options, key) == still_open:
                object.__setattr__(self, section,
                                   dataclasses.replace(options, **{key: decide(self)}))

    @staticmethod
    def of(sections: FeatureSections) -> "Config":
        """The configuration with a command's sections; those it lacks have their defaults."""
        own = {field.name for field in dataclasses.fields(sections)}
        return Config(**{field.name: getattr(sections, field.name)
                         for field in dataclasses.fields(Config) if field.name in own})

    def to_dict(self) -> dict[str, Any]:
        """A nested dict of plain values, which `from_dict` reads (tuples become lists)."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Config":
        """A configuration from nested plain values; keys that are left out have their defaults.

        Raises: InputError naming an unknown key or a value of the wrong type.
        """
        return typing.cast(Config, build(Config, values, ""))

    def with_first_values(self) -> "Config":
        """The configuration with the defaults of version 0.1.0 in place of options that are chosen
        for each task (None) and that 0.1.0 could not choose.
        """
        return dataclasses.replace(self, **{
            section: dataclasses.replace(options, **{
                name: value for name, value in values.items() if getattr(options, name) is None})
            for section, values in FIRST_VALUES.items()
            for options in [getattr(self, section)]})

    def work_hash(self) -> str:
        """A name for the work: equal for two configurations that learn the same thing.

        `compute` and the features' compression are left out, and so is where the data lies
        (`data.data` and its columns), which the data's fingerprint replaces.
        """
        work = named_sections(self)
        del work["compute"], work["data"]["data"], work["features"]["compression"]
        for column in ("image_column", "label_column"):
            work["data"].pop(column, None)
        return digest(work, 12)


def load_config(path: str | Path) -> Config:
    """The configuration of a YAML file, which has the sections of `Config` and their keys, all
    optional.

    Raises: InputError for a missing file, broken YAML, an unknown key or a wrong type.
    """
    return Config.of(load_sections(path))


def load_sections(path: str | Path) -> Sections:
    """The sections of a YAML file, as `load_config` reads them. What they leave open is still open,
    so that a command's own options can decide it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"configuration file {str(path)!r} cannot be read: {error.strerror}; "
                         "give the path of a YAML file") from error
    values = read_yaml(content, f"configuration file {str(path)!r}")
    if not isinstance(values, Mapping):
        sections = ", ".join(field.name for field in dataclasses.fields(Config))
        raise InputError(f"configuration file {str(path)!r} holds {type(values).__name__}; "
                         f"allowed: the sections {sections}")
    return typing.cast(Sections, build(Sections, values, ""))


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
    """One plain value as the annotated type. Raises: InputError that names the key."""
    if isinstance(kind, type) and hasattr(kind, "table"):  # StrategyName, BackboneName
        if not isinstance(value, str) or value not in kind.table:
            raise InputError(f"{key} is {value!r}; allowed: {kind.table.allowed()}")
        return value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} is {value!r}; allowed: a section with keys of "
                             f"{typing.cast(type, kind).__name__}")
        return build(kind, value, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        *others, last = [kind for kind in arguments if kind is not type(None)]
        for other in others:
            with contextlib.suppress(InputError):
                return _convert(other, value, key)
        return _convert(last, value, key)
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
