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
generator can also keep its columns apart: each task opens a block of its own and inherits the
columns of the task it starts from, with their codes. Blocks that are learned stay frozen, so
nothing that an earlier task knows can change, and what is inherited is generated once a task: a
step costs the same whatever the number of tasks.

Legend: C output channels (rows), D row length, R row-code length, d columns, L generated tensors,
T earlier tasks.
"""

import itertools
import sys
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


class Inherited(NamedTuple):
    """What a task's weights are before its own columns add to them."""

    columns: int
    """How many of the shared columns it is made of."""
    rows: tuple[Tensor, ...]
    """(C, D) of each generated tensor."""


class _Generator(nn.Module):
    """What both generators share: b_l, base_l, and psi* at the experience's start."""

    def __init__(self, tensors: Sequence[GeneratedTensor], *, residual: bool) -> None:
        super().__init__()
        self.tensors = tuple(tensors)
        self.residual = residual
        self.b = nn.ParameterList(torch.zeros(t.row_length) for t in self.tensors)
        self.base = nn.ParameterList(torch.zeros(t.rows, t.row_length) for t in self.tensors)
        self.drifts = False
        """Whether what is trained now can change the weights of earlier tasks."""
        self._star: dict[str, Tensor] = {}
        self._gram: dict[int, Tensor] = {}

    def set_base(self, weights: Sequence[Tensor]) -> None:
        """Residual generation: the first task trains on from these weights."""
        for base, weight in zip(self.base, weights, strict=True):
            base.data.copy_(weight.reshape(base.shape))

    def add_task(self, task: int) -> None:
        """Makes room for what a task needs of the shared parts."""

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """The code a task starts from, given that of the task it starts from."""
        raise NotImplementedError

    def inherits(self, task: int) -> bool:
        """Whether a task's own code only adds to the code of the task it started from."""
        del task
        return False

    def whole_code(self, code: Tensor, before: Tensor | None, task: int) -> Tensor:
        """(L, d) or (1, E): a task's own code after `before`, that of the task it started from."""
        raise NotImplementedError

    def inherit(self, before: Tensor, task: int) -> Inherited:
        """What a task's weights are before its own columns add to them."""
        raise NotImplementedError

    def columns(self, index: int) -> tuple[Tensor, Tensor]:
        """A_l (D, R) and v_l: C rows."""
        raise NotImplementedError

    def rows(self, code: Tensor, index: int, inherited: Inherited | None) -> Tensor:
        """W_l(t): (C, D)."""
        raise NotImplementedError

    def bias(self, index: int) -> Tensor:
        """base_l + b_l: (C, D)."""
        bias_CD: Tensor = self.base[index] + self.b[index]
        return bias_CD

    def forward(self, code: Tensor, inherited: Inherited | None = None) -> dict[str, Tensor]:
        """The head's convolution weights for one task, by name: once a step, for every image."""
        return {tensor.name: self.rows(code, index, inherited).view(tensor.shape)
                for index, tensor in enumerate(self.tensors)}

    def uses_code(self, task: int) -> bool:
        """Whether a task's weights depend on its code; a first task may have the base alone."""
        return bool(self.tensors) and not (self.residual and task == 0)

    def task_bytes(self, task: int) -> int:
        """Bytes that the shared parts grow by for a task."""
        del task
        return 0

    def begin(self, task: int) -> None:
        """Decides what this experience may change, and keeps psi* where earlier tasks could."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(bool(self.tensors) and
                                     name.startswith("base.") != self.uses_code(task))
        self.drifts = task > 0
        self.snapshot()

    def shared(self) -> dict[str, Tensor]:
        """What may drift while a task is learned: psi by name."""
        found: dict[str, Tensor] = {}
        for index in range(len(self.tensors)):
            A_DR, v_CE = self.columns(index)
            found |= {f"A.{index}": A_DR, f"v.{index}": v_CE, f"b.{index}": self.b[index]}
        return found

    def snapshot(self) -> None:
        """Keeps psi*: the shared parameters as they are now."""
        self._star = ({name: value.detach().clone() for name, value in self.shared().items()}
                      if self.drifts else {})
        self._gram = {}

    def star(self) -> dict[str, Tensor]:
        """psi* by parameter name, for the checkpoint of a running experience."""
        return dict(self._star)

    def restore_snapshot(self, star: dict[str, Tensor]) -> None:
        """Takes back what `star` gave, when an interrupted experience goes on."""
        self._star = {name: value.detach().clone() for name, value in star.items()}
        self._gram = {}

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        """S_UU = sum over tasks and rows of u u^T."""
        raise NotImplementedError

    def regulariser(self, codes: Tensor) -> Tensor:
        """Mean over the earlier tasks of |H(e_j) - H*(e_j)|^2, gradient to the shared parts.

        codes: (T, L, d), or (T, 1, E) for embeddings: `whole_code` of the finished tasks. A scalar;
        zero right after `snapshot`.
        """
        total = codes.new_zeros(())
        for index in range(len(self.tensors)):
            A_star_DR, b_star_D = self._star[f"A.{index}"], self._star[f"b.{index}"]
            if index not in self._gram:
                self._gram[index] = A_star_DR.T @ A_star_DR
            A_DR, v_CE = self.columns(index)
            energy = DriftEnergy.apply(A_DR - A_star_DR, self.b[index] - b_star_D,
                                       self._moments(index, codes, v_CE), A_star_DR,
                                       self._gram[index])
            total = total + energy
        return total / len(codes)


class BilinearGenerator(_Generator):
    """W_l(t) = base_l + V_l diag(x_tl) A_l^T + b_l; a code has a number a layer and column."""

    def __init__(self, tensors: Sequence[GeneratedTensor], limit: int | None, fresh: int, *,
                 residual: bool) -> None:
        """At most `limit` columns, of which a task opens `fresh`; 0 opens all for the first that
        uses any, and then there must be a limit.
        """
        super().__init__(tensors, residual=residual)
        self.fresh = fresh if residual else 0
        if limit is None and not self.fresh:
            raise ValueError("limit is None; allowed: a number where no columns are kept fresh")
        self.limit = sys.maxsize if limit is None else limit
        self.A = nn.ModuleList(nn.ParameterList() for _ in self.tensors)
        self.v = nn.ModuleList(nn.ParameterList() for _ in self.tensors)

    def open_columns(self, task: int) -> int:
        """Columns there are for tasks 0 to `task`; a first task with a base of its own has none."""
        if task < 0 or (self.residual and task == 0):
            return 0
        return min(self.limit, task * self.fresh) if self.fresh else self.limit

    def own_columns(self, task: int) -> tuple[int, int]:
        """First and last + 1 of the columns that a task's own code is for: those it opens, or all
        where there are none left to open.
        """
        before, after = self.open_columns(task - 1), self.open_columns(task)
        return (before if before < after else 0), after

    def add_task(self, task: int) -> None:
        """Opens the task's block of columns: V at random, A zero unless everything is generated."""
        width = self.open_columns(task) - self.open_columns(task - 1)
        if width == 0:
            return
        for A, v, tensor in zip(self.A, self.v, self.tensors, strict=True):
            A_Dd, v_Cd = torch.zeros(tensor.row_length, width), torch.empty(tensor.rows, width)
            if self.residual:
                nn.init.normal_(v_Cd, std=3 * width ** -0.5)
            else:
                nn.init.normal_(v_Cd, std=width ** -0.5)
                nn.init.normal_(A_Dd, std=_row_scale(tensor))
            cast(nn.ParameterList, A).append(nn.Parameter(A_Dd))
            cast(nn.ParameterList, v).append(nn.Parameter(v_Cd))

    def task_bytes(self, task: int) -> int:
        width = self.open_columns(task) - self.open_columns(task - 1)
        return 4 * width * sum(t.rows + t.row_length for t in self.tensors)

    def begin(self, task: int) -> None:
        """While a task opens columns, those before them are frozen and nothing drifts."""
        super().begin(task)
        if not self.fresh or not task or self.own_columns(task)[1] == self.open_columns(task - 1):
            return
        self.drifts, self._star = False, {}
        self.b.requires_grad_(False)
        for blocks in [*self.A, *self.v]:
            for block in list(blocks.parameters())[:-1]:
                block.requires_grad_(False)

    def next_code(self, previous: Tensor | None, task: int) -> Tensor:
        """Ones at the columns the task opens; with none left, all of the previous task's code.

        previous: (L, d), inherited columns included.
        """
        first, last = self.own_columns(task)
        if previous is None or first or not self.open_columns(task - 1):
            return torch.ones(len(self.tensors) * (last - first))
        return widened(previous, last).flatten()

    def inherits(self, task: int) -> bool:
        return self.own_columns(task)[0] > 0

    def whole_code(self, code: Tensor, before: Tensor | None, task: int) -> Tensor:
        own_Ld = self._by_layer(code)
        if before is None:
            return own_Ld
        return torch.cat([widened(before, self.own_columns(task)[0]), own_Ld], 1)

    @torch.no_grad()
    def inherit(self, before: Tensor, task: int) -> Inherited:
        """What a task's weights are before its own columns, started from a task of this code."""
        d = self.own_columns(task)[0]
        code_Ld = widened(before, d)
        rows = []
        for index in range(len(self.tensors)):
            A_Dd, v_Cd = self._block(self.A[index], 0, d), self._block(self.v[index], 0, d)
            rows.append(torch.addmm(self.bias(index), v_Cd * code_Ld[index], A_Dd.T))
        return Inherited(d, tuple(rows))

    def columns(self, index: int) -> tuple[Tensor, Tensor]:
        return (torch.cat(list(self.A[index].parameters()), 1),
                torch.cat(list(self.v[index].parameters()), 1))

    def rows(self, code: Tensor, index: int, inherited: Inherited | None) -> Tensor:
        first = inherited.columns if inherited else 0
        bias_CD = inherited.rows[index] if inherited else self.bias(index)
        x_d = self._by_layer(code)[index]
        if not len(x_d):
            return bias_CD
        A_Dd = self._block(self.A[index], first, first + len(x_d))
        v_Cd = self._block(self.v[index], first, first + len(x_d))
        return torch.addmm(bias_CD, v_Cd * x_d, A_Dd.T)

    def _by_layer(self, code: Tensor) -> Tensor:
        return code.view(len(self.tensors), len(code) // max(1, len(self.tensors)))

    @staticmethod
    def _block(blocks: nn.Module, first: int, last: int) -> Tensor:
        """Columns `first` to `last` - 1, which are whole blocks."""
        ends = list(itertools.accumulate(block.shape[1] for block in blocks.parameters()))
        chosen: list[Tensor] = [block for block, end in zip(blocks.parameters(), ends, strict=True)
                                if first < end <= last]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 1)

    def _moments(self, index: int, codes: Tensor, v_CE: Tensor) -> Tensor:
        x_Td = codes[:, index]
        a_TU = torch.cat([x_Td, x_Td, x_Td.new_ones(len(x_Td), 1)], 1)
        b_CU = torch.cat([v_CE, v_CE - self._star[f"v.{index}"], v_CE.new_ones(len(v_CE), 1)], 1)
        return (a_TU.T @ a_TU) * (b_CU.T @ b_CU)


class AdditiveGenerator(_Generator):
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
        return torch.randn(self.embedding_dim) if previous is None else previous.flatten().clone()

    def whole_code(self, code: Tensor, before: Tensor | None, task: int) -> Tensor:
        del before, task
        return code[None]

    def columns(self, index: int) -> tuple[Tensor, Tensor]:
        return self.A[index], self.v[index]

    def rows(self, code: Tensor, index: int, inherited: Inherited | None) -> Tensor:
        assert inherited is None
        x_H, v_CE = self.mlp(code), self.v[index]
        z_CR = torch.cat([x_H.expand(len(v_CE), -1), v_CE], 1)
        return torch.addmm(self.bias(index), z_CR, self.A[index].T)

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
        codes = codes[:, 0]
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


def widened(code_Ld: Tensor, columns: int) -> Tensor:
    """A code for more columns, which is zero at those it did not know."""
    return nn.functional.pad(code_Ld, (0, columns - code_Ld.shape[1]))


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
    return AdditiveGenerator(tensors, config.embedding_dim, config.hidden, config.channel_dim,
                             residual=config.residual)
