"""Binary columns: a task's own addition to the generated weights, stored with one bit a number.

For each generated tensor a task has d columns, V_l (C, d) and A_l (D, d), weighted by its code.
During training V_l is rounded to its signs, and A_l to its signs times one scale a column. That
scale is the column's mean absolute value, which gives the smallest error (Rastegari et al. 2016).
The gradient passes through the rounding unchanged (Bengio et al. 2013). When the task is learned,
its code takes over the scales and only the signs are kept, eight in a byte.

Legend: C output channels, D row length, d columns, L generated tensors, N numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CODE = 2.4
"""Initial value of each number of a code, times sqrt(d). A starts from zero, so this value decides
how fast A learns."""
SPREAD = 0.03
"""Standard deviation of the numbers from which V's first signs are taken: small enough that about
thirty training steps can change a sign."""


class Signs(torch.autograd.Function):
    """Rounds x_Nd to its signs; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        return signs(x_Nd)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


class Scaled(Signs):
    """Rounds x_Nd to its signs times one scale a column; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        return signs(x_Nd).mul_(scales(x_Nd))


def signs(x_Nd: Tensor) -> Tensor:
    """The signs of x_Nd, in its number type: -1 for numbers below zero, otherwise 1."""
    return (x_Nd >= 0).to(x_Nd.dtype).mul_(2).sub_(1)


def scales(x_Nd: Tensor) -> Tensor:
    """The scale of each column, its mean absolute value: (d,)."""
    return x_Nd.abs().mean(0)


def pack_signs(signs: Tensor) -> Tensor:
    """Packs signs of any shape, in order, eight in a byte: a flat uint8 tensor."""
    flat = nn.functional.pad((signs > 0).flatten(), (0, -signs.numel() % 8))
    return (flat.view(-1, 8) * _powers(flat.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Restores the signs that `pack_signs` packed, as float32 in the given shape."""
    bits = packed[:, None].bitwise_and(_powers(packed.device)).ne(0)
    return bits.flatten()[:torch.Size(shape).numel()].view(*shape).float().mul_(2).sub_(1)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)


def packed_bytes(shapes: Sequence[tuple[int, int]], width: int) -> int:
    """Bytes of a task's packed columns, `width` for each tensor of the shapes (C, D)."""
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
        """Once the task is learned: the signs of V_1, A_1, V_2, A_2 and so on, as uint8."""

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """V_l (C, d) and A_l (D, d) of each tensor: V_l signs, A_l scaled signs.

        Once the task is learned, A_l too are plain signs: their scales are in the task's code.
        """
        packed = self.packed
        if packed is None:
            return [(Signs.apply(v_Cd), Scaled.apply(A_Dd))
                    for v_Cd, A_Dd in zip(self.v, self.A, strict=True)]
        sides = [side for shape in self.shapes for side in shape]
        matrices = iter(torch.split(unpack_signs(packed, (sum(sides), self.width)), sides))
        return list(zip(matrices, matrices, strict=True))  # V_1 with A_1, V_2 with A_2, ...

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Keeps only the signs; returns the scales of A, which the code must take over: (L, d)."""
        pairs = list(zip(self.v, self.A, strict=True))
        self.packed = pack_signs(signs(torch.cat([matrix for pair in pairs for matrix in pair])))
        scales_Ld = torch.stack([scales(A_Dd) for _, A_Dd in pairs])
        self.A, self.v = nn.ParameterList(), nn.ParameterList()
        return scales_Ld
