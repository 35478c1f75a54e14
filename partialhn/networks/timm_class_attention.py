"""Transformers of timm whose class token comes after blocks that see the patches alone.

CaiT (Touvron et al. 2021) and XCiT (El-Nouby et al. 2021) end with blocks of class attention. The
class token stands before the patches from the first of them on, and so the network can be cut
between them, too.

Legend: B batch, N tokens, C channels, H W spatial (in patches).
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.networks.division import Blocks, Piece, joined, shell, with_ending


def _with_class_token(parts: Any, z_BNC: Tensor) -> Tensor:
    return torch.cat([parts.cls_token.expand(len(z_BNC), -1, -1), z_BNC], 1)


def _normed_end(parts: Any, z_BNC: Tensor) -> Tensor:
    return cast(Tensor, parts.forward_head(parts.norm(z_BNC), pre_logits=True))


def _blocks(body: Any, stem: Piece, patches: Callable[[nn.Module], nn.Module], late: str,
            attention: Callable[[nn.Module], nn.Module]) -> Blocks:
    """A stem, blocks that see patches, and the child `late` of blocks that see a class token."""
    blocks: Blocks = {"stem": stem}
    for name, block in body.blocks.named_children():
        blocks[f"blocks.{name}"] = patches(block)
    token: nn.Module | None = Piece(shell(body, (), parameters=["cls_token"]), _with_class_token)
    for name, block in getattr(body, late).named_children():
        blocks[f"{late}.{name}"] = joined(token, attention(block))
        token = None
    return with_ending(blocks, Piece(shell(body, ("norm", "head_drop")), _normed_end))


def _cait_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    return cast(Tensor, parts.pos_drop(parts.patch_embed(images_BCHW) + parts.pos_embed))


def _token_only(block: Any, z_BNC: Tensor) -> Tensor:
    """A block that takes the patches and the class token apart, and gives the class token."""
    return torch.cat([block(z_BNC[:, 1:], z_BNC[:, :1]), z_BNC[:, 1:]], 1)


def cait(body: nn.Module) -> Blocks:
    """The blocks of a CaiT."""
    stem = shell(body, ("patch_embed", "pos_drop"), parameters=["pos_embed"])
    return _blocks(body, Piece(stem, _cait_stem), lambda block: block, "blocks_token_only",
                   lambda block: Piece(block, _token_only))


def _xcit_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    z_BNC, (height, width) = parts.patch_embed(images_BCHW)
    if parts.pos_embed is not None:
        z_BNC = z_BNC + parts.pos_embed(1, height, width).flatten(2).transpose(1, 2)
    return cast(Tensor, parts.pos_drop(z_BNC))


def _of_a_square(block: Any, z_BNC: Tensor) -> Tensor:
    """A block that takes the patches' height and width; images are square."""
    side = math.isqrt(z_BNC.shape[1])
    return cast(Tensor, block(z_BNC, side, side))


def xcit(body: nn.Module) -> Blocks:
    """The blocks of an XCiT."""
    stem = shell(body, ("patch_embed", "pos_embed", "pos_drop"))
    return _blocks(body, Piece(stem, _xcit_stem), lambda block: Piece(block, _of_a_square),
                   "cls_attn_blocks", lambda block: block)
