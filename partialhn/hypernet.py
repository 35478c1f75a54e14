"""The hypernetwork H_psi: a task's code -> the convolution weights of the head.

Every generated tensor l is a stack of rows c, one for each output channel, and the last layer of
the generator is linear:

    W_l(t)[c, :] = base_l[c, :] + A_l z_l(t, c) + b_l

`BilinearGenerator`: z_l(t, c) = x_tl * v_lc, with a code x_tl for each layer and task (ours).
`AdditiveGenerator`: z_l(t, c) = [x_t ; v_lc], with x_t = mlp(e_t) (von Oswald et al. 2020, Hemati
et al. 2023). Codes belong to their task and are frozen with it; A, b, v (and the mlp) are shared
and drift, which is what the regulariser holds back. It needs no generated weight: with stars for
the values at the start of the experience and u = [z ; z - z* ; 1],

    W - W* = M u,   M = [A - A* | A* | b - b*],   sum over t, c of |M u|^2 = <M^T M, S>,

where S = sum over t, c of u u^T has a closed form that costs nothing per task.

Legend: C output channels (rows), D row length, R row-code length, T earlier tasks.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from partialhn.config import HypernetConfig


class GeneratedTensor(NamedTuple):
    """One weight tensor of the head that the hypernetwork generates."""

    name: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """C: output channels."""
        return self.shape[0]

    @property
    def row_length(self) -> int:
        """D: numbers in one output channel's filter."""
        return int(torch.Size(self.shape[1:]).numel())


class Drift(NamedTuple):
    """One layer's shared matrices: how far they moved, and where they started."""

    dA_DR: Tensor
    A_star_DR: Tensor
    db_D: Tensor


def drift_energy(drift: Drift, S_UU: Tensor) -> Tensor:
    """<M^T M, S> with M = [dA | A* | db], by blocks: the squared change of the earlier weights.

    S_UU has U = 2 R + 1 rows in the order z, z - z*, 1. Never subtracts two large numbers that
    were nearly equal, as A z - A* z* would.
    """
    dA_DR, A_star_DR, db_D = drift
    R = dA_DR.shape[1]
    S_zz, S_zd, S_z1 = S_UU[:R, :R], S_UU[:R, R:-1], S_UU[:R, -1]
    S_dd, S_d1, S_11 = S_UU[R:-1, R:-1], S_UU[R:-1, -1], S_UU[-1, -1]
    inner_DR = dA_DR @ S_zz + 2 * (A_star_DR @ S_zd.T + torch.outer(db_D, S_z1))
    star_DR = A_star_DR @ S_dd + 2 * torch.outer(db_D, S_d1)
    return (dA_DR * inner_DR).sum() + (A_star_DR * star_DR).sum() + db_D.square().sum() * S_11


class _Generator(nn.Module):
    """What both generators share: A_l, b_l, base_l, their values at the experience's start."""

    def __init__(self, tensors: Sequence[GeneratedTensor], row_dim: int,
                 channel_dim: int) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.row_dim = row_dim
        self.A = nn.ParameterList(torch.empty(t.row_length, row_dim) for t in self.tensors)
        self.b = nn.ParameterList(torch.zeros(t.row_length) for t in self.tensors)
        self.v = nn.ParameterList(torch.empty(t.rows, channel_dim) for t in self.tensors)
        for index, tensor in enumerate(self.tensors):
            self.register_buffer(f"base_{index}", torch.zeros(tensor.rows, tensor.row_length))
        self._star: dict[str, Tensor] = {}

    def base(self, index: int) -> Tensor:
        """base_l: (C, D), frozen; zeros without residual generation."""
        return self.get_buffer(f"base_{index}")

    def set_base(self, weights: Sequence[Tensor]) -> None:
        """Residual generation: starts from these weights and generates the difference."""
        for index, weight in enumerate(weights):
            self.base(index).copy_(weight.detach().reshape(self.base(index).shape))

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        """z_l(t, .): (C, R) for one task's code."""
        raise NotImplementedError

    def forward(self, code: Tensor) -> dict[str, Tensor]:
        """The head's convolution weights for one task, by name: once a step, for every image."""
        weights = {}
        for index, tensor in enumerate(self.tensors):
            z_CR = self.row_codes(code, index)
            rows_CD = torch.addmm(self.base(index) + self.b[index], z_CR, self.A[index].T)
            weights[tensor.name] = rows_CD.view(tensor.shape)
        return weights

    def snapshot(self) -> None:
        """Keeps psi*: the shared parameters as they are now."""
        self._star = {name: value.detach().clone() for name, value in self.named_parameters()}

    def star(self) -> dict[str, Tensor]:
        """psi* by parameter name, for the checkpoint of a running experience."""
        return dict(self._star)

    def restore_snapshot(self, star: dict[str, Tensor]) -> None:
        """Takes back what `star` gave, when an interrupted experience goes on."""
        self._star = {name: value.detach().clone() for name, value in star.items()}

    def _moments(self, index: int, codes: Tensor) -> Tensor:
        """S_UU = sum over tasks and rows of u u^T."""
        raise NotImplementedError

    def regulariser(self, codes: Tensor) -> Tensor:
        """Mean over the earlier tasks of |H(e_j) - H*(e_j)|^2, gradient to the shared parts.

        codes: one row a finished task. A scalar; zero right after `snapshot`.
        """
        total = codes.new_zeros(())
        for index in range(len(self.tensors)):
            A_star_DR, b_star_D = self._star[f"A.{index}"], self._star[f"b.{index}"]
            drift = Drift(self.A[index] - A_star_DR, A_star_DR, self.b[index] - b_star_D)
            total = total + drift_energy(drift, self._moments(index, codes))
        return total / len(codes)


