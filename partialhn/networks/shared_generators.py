"""Generators with parameters shared by all tasks, and the regulariser against their drift.

    W_l(t)[c, :] = base_l[c, :] + A_l z_l(t, c) + b_l

bilinear: z_l(t, c) = x_lt * v_lc; additive: z_l(t, c) = [mlp(e_t) ; v_lc].

A code belongs to one task and is frozen with it; A, b, v (and the mlp) are shared. With a star for
values at the start of the experience, and u = [z ; z - z* ; 1],

    W - W* = M u,   M = [A - A* | A* | b - b*],   sum over t, c of |M u|^2 = <M^T M, S>,

where S = sum over t, c of u u^T has a closed form whose cost hardly depends on the number of tasks.
So every step regularises all earlier tasks without generating any of their weights.

Legend: C output channels (rows), D row length, R row-code length, d columns, L generated tensors,
T earlier tasks.
"""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.networks.hypernet import GeneratedTensor, Generator, Rows


class DriftEnergy(torch.autograd.Function):
    """<M^T M, S> with M = [dA | A* | db]: the squared change of the earlier tasks' weights.

    dA_DR and db_D are the changes of A and b since the snapshot, A_star_DR is A at the snapshot and
    gram_RR = A*^T A* is constant. S_UU is symmetric, with U = 2 R + 1 rows in the order z, z - z*,
    1. Returns a scalar; dA, db and S get gradients. Computed by blocks, it takes four products of
    D R^2 (two forward, two backward). It never subtracts two large, nearly equal numbers, as
    A z - A* z* would.
    """

    @staticmethod
    def forward(ctx: Any, dA_DR: Tensor, db_D: Tensor, S_UU: Tensor, A_star_DR: Tensor,
                gram_RR: Tensor) -> Tensor:
        R = dA_DR.shape[1]
        # G = M^T M by blocks: rows and columns 0..R belong to dA, R..2R to A*, the last to db
        G_UU = torch.empty_like(S_UU)
        G_UU[:R, :R] = dA_DR.T @ dA_DR
        G_UU[:R, R:-1] = dA_DR.T @ A_star_DR
        G_UU[R:-1, :R] = G_UU[:R, R:-1].T
        G_UU[R:-1, R:-1] = gram_RR
        G_UU[:R, -1] = G_UU[-1, :R] = dA_DR.T @ db_D
        G_UU[R:-1, -1] = G_UU[-1, R:-1] = A_star_DR.T @ db_D
        G_UU[-1, -1] = db_D @ db_D
        ctx.save_for_backward(dA_DR, db_D, S_UU, A_star_DR, G_UU)
        return (G_UU * S_UU).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dA_DR, db_D, S_UU, A_star_DR, G_UU = ctx.saved_tensors
        # d<M^T M, S>/dM = 2 M S (S is symmetric), of which only the dA and db columns are needed
        R, gradient = dA_DR.shape[1], gradients[0]
        to_dA = dA_DR @ S_UU[:R, :R]
        to_dA.addmm_(A_star_DR, S_UU[R:-1, :R]).addr_(db_D, S_UU[:R, -1])
        to_db = dA_DR @ S_UU[:R, -1] + A_star_DR @ S_UU[R:-1, -1] + db_D * S_UU[-1, -1]
        return 2 * gradient * to_dA, 2 * gradient * to_db, gradient * G_UU, None, None


