"""Binary columns: what a task adds to the generated weights, one bit a number.

For each generated tensor a task opens d columns, V_l (C, d) and A_l (D, d), weighed by its code.
While they are learned V_l is rounded to its signs and A_l to its signs times one scale a column,
its mean size, which is the least error (Rastegari et al. 2016); the gradient passes to the numbers
that were rounded as if they had not been (Bengio et al. 2013). When the task is learned the scales
go into its code and the numbers are gone: eight signs make a byte.

Legend: C output channels, D row length, d columns, L generated tensors, N numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CODE = 2.4
"""What a code starts from, times sqrt(d): A starts from zero, so it says how fast A learns."""
SPREAD = 0.03
"""Of the numbers behind V's first signs: small, so that some thirty steps may turn one."""


class Signs(torch.autograd.Function):
    """The signs of x; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        return signs(x_Nd)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


class Scaled(Signs):
    """x_Nd as signs times a scale for each column; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        return signs(x_Nd).mul_(scales(x_Nd))


def signs(x_Nd: Tensor) -> Tensor:
    """1 and, for what is less than zero, -1, in x's number type."""
    return (x_Nd >= 0).to(x_Nd.dtype).mul_(2).sub_(1)


def scales(x_Nd: Tensor) -> Tensor:
    """The scale of each column: (d,)."""
    return x_Nd.abs().mean(0)


def pack(signs: Tensor) -> Tensor:
    """Signs of any shape, in order, eight in a byte: uint8."""
    flat = nn.functional.pad((signs > 0).flatten(), (0, -signs.numel() % 8))
    return (flat.view(-1, 8) * _powers(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack` was given, as float32."""
    bits = packed[:, None].bitwise_and(_powers(packed.device)).ne(0)
    return bits.flatten()[:torch.Size(shape).numel()].view(*shape).float().mul_(2).sub_(1)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=device)


def packed_bytes(shapes: Sequence[tuple[int, int]], width: int) -> int:
    """Bytes of packed columns for tensors of the shapes (C, D)."""
    return -(-width * sum(map(sum, shapes)) // 8)


class Columns(nn.Module):
    """The columns of one task, for L >= 1 generated tensors of the shapes (C, D)."""

    packed: Tensor | None

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.shapes, self.width = tuple(shapes), width
        self.A = nn.ParameterList(torch.zeros(D, width) for _, D in shapes)
        self.v = nn.ParameterList(SPREAD * torch.randn(C, width) for C, _ in shapes)
        self.register_buffer("packed", None)
        """The signs of all V_l and A_l in turn, once the task is learned."""

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """V_l (C, d), signs, and A_l (D, d): with scales while learned, then signs too."""
        packed = self.packed
        if packed is None:
            return [(Signs.apply(v_Cd), Scaled.apply(A_Dd))
                    for v_Cd, A_Dd in zip(self.v, self.A, strict=True)]
        sides = [side for shape in self.shapes for side in shape]
        parts = iter(torch.split(unpack(packed, (sum(sides), self.width)), sides))
        return list(zip(parts, parts, strict=True))

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Keeps the signs alone; returns the scales that A loses, (L, d)."""
        pairs = list(zip(self.v, self.A, strict=True))
        self.packed = pack(signs(torch.cat([part for pair in pairs for part in pair])))
        lost_Ld = torch.stack([scales(A_Dd) for _, A_Dd in pairs])
        self.A, self.v = nn.ParameterList(), nn.ParameterList()
        return lost_Ld
