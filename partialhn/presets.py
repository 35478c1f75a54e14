"""Known configurations by name; each says its command, what it takes and what to expect."""

from partialhn.config import (
    BackboneConfig,
    ComputeConfig,
    Config,
    DataConfig,
    FeatureConfig,
    HypernetConfig,
    Sections,
    TrainConfig,
)
from partialhn.errors import InputError

NOISY = ("none", "solarise", "blur", "grey+blur+autocontrast")
"""The corruptions of the paper's noisy stream, one a task."""

DEPTH_3 = BackboneConfig(freeze_depth=3, trunk_epochs=15)
"""Presets give their passes, so that their recorded results stay what they are."""

EFFICIENTNET = BackboneConfig(
    backbone="timm:tf_efficientnet_lite0", trunk="package:efficientnet-lite0", freeze_depth=12)
"""A small trunk, trained on ImageNet, whose weights come from a package and need no network; cut
after block blocks.4.2."""

PRESETS: dict[str, Sections] = {
    # partialhn train --preset digits
    # scikit-learn's handwritten digits, 5 tasks of 2 classes, with both baselines: the demo.
    "digits": Sections(
        DataConfig(data="digits", tasks=5, input_size=16),
        BackboneConfig(freeze_depth=3, trunk_epochs=15, trunk_batch_size=32),
        FeatureConfig(views=3, augment="crop"),
        HypernetConfig(),
        TrainConfig(epochs=15, batch_size=32, compare=("separate_heads", "naive")),
        ComputeConfig(threads=1)),
    # partialhn train --preset split-cifar10 --data CIFAR10_FOLDER
    # 5 tasks of 2 classes.
    "split-cifar10": Sections(
        DataConfig(tasks=5), DEPTH_3, FeatureConfig(views=4),
        HypernetConfig(), TrainConfig(epochs=10)),
    # partialhn train --preset split-cifar100 --data CIFAR100_FOLDER
    # 20 tasks of 5 classes, as in the paper.
    "split-cifar100": Sections(
        DataConfig(tasks=20), DEPTH_3, FeatureConfig(views=4),
        HypernetConfig(), TrainConfig(epochs=10)),
    # partialhn train --preset split-tiny-imagenet --data TINY_IMAGENET_32_FOLDER
    # 20 tasks of 10 classes, as in the paper.
    "split-tiny-imagenet": Sections(
        DataConfig(tasks=20), DEPTH_3, FeatureConfig(views=4),
        HypernetConfig(fresh_columns=64), TrainConfig(epochs=10, buffer=400)),
    # partialhn train --preset noisy-cifar --data CIFAR100_FOLDER
    # The paper's noisy stream: 4 tasks of 5 classes, of the first 20 classes of any data set.
    "noisy-cifar": Sections(
        DataConfig(tasks=4, classes=20, task_transforms=NOISY), DEPTH_3,
        FeatureConfig(views=4), HypernetConfig(fresh_columns=32), TrainConfig(epochs=10)),
    # partialhn train --preset domain-cifar10 --data CIFAR10_FOLDER
    # The same ten classes in 4 tasks whose images change as those of the noisy stream do.
    "domain-cifar10": Sections(
        DataConfig(stream="domains", task_transforms=NOISY), DEPTH_3,
        FeatureConfig(views=4), HypernetConfig(), TrainConfig(epochs=10)),
    # partialhn train --preset split-tiny-imagenet-5x10 --data TINY_IMAGENET_32_FOLDER
    # The first 50 classes at 32x32 as 5 tasks of 10, with both baselines.
    "split-tiny-imagenet-5x10": Sections(
        DataConfig(tasks=5, classes=50), DEPTH_3, FeatureConfig(views=4),
        HypernetConfig(fresh_columns=64),
        TrainConfig(epochs=10, compare=("separate_heads", "naive"))),
    # partialhn train --preset pretrained-tiny-imagenet --data TINY_IMAGENET_FOLDER
    # The first 50 classes as 5 tasks of 10, on a trunk that was trained on ImageNet.
    "pretrained-tiny-imagenet": Sections(
        DataConfig(tasks=5, classes=50, class_order="given", input_size=128), EFFICIENTNET,
        FeatureConfig(), HypernetConfig(fresh_columns=48), TrainConfig(epochs=10)),
    # partialhn train --preset pretrained-cifar10 --data CIFAR10_FOLDER
    # 5 tasks of 2 classes, on a trunk that was trained on ImageNet.
    "pretrained-cifar10": Sections(
        DataConfig(tasks=5, class_order="given", input_size=128), EFFICIENTNET,
        FeatureConfig(), HypernetConfig(fresh_columns=48), TrainConfig(epochs=10)),
}


def preset(name: str) -> Config:
    """A preset by name. Raises: InputError listing those there are."""
    return Config.of(preset_sections(name))


def preset_sections(name: str) -> Sections:
    """The sections of a preset. What they leave open is still open, so that a command's own options
    can decide it. Raises: InputError as `preset`.
    """
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]
