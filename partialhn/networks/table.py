"""The table of backbones by name; nothing here imports PyTorch.

Other packages add lines with `register_backbone` or with an entry point of the group
`partialhn.backbones`. Each line is a `partialhn.networks.backbone.Backbone`, or where one is, as
module:NAME; it is imported when it is used.
"""

from partialhn.plugins import Table

_RESNETS = "partialhn.networks.torchvision_resnets"
BACKBONES: Table[object] = Table("backbone", "partialhn.backbones", {
    "slim_resnet18": "partialhn.networks.slim_resnet18:SLIM_RESNET18",
    "resnet18": f"{_RESNETS}:RESNET18",
    "resnet34": f"{_RESNETS}:RESNET34",
    "resnet50": f"{_RESNETS}:RESNET50",
    "resnet101": f"{_RESNETS}:RESNET101",
    "resnet152": f"{_RESNETS}:RESNET152",
}, lambda _name, value: value)


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