class SharedGenerator(Generator):
    """Base class of both generators: A_l, v_l, b_l, and their values psi* before the experience."""

    A: nn.ParameterList
    """A_l of each generated tensor, shape (D, R)."""
    v: nn.ParameterList
    """v_l of each generated tensor, shape (C, R) or, for the additive generator, (C, E)."""

    def __init__(self, tensors: Sequence[GeneratedTensor], *, residual: bool) -> None:
        super().__init__(tensors)
        self.residual = residual
        self.b = nn.ParameterList(torch.zeros(t.row_length) for t in self.tensors)
        self._star: dict[str, Tensor] = {}
        self._gram: dict[int, Tensor] = {}

    def begin(self, task: int) -> None:
        """With `residual` the first task trains the base, all others the shared parameters."""
        trains_base = self.residual and task == 0
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(bool(self.tensors)
                                     and name.startswith("base.") == trains_base)
        self.shares_parameters = task > 0
        self.snapshot()

    def shared(self) -> dict[str, Tensor]:
        """Psi by name: the shared parameters, which may drift while a task is learned."""
        parameters: dict[str, Tensor] = {}
        for index in range(len(self.tensors)):
            parameters |= {f"A.{index}": self.A[index], f"v.{index}": self.v[index],
                           f"b.{index}": self.b[index]}
        return parameters

    def snapshot(self) -> None:
        """Copies the shared parameters of this moment to psi*."""
        self.restore_snapshot(self.shared() if self.shares_parameters else {})

    def star(self) -> dict[str, Tensor]:
        """psi* by parameter name."""
        return dict(self._star)

    def restore_snapshot(self, star: dict[str, Tensor]) -> None:
        self._star = {name: value.detach().clone() for name, value in star.items()}
        self._gram = {}

    def generating_macs(self, task: int) -> int:
        del task
        return sum(t.rows * A_DR.numel() for t, A_DR in zip(self.tensors, self.A, strict=True))

    def _bias(self, index: int) -> Tensor:
        """base_l + b_l: (C, D)."""
        bias_CD: Tensor = self.base[index] + self.b[index]
        return bias_CD

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        """S_UU = sum of u u^T over tasks and rows, for generated tensor `index`."""
        raise NotImplementedError

    def regulariser(self, codes: Tensor) -> Tensor:
        """Mean over the earlier tasks j of |H(e_j) - H*(e_j)|^2.

        codes: one row for each earlier task. Returns a scalar, zero right after `snapshot`, with a
        gradient to the shared parameters.
        """
        total = codes.new_zeros(())
        for index in range(len(self.tensors)):
            A_star_DR, b_star_D = self._star[f"A.{index}"], self._star[f"b.{index}"]
            if index not in self._gram:
                self._gram[index] = A_star_DR.T @ A_star_DR
            energy = DriftEnergy.apply(self.A[index] - A_star_DR, self.b[index] - b_star_D,
                                       self._moments(index, codes, self.v[index]), A_star_DR,
                                       self._gram[index])
            total = total + energy
        return total / len(codes)


class BilinearGenerator(SharedGenerator):
    """W_l(t) = base_l + V_l diag(x_tl) A_l^T + b_l; a code has one number for each l and column."""

    def __init__(self, tensors: Sequence[GeneratedTensor], width: int, *, residual: bool) -> None:
        super().__init__(tensors, residual=residual)
        self.width = width
        self.A = nn.ParameterList(torch.zeros(t.row_length, width) for t in self.tensors)
        self.v = nn.ParameterList(torch.empty(t.rows, width) for t in self.tensors)
        for A_Dd, v_Cd, tensor in zip(self.A, self.v, self.tensors, strict=True):
            if residual:
                nn.init.normal_(v_Cd, std=3 * width ** -0.5)
            else:
                nn.init.normal_(v_Cd, std=width ** -0.5)
                nn.init.normal_(A_Dd, std=_row_scale(tensor))

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """A copy of the previous task's code, so that its knowledge carries over; ones at first.

        With `residual` the first task is the base alone, so its code is zero.
        """
        if self.residual and task == 0:
            return torch.zeros(len(self.tensors) * self.width)
        if previous is None or not previous.any():
            return torch.ones(len(self.tensors) * self.width)
        return previous.clone()

    def forward(self, task: int, code: Tensor, inherited: Rows | None = None) -> Rows:
        del task, inherited
        return tuple(torch.addmm(self._bias(index), self.v[index] * x_d, self.A[index].T)
                     for index, x_d in enumerate(self._by_layer(code)))

    def _by_layer(self, codes: Tensor) -> Tensor:
        return codes.view(*codes.shape[:-1], len(self.tensors),
                          self.width if self.tensors else 0)

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        # u(t, c) = a(t) * b(c) element by element, so the double sum of u u^T is the elementwise
        # product of the sums of a a^T and b b^T
        x_Td = self._by_layer(codes)[:, index]
        a_TU = torch.cat([x_Td, x_Td, x_Td.new_ones(len(x_Td), 1)], 1)
        b_CU = torch.cat([v_CE, v_CE - self._star[f"v.{index}"], v_CE.new_ones(len(v_CE), 1)], 1)
        return (a_TU.T @ a_TU) * (b_CU.T @ b_CU)


