"""A task's network as the library's own network, so that its tensors keep that library's names.

Legend: K classes of a task.
"""

import torch
from torch import nn

from partialhn.checkpoints.model import Model
from partialhn.export.network import kind_of, linear_part, own_blocks
from partialhn.networks.backbone import Network, build_network, find_backbone
from partialhn.networks.head import HeadWeights


def own_network(model: Model, weights: HeadWeights) -> Network:
    """The backbone with K classes, a task's weights in place.

    Check `why_not` first. Raises: RuntimeError where tensors do not fit after all.
    """
    trunk, head = model.trunk, model.strategy.head
    network = build_network(trunk.name, len(weights.bias_K), input_size=trunk.input_size)
    network.set_normalisation(trunk.mean_C, trunk.std_C)
    blocks = list(network.blocks().values())
    for block, stage in zip(blocks, trunk.stages, strict=False):
        block.load_state_dict(stage.state_dict())
    if kind_of(head, weights).side is None:
        _fill(nn.Sequential(*blocks[trunk.freeze_depth:]), own_blocks(head, weights))
    weight_KF, bias_K = linear_part(head, weights)
    with torch.no_grad():
        network.classifier.weight.copy_(weight_KF)
        network.classifier.bias.copy_(bias_K)
    return network.eval().requires_grad_(False)


def _fill(above: nn.Sequential, own: nn.Sequential) -> None:
    """Loads the head's blocks into those of the library, whose norms may apply an activation."""
    state = {}
    for name, value in own.state_dict().items():
        owner, _, kind = name.rpartition(".")
        outer = owner.removesuffix(".0")
        if outer != owner and isinstance(above.get_submodule(outer), nn.BatchNorm2d):
            owner = outer
        state[f"{owner}.{kind}"] = value
    above.load_state_dict(state)


def why_not(model: Model, weights: HeadWeights) -> str:
    """The reason why a task's network is not the library's own; empty where it is."""
    trunk, head = model.trunk, model.strategy.head
    backbone = find_backbone(trunk.name)
    if backbone.replaced:
        return f"the classifiers of {trunk.name} are one here"
    if not backbone.call:
        return f"{trunk.name} is no network of another library"
    if weights.earlier is not None:
        return "this task's classifier sees the features of every block, not of the last alone"
    if kind_of(head, weights).side is not None:
        if trunk.freeze_depth == len(trunk.names):
            return ""
        return (f"this task's head is a linear classifier of the features after block "
                f"{trunk.names[trunk.freeze_depth - 1]}" if trunk.freeze_depth
                else "this task's head is a linear classifier of pixels")
    if any(module.__dict__.get("replaced") and isinstance(module, nn.GroupNorm)
           for module in head.blocks.modules()):
        return f"the head has norm {model.config.hypernet.norm} in place of batch norm"
    return ""
