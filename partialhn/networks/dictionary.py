"""A dictionary of directions: input sides of columns that the first tasks leave to later ones.

Tasks of a stream change the same input directions of a tensor. When the first tasks have columns of
their own, the dictionary is closed: for each generated tensor l it holds P_l (D, d), the d input
directions in which their updates V_lj diag(x_lj) A_lj^T are largest. Every later task owns only the
output sides V_lt of d columns, as signs, and the code that weighs them:

    W_l(t) = W_l(s) + V_lt diag(x_lt) P_l^T

P never changes again, so no task is forgotten, and later tasks depend on the dictionary and not on
each other. Most bytes of a column are its input side: in a convolution of 3x3, D is nine times the
number of input channels.

Legend: C output channels, D row length, d directions, L generated tensors, R rows of all updates,
N numbers, w columns of one task.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from partialhn.networks.columns import Modeless, pack_signs, scales, signs, unpack_signs

NO_DIRECTION = 1e-6
"""A direction that holds a smaller share than this of what the largest one holds is rounding."""
Update = tuple[Tensor, Tensor]
"""V diag(x) (C, w) and A (D, w): a task's update of a tensor is their product V diag(x) A^T."""


def principal_directions(updates: Sequence[Update], count: int) -> Tensor:
    """The `count` orthogonal directions that hold most of some tasks' updates of a tensor: (D, d).

    Every update counts alike, whatever its size; updates of zero count nothing. A direction has
    length sqrt(D), as a column of signs has. Columns of zeros follow where there are fewer
    directions. float32, on the CPU; computed in float64 from the small factors of the updates.
    """
    rows: list[Tensor] = []
    for v_Cw, A_Dw in updates:
        # The update is Q R A^T with orthonormal Q, so its input directions are those of R A^T.
        right = torch.linalg.qr(v_Cw.detach().cpu().double())[1]
        row_RD = right @ A_Dw.detach().cpu().double().T
        size = row_RD.norm()
        if size > 0:
            rows.append(row_RD / size)
    directions_Dd = torch.zeros(len(updates[0][1]), count)
    if rows:
        _, size_R, found_RD = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        kept = min(count, int((size_R > NO_DIRECTION * size_R[0]).sum()))
        directions_Dd[:, :kept] = len(directions_Dd) ** 0.5 * found_RD[:kept].T
    return directions_Dd


class Scaled(torch.autograd.Function):
    """Rounds x_Nd to its signs times one scale a column; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x_Nd: Tensor) -> Tensor:
        del ctx
        return signs(x_Nd).mul_(scales(x_Nd))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


class Dictionary(nn.Module):
    """The directions P_l of each generated tensor, as float16. No step changes them."""

    def __init__(self, shapes: Sequence[tuple[int, int]], width: int, openers: int) -> None:
        """openers: number of tasks with columns of their own."""
        super().__init__()
        self.width, self.count = width, len(shapes)
        self.register_buffer("openers", torch.tensor(openers))
        for index, (_, D) in enumerate(shapes):
            self.register_buffer(str(index), torch.zeros(D, width, dtype=torch.half))

    def forward(self) -> list[Tensor]:
        """P_l (D, d) of each tensor."""
        return [self.get_buffer(str(index)) for index in range(self.count)]

    @torch.no_grad()
    def fill(self, directions: Sequence[Tensor]) -> None:
        """Takes the directions of each tensor."""
        for own_Dd, direction_Dd in zip(self(), directions, strict=True):
            own_Dd.copy_(direction_Dd)


class OutputSides(Modeless):
    """The output sides V_l (C, d) of one task's columns, whose input sides are the dictionary's.

    While the task is learned V_l is rounded to its signs times one scale a column. When it is
    learned, the code takes over the scales and only the signs are kept, eight in a byte.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], dictionary: Dictionary) -> None:
        super().__init__()
        self.rows, self.width = [C for C, _ in shapes], dictionary.width
        self.v = nn.ParameterList(torch.zeros(C, self.width) for C in self.rows)
        self.register_buffer("packed", None)
        """Once the task is learned: the signs of V_1, V_2 and so on, as uint8."""
        # kept from nn.Module's registry: the directions are stored once, and not with each task
        self.__dict__["_dictionary"] = dictionary

    @classmethod
    def learned(cls, shapes: Sequence[tuple[int, int]], dictionary: Dictionary,
                packed: Tensor) -> Self:
        """The columns of a learned task, of a copy of its signs."""
        own = cls([], dictionary)
        own.rows, own.packed = [C for C, _ in shapes], packed.clone()
        return own

    def stacked(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The L matrices (C, D) that the task starts from, as `generate` takes them."""
        return tuple(rows)

    def generate(self, start: Sequence[Tensor], code: Tensor,
                 kernels: Sequence[tuple[int, ...]] | None = None) -> tuple[Tensor, ...]:
        """W_l + V_l diag(x_l) P_l^T in float32 while the task is learned. start: `stacked` W."""
        del kernels
        return tuple(torch.addmm(before_CD, Scaled.apply(v_Cd) * x_d, direction_Dd.to(x_d).T)
                     for before_CD, v_Cd, x_d, direction_Dd
                     in zip(start, self.v, code.view(-1, self.width), self.directions,
                            strict=True))

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """V_l (C, d) and P_l (D, d) of each tensor of a learned task; V_l are plain signs."""
        assert self.packed is not None, "the task is not learned yet"
        sides = torch.split(unpack_signs(self.packed, (sum(self.rows), self.width)), self.rows)
        return list(zip(sides, self.directions, strict=True))

    @property
    def directions(self) -> list[Tensor]:
        """P_l (D, d) of each tensor."""
        directions: list[Tensor] = self.__dict__["_dictionary"]()
        return directions

    @torch.no_grad()
    def pack(self) -> Tensor:
        """Keeps only the signs; returns the scales, which the code must take over: (L, d)."""
        scales_Ld = torch.stack([scales(v_Cd) for v_Cd in self.v])
        self.packed = pack_signs(signs(torch.cat(list(self.v))))
        self.v = nn.ParameterList()
        return scales_Ld
