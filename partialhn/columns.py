"""Ternary columns: what a task adds to the generated weights, in 1.6 bits a number.

For each generated tensor a task opens d columns, V_l (C, d) and A_l (D, d). While it is learned
each of them is rounded to -1, 0 or 1 times one scale, and the gradient passes to the numbers that
were rounded as if they had not been (Bengio et al. 2013; ternary weights: Li et al. 2016). When
it is learned the scales go into the task's code, the numbers are gone, and five ternary digits
make a byte.

Legend: C output channels, D row length, d columns, L generated tensors, N numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SCALE = 1.2240
"""Scale over root mean square: the least error for normally distributed numbers (Max 1960, three
levels; the threshold between them is half of it)."""
DIGITS = 5
"""In a byte: 3^5 = 243 of its 256 values."""
START = 3.0
"""Spread of V's first numbers, times sqrt(d): A starts from zero, so V says how fast A learns."""


class Ternary(torch.autograd.Function):
    """x_Nd as digits times a scale for each column; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        digits_Nd, scale_d = rounded(x_Nd)
        return digits_Nd.mul_(scale_d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


def rounded(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """Digits -1, 0 or 1 in x's number type, and the scale of each column."""
    scale_d = x_Nd.square().mean(0).sqrt_().mul_(SCALE)
    smallest = torch.finfo(x_Nd.dtype).tiny  # a column of zeros has digits 0, not 0 / 0
    return (x_Nd / scale_d.clamp_min(smallest)).round_().clamp_(-1, 1), scale_d


def pack(digits: Tensor) -> Tensor:
    """Digits of any shape, in order, five in a byte: uint8."""
    flat = digits.flatten().to(torch.int16) + 1
    flat = nn.functional.pad(flat, (0, -len(flat) % DIGITS))
    return (flat.view(-1, DIGITS) * _powers(flat.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack` was given, as float32."""
    places = packed.to(torch.int16)[:, None] // _powers(packed.device) % 3
    return places.flatten()[:torch.Size(shape).numel()].view(*shape).float() - 1


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([3 ** place for place in range(DIGITS)], dtype=torch.int16, device=device)


def packed_bytes(shapes: Sequence[tuple[int, int]], width: int) -> int:
    """Bytes of packed columns for tensors of the shapes (C, D)."""
    return -(-width * sum(map(sum, shapes)) // DIGITS)


class Columns(nn.Module):
    """The columns of one task, for L >= 1 generated tensors of the shapes (C, D)."""

    packed: Tensor | None

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.shapes, self.width = tuple(shapes), width
        self.A = nn.ParameterList(torch.zeros(D, width) for _, D in shapes)
        self.v = nn.ParameterList(torch.randn(C, width) * START * width ** -0.5
                                  for C, _ in shapes)
        self.register_buffer("packed", None)
        """The digits of all V_l and A_l in turn, once the task is learned."""

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """V_l (C, d) and A_l (D, d): with their scales while they are learned, then digits."""
        packed = self.packed
        if packed is None:
            return [(Ternary.apply(v_Cd), Ternary.apply(A_Dd))
                    for v_Cd, A_Dd in zip(self.v, self.A, strict=True)]
        sides = [side for shape in self.shapes for side in shape]
        parts = iter(torch.split(unpack(packed, (sum(sides), self.width)), sides))
        return list(zip(parts, parts, strict=True))

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Keeps the digits alone; returns the scales that they lose, (L, d)."""
        digits, scales = [], []
        for v_Cd, A_Dd in zip(self.v, self.A, strict=True):
            (of_v, v_scale_d), (of_A, A_scale_d) = rounded(v_Cd), rounded(A_Dd)
            digits += [of_v, of_A]
            scales.append(v_scale_d * A_scale_d)
        self.packed = pack(torch.cat(digits))
        self.A, self.v = nn.ParameterList(), nn.ParameterList()
        return torch.stack(scales)
