"""The backbones timm:NAME: the classifiers of the library timm, cut at every block.

timm is an extra of this package: pip install 'partialhn[timm]'.

Legend: B batch, C channels, H W spatial, N tokens, F features before the classifier.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Backbone
from partialhn.networks.division import (
    Blocks,
    Family,
    Piece,
    is_classifier,
    joined,
    residual_blocks,
    shell,
    with_ending,
    with_linear_classifier,
    with_one_classifier,
    without_chance,
    without_classifiers,
)
from partialhn.networks.timm_class_attention import cait, xcit
from partialhn.networks.traced import Plan, plan_of


def _vit_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    z_BNC = parts.patch_drop(parts._pos_embed(parts.patch_embed(images_BCHW)))
    return cast(Tensor, parts.norm_pre(z_BNC))


def _normed_end(parts: Any, z: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(parts.norm(z), pre_logits=True))


STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "rope")
TRANSFORMER_END = ("norm", "attn_pool", "fc_norm", "head_drop")


def _transformer(body: nn.Module, stem: Callable[[Any, Tensor], Tensor],
                 ending: Piece | None = None) -> Blocks:
    """A stem, the blocks, and a norm and pooling that belong to the last one."""
    blocks: Blocks = {"stem": Piece(shell(body, STEM, parameters=True), stem)}
    for name, block in cast(nn.Module, body.blocks).named_children():
        blocks[f"blocks.{name}"] = block
    return with_ending(blocks, ending or Piece(shell(body, TRANSFORMER_END), _normed_end))


def _vit(body: nn.Module) -> Blocks:
    return _transformer(body, _vit_stem)


def _distilled_end(parts: Any, z_BNC: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(parts.norm(z_BNC)))


def _distilled(body: nn.Module) -> Blocks:
    """ViTs that learned from another network's answers, with a token and a classifier for them."""
    parts = without_classifiers(body, TRANSFORMER_END, ("head", "head_dist"))
    return _transformer(body, _vit_stem, Piece(parts, _distilled_end))


def _beit_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    z_BNC = parts.patch_embed(images_BCHW)
    z_BNC = torch.cat([parts.cls_token.expand(len(z_BNC), -1, -1), z_BNC], 1)
    return cast(Tensor, parts.pos_drop(z_BNC if parts.pos_embed is None
                                       else z_BNC + parts.pos_embed))


def _beit(body: Any) -> Blocks:
    """BEiT, whose blocks have the positions of patches relative to each other."""
    if body.rel_pos_bias is not None:
        raise InputError("a network of timm's class Beit cannot be cut where its blocks share one "
                         "table of relative positions; allowed: one whose blocks have their own")
    return _transformer(body, _beit_stem)


def _rotary_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    z_BNC, _ = parts._pos_embed(parts.patch_embed(images_BCHW))
    return cast(Tensor, parts.norm_pre(z_BNC))


class RotaryBlock(nn.Module):
    """A transformer block with the rotary positions of the network's patches.

    Args:
        block: the block, which takes positions as `rope`.
        rope: the positions' sines and cosines.
        learned: whether positions are weights, which a checkpoint must hold.
    """

    def __init__(self, block: nn.Module, rope: Tensor, learned: bool) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("rope", rope, persistent=learned)

    def forward(self, z_BNC: Tensor) -> Tensor:
        return cast(Tensor, self.block(z_BNC, rope=self.rope))


@torch.no_grad()
def _rotary(body: Any) -> Blocks:
    """Transformers of timm's class Eva, such as EVA and DINOv3; most have rotary positions."""
    first = shell(body, STEM, parameters=True)
    blocks: Blocks = {"stem": Piece(first, _rotary_stem)}
    training = body.training
    body.eval()  # while it trains, the positions of some are changed at random
    size = body.patch_embed.img_size
    pixels = torch.zeros(1, 3, *size, device=next(body.parameters()).device)
    _, rope = body._pos_embed(body.patch_embed(pixels))
    body.train(training)
    mixed = bool(getattr(body, "rope_mixed", False))
    for index, (name, block) in enumerate(body.blocks.named_children()):
        own = rope if rope is None or not mixed else rope[index]
        blocks[f"blocks.{name}"] = block if own is None else RotaryBlock(block, own, mixed)
    return with_ending(blocks, Piece(shell(body, TRANSFORMER_END), _normed_end))


