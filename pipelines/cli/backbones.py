"""The command `partialhn backbones`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
from typing import Annotated, Any

import tyro

from partialhn.config import BackboneConfig, DataConfig, FeatureConfig, FeatureDtype
from partialhn.errors import InputError
from partialhn.networks.table import expected_size


@dataclasses.dataclass(frozen=True)
class Backbones:
    """List the networks, or for one of them the depths at which it can be cut.

    Without a name it says where networks come from. With a pattern, such as 'timm:*dinov3*', it
    lists the names that match. With a name it shows for each depth the last frozen block, the shape
    and bytes of an image's features, the frozen share of multiply-adds, and the number of weights
    that the hypernetwork generates for each task.
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="STR")] = None
    """A backbone, or a pattern of names."""
    input_size: int | None = None
    """Side of the square images, in pixels; default: the size that the weights of the network's
    library were trained with, otherwise that of train."""
    feature_dtype: FeatureDtype = FeatureConfig.feature_dtype
    """Number type of the stored features, for their bytes."""
    generate: str = "all"
    """Which matrices are generated, as for train."""

    def run(self) -> int:
        if self.name is None:
            print(_sources())
            return 0
        if any(character in self.name for character in "*?["):
            return self._list()
        from partialhn.features.codec import number_type
        from partialhn.networks.backbone import build_network
        from partialhn.networks.depths import depths_of, parameter_count
        from partialhn.numbers import percent, size
        from pipelines.platform.text import table

        BackboneConfig(backbone=self.name)  # refuses an unknown name
        pixels = self.input_size or expected_size(self.name, "")
        DataConfig(input_size=pixels)
        network = build_network(self.name, 2, input_size=pixels)
        itemsize = number_type(self.feature_dtype).tensor.itemsize
        rows = [["depth", "last frozen block", "features", "bytes an image", "frozen multiply-adds",
                 "generated weights"]]
        rows += [[str(depth.depth), depth.name, _shape(depth.shape_CHW, network.backbone.layout),
                  size(depth.numbers * itemsize), percent(depth.frozen_share),
                  f"{depth.generated:,}"] for depth in depths_of(network, self.generate)]
        classifier = parameter_count(network.classifier)
        print(f"{self.name}: {parameter_count(network.body) - classifier:,} weights without its "
              f"classifier, images of {pixels}x{pixels} pixels")
        print("\n".join(table(rows)))
        print(f"Bytes are those of one view as {self.feature_dtype}; --views multiplies them. "
              "--freeze-depth takes a depth, a block, or a share such as 75%.")
        return 0

    def _list(self) -> int:
        from partialhn.networks.depths import known_backbones

        names = known_backbones(str(self.name))
        if not names:
            raise InputError(f"backbone is {self.name!r}, which matches no name; allowed: a "
                             "pattern such as 'timm:*dinov3*' or 'torchvision:*'")
        print("\n".join(names))
        return 0


def _shape(shape_CHW: tuple[int, int, int], layout: str) -> str:
    """C x H x W, or for tokens their number and width."""
    channels, height, width = shape_CHW
    if layout == "BNC" and width == 1 and height > 1:
        return f"{height} tokens x {channels}"
    return f"{channels}x{height}x{width}"


def _sources() -> str:
    from partialhn.networks.table import BACKBONES

    return "\n".join((
        "frozen up to one of four stages: " + ", ".join(BACKBONES),
        "frozen up to any block: partialhn:slim_resnet18, torchvision:NAME, timm:NAME",
        "  partialhn backbones 'torchvision:*'         lists names that match a pattern",
        "  partialhn backbones timm:tf_efficientnet_lite0   shows the depths of one network"))


COMMANDS: dict[str, Any] = {"backbones": Backbones}