class AdditiveGenerator(SharedGenerator):
    """W_l(t)[c] = base_l[c] + A_l [mlp(e_t) ; v_lc] + b_l; an embedding of E numbers a task."""

    def __init__(self, tensors: Sequence[GeneratedTensor], embedding_dim: int,
                 hidden: Sequence[int], channel_dim: int, *, residual: bool) -> None:
        super().__init__(tensors, residual=residual)
        self.embedding_dim = embedding_dim
        row_dim = hidden[-1] + channel_dim
        self.A = nn.ParameterList(torch.zeros(t.row_length, row_dim) for t in self.tensors)
        self.v = nn.ParameterList(torch.empty(t.rows, channel_dim) for t in self.tensors)
        layers: list[nn.Module] = []
        for width_in, width in itertools.pairwise((embedding_dim, *hidden)):
            layers += [nn.Linear(width_in, width), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for index, tensor in enumerate(self.tensors):
            nn.init.normal_(self.v[index])
            if not residual:
                nn.init.normal_(self.A[index], std=_row_scale(tensor) * row_dim ** -0.5)

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """A copy of the previous task's code, to carry its knowledge over; at first random."""
        del task
        return torch.randn(self.embedding_dim) if previous is None else previous.clone()

    def forward(self, task: int, code: Tensor, inherited: Rows | None = None) -> Rows:
        del task, inherited
        x_H, rows = self.mlp(code), []
        for index, v_CE in enumerate(self.v):
            z_CR = torch.cat([x_H.expand(len(v_CE), -1), v_CE], 1)
            rows.append(torch.addmm(self._bias(index), z_CR, self.A[index].T))
        return tuple(rows)

    def shared(self) -> dict[str, Tensor]:
        return super().shared() | {f"mlp.{name}": value
                                   for name, value in self.mlp.named_parameters()}

    def _wide_mlp(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """x_TH = mlp(e_t) of each code, in float64: two nearly equal results are subtracted."""
        wide = {name: value.double() for name, value in parameters.items()}
        return cast(Tensor, torch.func.functional_call(self.mlp, wide, (codes.double(),)))

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        """S_UU; u(t, c) = p(t) + q(c), so sums over tasks and sums over rows are enough."""
        star = self._star
        x_TH = self._wide_mlp(codes, dict(self.mlp.named_parameters()))
        with torch.no_grad():
            x_star_TH = self._wide_mlp(codes, {name: star[f"mlp.{name}"]
                                               for name, _ in self.mlp.named_parameters()})
        dx_TH, x_TH = (x_TH - x_star_TH).to(codes.dtype), x_TH.to(codes.dtype)
        dv_CE = v_CE - star[f"v.{index}"]
        T, C = len(x_TH), len(v_CE)
        p_TU = torch.cat([x_TH, v_CE.new_zeros(T, v_CE.shape[1]), dx_TH,
                          v_CE.new_zeros(T, v_CE.shape[1] + 1)], 1)
        q_CU = torch.cat([v_CE.new_zeros(C, x_TH.shape[1]), v_CE,
                          v_CE.new_zeros(C, x_TH.shape[1]), dv_CE, v_CE.new_ones(C, 1)], 1)
        # sum over t, c of (p + q)(p + q)^T, multiplied out
        cross_UU = torch.outer(p_TU.sum(0), q_CU.sum(0))
        return C * p_TU.T @ p_TU + cross_UU + cross_UU.T + T * q_CU.T @ q_CU


def _row_scale(tensor: GeneratedTensor) -> float:
    """Kaiming's standard deviation (fan out) for the convolution that this tensor replaces."""
    kernel = int(torch.Size(tensor.shape[2:]).numel())
    return float((2.0 / (tensor.rows * kernel)) ** 0.5)
