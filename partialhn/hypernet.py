"""The hypernetwork H_psi: a task's code -> the convolution weights of the head.

Every generated tensor l is a stack of rows c, one for each output channel, and the last layer of
the generator is linear:

    W_l(t)[c, :] = base_l[c, :] + A_l z_l(t, c) + b_l

`BilinearGenerator`: z_l(t, c) = x_tl * v_lc, with a code x_tl for each layer and task (ours).
`AdditiveGenerator`: z_l(t, c) = [x_t ; v_lc], with x_t = mlp(e_t) (von Oswald et al. 2020, Hemati
et al. 2023). With residual generation the first task trains base_l and the generator learns the
differences of the later ones; otherwise base_l is zero and everything is generated.

Codes belong to their task and are frozen with it; A, b, v (and the mlp) are shared. What may
drift is held by the regulariser, which needs no generated weight: with stars for the values at
the start of the experience and u = [z ; z - z* ; 1],

    W - W* = M u,   M = [A - A* | A* | b - b*],   sum over t, c of |M u|^2 = <M^T M, S>,

where S = sum over t, c of u u^T has a closed form that costs nothing per task. A bilinear
generator can also keep the columns of A and v apart: an earlier task's code is zero at columns
that were opened after it, so while used columns stay frozen, nothing it knows can change.

Legend: C output channels (rows), D row length, R row-code length, d columns, T earlier tasks.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

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


class _Generator(nn.Module):
    """What both generators share: A_l, b_l, v_l, base_l, and psi* at the experience's start."""

    def __init__(self, tensors: Sequence[GeneratedTensor], row_dim: int, channel_dim: int, *,
                 residual: bool) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.row_dim, self.residual = row_dim, residual
        self.A = nn.ParameterList(torch.zeros(t.row_length, row_dim) for t in self.tensors)
        self.b = nn.ParameterList(torch.zeros(t.row_length) for t in self.tensors)
        self.v = nn.ParameterList(torch.empty(t.rows, channel_dim) for t in self.tensors)
        self.base = nn.ParameterList(torch.zeros(t.rows, t.row_length) for t in self.tensors)
        self.drifts = False
        """Whether what is trained now can change the weights of earlier tasks."""
        self._star: dict[str, Tensor] = {}
        self._gram: dict[int, Tensor] = {}

    def set_base(self, weights: Sequence[Tensor]) -> None:
        """Residual generation: the first task trains on from these weights."""
        for base, weight in zip(self.base, weights, strict=True):
            base.data.copy_(weight.reshape(base.shape))

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """The code a task starts from: the previous task's, so that what it knows carries over."""
        raise NotImplementedError

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        """z_l(t, .): (C, R) for one task's code."""
        raise NotImplementedError

    def rows(self, code: Tensor, index: int) -> Tensor:
        """W_l(t): (C, D)."""
        bias_CD = self.base[index] + self.b[index]
        return torch.addmm(bias_CD, self.row_codes(code, index), self.A[index].T)

    def forward(self, code: Tensor) -> dict[str, Tensor]:
        """The head's convolution weights for one task, by name: once a step, for every image."""
        return {tensor.name: self.rows(code, index).view(tensor.shape)
                for index, tensor in enumerate(self.tensors)}

    def uses_code(self, task: int) -> bool:
        """Whether a task's weights depend on its code; a first task may have the base alone."""
        return bool(self.tensors) and not (self.residual and task == 0)

    def column_bytes(self) -> int:
        """Bytes of shared columns that each later task fills."""
        return 0

    def begin(self, task: int) -> None:
        """Decides what this experience may change, and keeps psi* where earlier tasks could."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(bool(self.tensors) and
                                     name.startswith("base.") != self.uses_code(task))
        self.drifts = task > 0
        self.snapshot()

    def snapshot(self) -> None:
        """Keeps psi*: the shared parameters as they are now."""
        self._star = ({name: value.detach().clone() for name, value in self.named_parameters()
                       if not name.startswith("base.")} if self.drifts else {})
        self._gram = {}

    def star(self) -> dict[str, Tensor]:
        """psi* by parameter name, for the checkpoint of a running experience."""
        return dict(self._star)

    def restore_snapshot(self, star: dict[str, Tensor]) -> None:
        """Takes back what `star` gave, when an interrupted experience goes on."""
        self._star = {name: value.detach().clone() for name, value in star.items()}
        self._gram = {}

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
            if index not in self._gram:
                self._gram[index] = A_star_DR.T @ A_star_DR
            energy = DriftEnergy.apply(self.A[index] - A_star_DR, self.b[index] - b_star_D,
                                       self._moments(index, codes), A_star_DR, self._gram[index])
            total = total + energy
        return total / len(codes)


class BilinearGenerator(_Generator):
    """W_l(t) = base_l + V_l diag(x_tl) A_l^T + b_l; codes are (L * d) numbers a task."""

    def __init__(self, tensors: Sequence[GeneratedTensor], columns: int, fresh: int, *,
                 residual: bool) -> None:
        """`fresh`: columns a task opens; 0 opens all of them for the first that uses any."""
        super().__init__(tensors, columns, columns, residual=residual)
        self.code_length = len(self.tensors) * columns
        self.fresh = fresh if residual else 0
        self._frozen, self._open = 0, columns
        opened = self.fresh or columns
        for index, tensor in enumerate(self.tensors):
            if residual:
                nn.init.normal_(self.v[index], std=3 * opened ** -0.5)
            else:
                nn.init.normal_(self.v[index], std=columns ** -0.5)
                nn.init.normal_(self.A[index], std=_row_scale(tensor))

    def open_columns(self, task: int) -> int:
        """Columns that tasks 0 to `task` use; a first task with a base of its own uses none."""
        if self.residual and task <= 0:
            return 0
        return min(self.row_dim, task * self.fresh) if self.fresh else self.row_dim

    def column_bytes(self) -> int:
        return 4 * self.fresh * sum(t.rows + t.row_length for t in self.tensors)

    def begin(self, task: int) -> None:
        """While a task opens columns, those before them are frozen and nothing drifts."""
        super().begin(task)
        self._frozen, self._open = 0, self.open_columns(task)
        before = self.open_columns(task - 1) if task else 0
        if self.fresh and task and before < self._open:
            self._frozen, self.drifts, self._star = before, False, {}
            self.b.requires_grad_(False)

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """Ones at the columns the task opens, zeros at those not opened yet."""
        code_Ld = (torch.zeros(len(self.tensors), self.row_dim) if previous is None
                   else previous.detach().clone().view(len(self.tensors), self.row_dim))
        before = self.open_columns(task - 1) if task else 0
        code_Ld[:, before:self.open_columns(task)] = 1
        return code_Ld.flatten()

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        d = self.row_dim
        v_Cd: Tensor = self.v[index]
        return v_Cd * code[index * d:(index + 1) * d]

    def rows(self, code: Tensor, index: int) -> Tensor:
        """W_l(t): the frozen columns give their codes a gradient, the open ones all they have.

        One product over all of them: in two, an earlier task's weights would round differently
        once the cut between frozen and open columns has moved.
        """
        bias_CD: Tensor = self.base[index] + self.b[index]
        if not self._open:
            return bias_CD
        x_d = code[index * self.row_dim:(index + 1) * self.row_dim]
        A_Dd, v_Cd = self._columns(self.A[index]), self._columns(self.v[index])
        return torch.addmm(bias_CD, v_Cd * x_d[:self._open], A_Dd.T)

    def _columns(self, shared: Tensor) -> Tensor:
        """The columns in use, of which the frozen ones take no gradient."""
        if not self._frozen:
            return shared[:, :self._open]
        return torch.cat([shared[:, :self._frozen].detach(),
                          shared[:, self._frozen:self._open]], 1)

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
        super().__init__(tensors, hidden[-1] + channel_dim, channel_dim, residual=residual)
        self.code_length = code_dim
        layers: list[nn.Module] = []
        for width_in, width in itertools.pairwise((code_dim, *hidden)):
            layers += [nn.Linear(width_in, width), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for index, tensor in enumerate(self.tensors):
            nn.init.normal_(self.v[index])
            if not residual:
                nn.init.normal_(self.A[index], std=_row_scale(tensor) * self.row_dim ** -0.5)

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """Standard normal for the first task."""
        del task
        return torch.randn(self.code_length) if previous is None else previous.detach().clone()

    def row_codes(self, code: Tensor, index: int) -> Tensor:
        x_H, v_CE = self.mlp(code), self.v[index]
        return torch.cat([x_H.expand(len(v_CE), -1), v_CE], 1)

    def _wide_mlp(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """x_TH in float64, so that two that are nearly equal can be subtracted."""
        wide = {name: value.double() for name, value in parameters.items()}
        return cast(Tensor, torch.func.functional_call(self.mlp, wide, (codes.double(),)))

    def _moments(self, index: int, codes: Tensor) -> Tensor:
        """u(t, c) = p(t) + q(c), so S needs the sums over tasks and over rows only."""
        star, v_CE = self._star, self.v[index]
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


Hypernetwork = BilinearGenerator | AdditiveGenerator


def build_generator(config: HypernetConfig, tensors: Sequence[GeneratedTensor]) -> Hypernetwork:
    """The generator that the configuration names."""
    if config.generator == "bilinear":
        return BilinearGenerator(tensors, config.code_dim, config.fresh_columns,
                                 residual=config.residual)
    return AdditiveGenerator(tensors, config.code_dim, config.hidden, config.channel_dim,
                             residual=config.residual)
