"""The table of backbones by name; nothing here imports PyTorch.

Other packages add lines with `register_backbone` or with an entry point of the group
`partialhn.backbones`. Each line is a `partialhn.networks.backbone.Backbone`, or where one is, as
module:NAME; it is imported when it is used.

A name such as timm:NAME is looked up in a source: another library's models, or this package's own
cut at every block. A name without a source is one of the networks of 0.1.0. These are cut at four
stages, so that depths 0 to 4 of stored configurations, features and models keep their meaning.
"""

from collections.abc import Callable
from typing import cast

from partialhn.plugins import Table, load_object

SOURCES = {
    "partialhn": "partialhn.networks.slim_resnet18:find",
    "timm": "partialhn.networks.timm_models:find",
    "torchvision": "partialhn.networks.torchvision_models:find",
}
"""Where a source is: a function of a name without its source that gives a `Backbone`."""
PLAIN_SIZE = 32
"""Side of the images, in pixels, of a trunk that is trained here."""


class BackboneTable(Table[object]):
    """The table of backbones, and the sources that are asked by prefix."""

    def __getitem__(self, name: str) -> object:
        source, colon, rest = name.partition(":")
        if colon and rest and source in SOURCES:
            return SOURCES[source]
        return super().__getitem__(name)

    patterns = tuple(f"{source}:NAME" for source in SOURCES)


_RESNETS = "partialhn.networks.torchvision_resnets"
BACKBONES = BackboneTable("backbone", "partialhn.backbones", {
    "slim_resnet18": "partialhn.networks.slim_resnet18:SLIM_RESNET18",
    "resnet18": f"{_RESNETS}:RESNET18",
    "resnet34": f"{_RESNETS}:RESNET34",
    "resnet50": f"{_RESNETS}:RESNET50",
    "resnet101": f"{_RESNETS}:RESNET101",
    "resnet152": f"{_RESNETS}:RESNET152",
}, lambda _name, value: value)


def cut_at_every_block(name: str) -> bool:
    """Whether a network is cut at every block, as those with a source are, or at four stages."""
    return ":" in name


def begins_elsewhere(name: str, trunk: str) -> bool:
    """Whether a network begins with weights that were trained elsewhere and is cut at every block:
    tasks and images then are as these weights want them, where nobody says otherwise.
    """
    return trunk != "train" and cut_at_every_block(name)


def expected_size(name: str, trunk: str) -> int:
    """Side of the images, in pixels, where nobody says it: that of the weights of a trunk that was
    trained elsewhere, where the network is cut at every block. Networks of 0.1.0 keep its default.

    Raises: InputError where the library of the network is not installed.
    """
    if not begins_elsewhere(name, trunk):
        return PLAIN_SIZE
    of_weights = cast(Callable[[str, str], int], load_object(
        "partialhn.networks.sizes:expected_size", "the size of a network's images"))
    return of_weights(name, trunk)


def cut_unit(name: str) -> str:
    """The word for one step of a network's freeze depth: stage or block."""
    return "block" if cut_at_every_block(name) else "stage"


def register_backbone(name: str, source: object) -> None:
    """Makes a backbone known in this process under a name.

    Args:
        name: the name that `backbone` takes.
        source: a `partialhn.networks.backbone.Backbone`, or where one is, as module:NAME.

    Other processes, as the workers of a cluster, do not see it: there the package must declare an
    entry point of the group `partialhn.backbones`.

    Raises: InputError for a name that is taken.
    """
    BACKBONES.register(name, source)
