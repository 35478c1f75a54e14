"""Generators whose shared parts move with every task, and the regulariser that holds them.

    W_l(t)[c, :] = base_l[c, :] + A_l z_l(t, c) + b_l

bilinear: z_l(t, c) = x_lt * v_lc; additive: z_l(t, c) = [mlp(e_t) ; v_lc].

Codes belong to their task and are frozen with it; A, b, v (and the mlp) are shared. With stars for
the values at the start of the experience and u = [z ; z - z* ; 1],

    W - W* = M u,   M = [A - A* | A* | b - b*],   sum over t, c of |M u|^2 = <M^T M, S>,

where S = sum over t, c of u u^T has a closed form that costs nothing per task. So all earlier tasks
are regularised at every step, and no generated weight of theirs is needed.

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

    dA_DR and db_D are what A and b moved since the snapshot, A_star_DR is A at the snapshot and
    gram_RR = A*^T A*, which does not change. S_UU is symmetric with U = 2 R + 1 rows in the order
    z, z - z*, 1. Gradients go to dA, db and S. By blocks it takes four products of D R^2, two each
    way, and it never subtracts two large numbers that were nearly equal, as A z - A* z* would.
    """

    @staticmethod
    def forward(ctx: Any, dA_DR: Tensor, db_D: Tensor, S_UU: Tensor, A_star_DR: Tensor,
                gram_RR: Tensor) -> Tensor:
        R = dA_DR.shape[1]
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
        R, gradient = dA_DR.shape[1], gradients[0]
        to_dA = dA_DR @ S_UU[:R, :R]
        to_dA.addmm_(A_star_DR, S_UU[R:-1, :R]).addr_(db_D, S_UU[:R, -1])
        to_db = dA_DR @ S_UU[:R, -1] + A_star_DR @ S_UU[R:-1, -1] + db_D * S_UU[-1, -1]
        return 2 * gradient * to_dA, 2 * gradient * to_db, gradient * G_UU, None, None


class Drifting(Generator):
    """What both generators share: A_l, v_l and b_l, and psi* at the experience's start."""

    A: nn.ParameterList
    """(D, R) of each generated tensor."""
    v: nn.ParameterList
    """(C, R) or, for the additive generator, (C, E)."""

    def __init__(self, tensors: Sequence[GeneratedTensor], *, residual: bool) -> None:
        super().__init__(tensors)
        self.residual = residual
        self.b = nn.ParameterList(torch.zeros(t.row_length) for t in self.tensors)
        self._star: dict[str, Tensor] = {}
        self._gram: dict[int, Tensor] = {}

    def begin(self, task: int) -> None:
        """With a residual the first task trains the base; the others the shared parts."""
        of_base = self.residual and task == 0
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(bool(self.tensors) and name.startswith("base.") == of_base)
        self.shares_parameters = task > 0
        self.snapshot()

    def shared(self) -> dict[str, Tensor]:
        """What may drift while a task is learned: psi by name."""
        found: dict[str, Tensor] = {}
        for index in range(len(self.tensors)):
            found |= {f"A.{index}": self.A[index], f"v.{index}": self.v[index],
                      f"b.{index}": self.b[index]}
        return found

    def snapshot(self) -> None:
        """Keeps psi*: the shared parameters as they are now."""
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
        """S_UU = sum over tasks and rows of u u^T."""
        raise NotImplementedError

    def regulariser(self, codes: Tensor) -> Tensor:
        """Mean over the earlier tasks of |H(e_j) - H*(e_j)|^2, gradient to the shared parts.

        codes: one row a task. A scalar; zero right after `snapshot`.
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


class BilinearGenerator(Drifting):
    """W_l(t) = base_l + V_l diag(x_tl) A_l^T + b_l; a code has a number a layer and column."""

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
        """The previous task's, so that what it knows carries over; at first ones.

        With a residual the first task is the base alone, so its code is zero.
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
        x_Td = self._by_layer(codes)[:, index]
        a_TU = torch.cat([x_Td, x_Td, x_Td.new_ones(len(x_Td), 1)], 1)
        b_CU = torch.cat([v_CE, v_CE - self._star[f"v.{index}"], v_CE.new_ones(len(v_CE), 1)], 1)
        return (a_TU.T @ a_TU) * (b_CU.T @ b_CU)


class AdditiveGenerator(Drifting):
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
        """The previous task's, so that what it knows carries over; at first standard normal."""
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
        """x_TH in float64, so that two that are nearly equal can be subtracted."""
        wide = {name: value.double() for name, value in parameters.items()}
        return cast(Tensor, torch.func.functional_call(self.mlp, wide, (codes.double(),)))

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        """u(t, c) = p(t) + q(c), so S needs the sums over tasks and over rows only."""
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
        cross_UU = torch.outer(p_TU.sum(0), q_CU.sum(0))
        return C * p_TU.T @ p_TU + cross_UU + cross_UU.T + T * q_CU.T @ q_CU


def _row_scale(tensor: GeneratedTensor) -> float:
    """Kaiming's standard deviation (fan out) of the convolution this tensor replaces."""
    kernel = int(torch.Size(tensor.shape[2:]).numel())
    return float((2.0 / (tensor.rows * kernel)) ** 0.5)