def _convnext_end(parts: Any, z_BCHW: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(parts.norm_pre(z_BCHW), pre_logits=True))


def _headless(body: nn.Module, *children: str) -> nn.Module:
    """The children and `head` of a body, without the head's linear classifier."""
    parts = shell(body, children)
    head = cast(nn.Module, body.head)
    parts._modules["head"] = shell(head, [name for name in head._modules if name != "fc"])
    return parts


def _staged(body: nn.Module, stem: str, stages: str) -> Blocks:
    """A stem and stages of blocks; what makes a map smaller belongs to the block after it."""
    blocks: Blocks = {"stem": cast(nn.Module, getattr(body, stem))}
    for stage, part in cast(nn.Module, getattr(body, stages)).named_children():
        before: nn.Module | None = cast(nn.Module, part.downsample)
        for name, block in cast(nn.Module, part.blocks).named_children():
            blocks[f"{stages}.{stage}.blocks.{name}"] = joined(before, block)
            before = None
    return blocks


def _convnext(body: nn.Module) -> Blocks:
    return with_ending(_staged(body, "stem", "stages"),
                       Piece(_headless(body, "norm_pre"), _convnext_end))


def _swin(body: nn.Module) -> Blocks:
    return with_ending(_staged(body, "patch_embed", "layers"),
                       Piece(_headless(body, "norm"), _normed_end))


def _pooled_end(parts: Any, z_BCHW: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(z_BCHW, pre_logits=True))


def _inverted(body: nn.Module) -> Blocks:
    stem = [cast(nn.Module, getattr(body, name)) for name in ("conv_stem", "bn1")]
    blocks: Blocks = {"stem": nn.Sequential(*stem)}
    for stage, part in cast(nn.Module, body.blocks).named_children():
        for name, block in part.named_children():
            blocks[f"blocks.{stage}.{name}"] = block
    return blocks


def _efficientnet(body: nn.Module) -> Blocks:
    blocks = _inverted(body)
    blocks["conv_head"] = joined(cast(nn.Module, body.conv_head), cast(nn.Module, body.bn2))
    return with_ending(blocks, Piece(shell(body, ["global_pool"]), _pooled_end))


def _mobilenetv3(body: nn.Module) -> Blocks:
    parts = shell(body, ["global_pool", "conv_head", "norm_head", "act2", "flatten"])
    return {**_inverted(body), "conv_head": Piece(parts, _pooled_end)}


def _resnet(body: nn.Module) -> Blocks:
    return with_ending(residual_blocks(body), Piece(shell(body, ["global_pool"]), _pooled_end))


FAMILIES = {
    "VisionTransformer": Family(_vit, "BNC", takes_size=True),
    "VisionTransformerDistilled": Family(_distilled, "BNC", takes_size=True),
    "Cait": Family(cait, "BNC", takes_size=True),
    "Xcit": Family(xcit, "BNC", takes_size=True),
    "Beit": Family(_beit, "BNC", takes_size=True),
    "Eva": Family(_rotary, "BNC", takes_size=True),
    "ConvNeXt": Family(_convnext),
    "EfficientNet": Family(_efficientnet),
    "MobileNetV3": Family(_mobilenetv3),
    "ResNet": Family(_resnet),
    "SwinTransformer": Family(_swin, "BHWC", takes_size=True),
}
"""How the networks of a class of timm are divided."""


def timm() -> Any:
    """The library. Raises: InputError where it is not installed."""
    try:
        import timm as library
    except ImportError as error:
        raise InputError("a backbone or trunk of timm needs the library timm, which is not "
                         "installed; install it with: pip install 'partialhn[timm]'") from error
    return library