class BilinearGenerator(_Generator):
    """W_l(t) = base_l + V_l diag(x_tl) A_l^T + b_l; codes are (L * d) numbers a task."""

    def __init__(self, tensors: Sequence[GeneratedTensor], code_dim: int, *,
                 residual: bool) -> None:
        super().__init__(tensors, code_dim, code_dim)
        self.code_length = len(self.tensors) * code_dim
        for index, tensor in enumerate(self.tensors):
            nn.init.normal_(self.v[index], std=code_dim ** -0.5)
            nn.init.normal_(self.A[index],
                            std=_row_scale(tensor) * (0.1 if residual else 1.0))

    def first_code(self) -> Tensor:
        """The first task's code before it is trained: ones."""
        return torch.ones(self.code_length)

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        d = self.row_dim
        v_Cd: Tensor = self.v[index]
        return v_Cd * code[index * d:(index + 1) * d]

    def _moments(self, index: int, codes: Tensor) -> Tensor:
        d = self.row_dim
        x_Td = codes[:, index * d:(index + 1) * d]
        v_Cd = self.v[index]
        a_TU = torch.cat([x_Td, x_Td, x_Td.new_ones(len(x_Td), 1)], 1)
        b_CU = torch.cat([v_Cd, v_Cd - self._star[f"v.{index}"], v_Cd.new_ones(len(v_Cd), 1)], 1)
        return (a_TU.T @ a_TU) * (b_CU.T @ b_CU)


class AdditiveGenerator(_Generator):
    """W_l(t)[c] = base_l[c] + A_l [mlp(e_t) ; v_lc] + b_l; an embedding of E numbers a task."""

    def __init__(self, tensors: Sequence[GeneratedTensor], code_dim: int, hidden: Sequence[int],
                 channel_dim: int, *, residual: bool) -> None:
        super().__init__(tensors, hidden[-1] + channel_dim, channel_dim)
        self.code_length = code_dim
        widths = (code_dim, *hidden)
        layers: list[nn.Module] = []
        for width_in, width in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for index, tensor in enumerate(self.tensors):
            nn.init.normal_(self.v[index])
            nn.init.normal_(self.A[index],
                            std=_row_scale(tensor) * self.row_dim ** -0.5
                            * (0.1 if residual else 1.0))

    def first_code(self) -> Tensor:
        """The first task's embedding before it is trained: standard normal."""
        return torch.randn(self.code_length)

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        return self._rows(self.mlp(code), self.v[index])

    @staticmethod
    def _rows(x_H: Tensor, v_CE: Tensor) -> Tensor:
        return torch.cat([x_H.expand(len(v_CE), -1), v_CE], 1)

    def _moments(self, index: int, codes: Tensor) -> Tensor:
        """u(t, c) = p(t) + q(c), so S needs the sums over tasks and over rows only."""
        x_TH, v_CE = self.mlp(codes), self.v[index]
        mlp_star = {name.removeprefix("mlp."): value for name, value in self._star.items()
                    if name.startswith("mlp.")}
        with torch.no_grad():
            x_star_TH = torch.func.functional_call(self.mlp, mlp_star, (codes,))
        dx_TH, dv_CE = x_TH - x_star_TH, v_CE - self._star[f"v.{index}"]
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


Hypernetwork = BilinearGenerator | AdditiveGenerator


def build_generator(config: HypernetConfig, tensors: Sequence[GeneratedTensor]) -> Hypernetwork:
    """The generator that the configuration names."""
    if config.generator == "bilinear":
        return BilinearGenerator(tensors, config.code_dim, residual=config.residual)
    return AdditiveGenerator(tensors, config.code_dim, config.hidden, config.channel_dim,
                             residual=config.residual)