@functools.cache
def find(name: str) -> Backbone:
    """The backbone timm:NAME. Raises: InputError for a name that cannot be cut."""
    library = timm()
    if not library.is_model(name):
        near = difflib.get_close_matches(name, library.list_models(), 3)
        raise InputError(f"backbone is 'timm:{name}', which timm {library.__version__} does not "
                         f"have; "
                         + (f"near it: {', '.join(near)}" if near else "no name is near it")
                         + "; `partialhn backbones 'timm:*'` lists all")
    with torch.device("meta"):  # a structure without numbers
        body = library.create_model(name, pretrained=False, num_classes=2)
    settings = library.get_pretrained_cfg(name)
    classifiers = _classifiers(name)
    modules = dict(body.named_modules())
    if not _can_be_one(body, [modules.get(each) for each in classifiers]):
        raise InputError(f"backbone is 'timm:{name}', a {type(body).__name__} whose classifier is "
                         f"{settings.classifier!r}; allowed: a network of timm with one linear "
                         "classifier, or one for classes and one for distillation")
    classifier, others = classifiers[0], classifiers[1:]
    family = FAMILIES.get(_class_of(body))
    takes_size = family.takes_size if family else bool(settings.fixed_input_size)
    size = ", img_size={size}" if takes_size else ""
    recipe = f"timm.create_model('{name}', num_classes={{classes}}{size})" if not others else ""
    if family:
        return Backbone(functools.partial(_build, name, takes_size), family.blocks, classifier,
                        family.layout, recipe, others)
    plan = _plan(body, name, settings.input_size[-1])
    return Backbone(functools.partial(_build_traced, name, takes_size, plan),
                    functools.partial(plan.divide, classifiers=classifiers), classifier,
                    plan.layout, recipe, others)


def _classifiers(name: str) -> tuple[str, ...]:
    """The names of a network's classifiers in it."""
    given = timm().get_pretrained_cfg(name).classifier
    return tuple(given) if isinstance(given, list | tuple) else (given,) if given else ()


def _can_be_one(body: nn.Module, layers: Sequence[nn.Module | None]) -> bool:
    """Whether a network's answer is one linear layer, or the mean of a distilled network's two."""
    if len(layers) == 1:
        return is_classifier(layers[0])
    return (len(layers) == 2 and hasattr(body, "set_distilled_training")
            and all(isinstance(layer, nn.Linear) for layer in layers))


def _plan(body: nn.Module, name: str, size: int) -> Plan:
    """The division of a network of a class that `FAMILIES` lacks."""
    try:
        return plan_of(body, f"timm:{name}", size)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise InputError(f"backbone is 'timm:{name}', a {type(body).__name__}, whose blocks are "
                         f"not found: {type(error).__name__}: {error}; allowed: the classes "
                         f"{', '.join(FAMILIES)} of timm, or one whose blocks follow one another"
                         ) from error


def _build_traced(name: str, takes_size: bool, plan: Plan, classes: int,
                  input_size: int) -> nn.Module:
    with torch.device("meta"):
        structure = _build(name, takes_size, classes, input_size)
    try:
        holds = plan.holds(structure, input_size)
    except (AssertionError, RuntimeError) as error:
        raise _no_such_size(name, input_size, error) from error
    if not holds:
        raise InputError(f"backbone timm:{name} cannot be cut for input_size {input_size}, where "
                         "it calculates between its blocks; allowed: the size of its weights, "
                         f"{timm().get_pretrained_cfg(name).input_size[-1]}, or another one")
    return _build(name, takes_size, classes, input_size)


def _class_of(body: nn.Module) -> str:
    """The class that the family is found by: the body's own, or a base class of timm's."""
    names = [kind.__name__ for kind in type(body).__mro__]
    return next((name for name in names if name in FAMILIES), names[0])


def _build(name: str, takes_size: bool, classes: int, input_size: int) -> nn.Module:
    options = {"img_size": input_size} if takes_size else {}
    try:
        body = timm().create_model(name, pretrained=False, num_classes=classes, **options)
        patch = getattr(getattr(body, "patch_embed", None), "patch_size", 1) if takes_size else 1
        width = patch[0] if isinstance(patch, tuple) else patch
        if input_size % width:
            raise ValueError(f"its patches are {width} pixels wide")
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise _no_such_size(name, input_size, error) from error
    names = _classifiers(name)
    if len(names) > 1:
        return without_chance(with_one_classifier(body, names))
    return without_chance(with_linear_classifier(body, names[0]))


def _no_such_size(name: str, input_size: int, error: Exception) -> InputError:
    return InputError(f"backbone timm:{name} cannot be built for input_size {input_size}: "
                      f"{type(error).__name__}: {error}; allowed: a multiple of its patches, or "
                      f"the size of its weights, "
                      f"{timm().get_pretrained_cfg(name).input_size[-1]}")
