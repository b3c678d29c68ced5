"""Exact losses after repair, and the greedy order by them: the structured form of Optimal Brain Surgeon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fasp_fx.errors import CalibrationError

from ._named import NAMED
from ._scoring import ByColumns, Columns, GroupColumns, GroupScore, Order, Score
from ._statistics import (
    InputGradients,
    MakeStatistic,
    add_product,
    diagonal_of,
    energy_of,
    is_few,
    precise,
    whole,
)

#: the diagonal of the Gram matrix is raised by this part of its mean, as OSSCAR (arXiv 2403.12983) and ZipLM
#: (2302.04089) do
DAMPING = 1e-2
#: a group's channel sets go in about so many rounds; between rounds the losses of those that stay are
#: computed anew
ROUNDS = 48
#: the part of the curvature that is taken to be the same for all rows, since few batches say little of single
#: ones
SHRINKAGE = 0.1
#: the part of a Gram matrix's trace that rounding of its products stays below
ROUNDING = 8 * torch.finfo(torch.float32).eps
#: with so many times fewer tokens than columns, the tokens are less work than the matrix
_FEWER = 10


class OBS(GroupScore):
    """Removes what is cheapest once all that stays was repaired to make up for it.

    With G = XᵀX of a consumer W and Q = WᵀSW, where S is the covariance of the gradients at its output,
    removing the columns P and repairing the others costs ``½ tr(([G⁻¹]_PP)⁻¹ Q_PP)`` (ZipLM, arXiv
    2302.04089; OSSCAR, 2403.12983; with output gradients LLM Surgeon, 2312.17244). A column that others can
    stand in for is cheap, however large it is. Costs of all consumers of a group are added. Without gradients
    S is the unit matrix, divided by ‖XWᵀ‖²_F, and the loss is the relative squared error of the outputs.
    Where the consumer adds a bias, X is taken without its means, which the bias gives once it is repaired
    along (FLAP, arXiv 2312.11983, does so with nothing else repaired).

    """

    statistics: ClassVar[Mapping[str, MakeStatistic]] = {"gradients": InputGradients}

    def __call__(self, group: GroupColumns) -> Order:
        grams = ((columns, centred_of(columns)) for columns in group.consumers)
        problems = [
            Elimination(columns, len(group.block_of), gram, self.root(columns, gram), DAMPING)
            for columns, gram in grams
        ]
        return greedy(group, problems, ROUNDS)

    def root(self, columns: Columns, gram: Tensor) -> Tensor:
        """F of one block of a consumer with Q = FᵀF, shape ``[any, columns]``; ``gram`` is its G, or X."""
        weight = columns.weight
        weight = torch.cat([weight.real, weight.imag] if weight.is_complex() else [weight]).to(gram.dtype)
        unit = float(weight.abs().amax()) or 1.0  # squares of the weights themselves can be out of range
        weight = weight / unit
        gradients = columns.seen.get("gradients")
        seen = gradients if isinstance(gradients, InputGradients) and gradients.tokens else None
        curvature = None if seen is None else seen.compact()
        if seen is not None and curvature is None:
            return weight * (unit * seen.mean_square() ** 0.5)
        energy = energy_of(weight, gram)
        if curvature is None:
            return weight / energy**0.5 if energy > 0 else weight
        met = energy_of(curvature, gram) if is_few(curvature) else float((curvature * whole(gram)).sum())
        share = SHRINKAGE * (met / energy if energy > 0 else 0.0)
        if is_few(curvature):
            return torch.cat([curvature * (1 - SHRINKAGE) ** 0.5, weight * share**0.5])
        curvature.mul_(1 - SHRINKAGE).addmm_(weight.T, weight, alpha=share)
        return raised_root(curvature, ROUNDING * float(curvature.diagonal().mean())).T


class Elimination:
    """One block of a consumer, whose columns are eliminated one set after another.

    Args:
        columns: the block.
        sets: how many channel sets the group has.
        gram: G, which is used up, or X with few rows.
        root: F, shape ``[any, columns]``, of the curvature Q = FᵀF.
        damping: raises the diagonal of G by this part of its mean.
    """

    def __init__(self, columns: Columns, sets: int, gram: Tensor, root: Tensor, damping: float) -> None:
        # What is never anything but zero costs nothing, however large its weight; damping alone would have it
        # vary.
        self.root = root * (diagonal_of(gram) > 0)
        self.inverse = damped_inverse(columns, gram, damping)
        #: of each column in the matrices; -1: gone, and last, none
        self.place = np.append(np.arange(root.shape[1]), -1)
        # A column can name a set twice, where one operand is contracted with another of the same channels.
        pairs = {(set_, column) for column, row in enumerate(columns.sets) for set_ in row if set_ >= 0}
        belongs = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
        nth = np.arange(len(belongs)) - np.searchsorted(belongs[:, 0], belongs[:, 0])
        self.columns = np.full((sets, nth.max(initial=0) + 1), -1)
        self.columns[belongs[:, 0], nth] = belongs[:, 1]

    def losses(self, sets: np.ndarray) -> np.ndarray:
        """``½ tr(([G⁻¹]_PP)⁻¹ Q_PP)`` of each of these channel sets by itself, shape ``[sets]``."""
        places = self.place[self.columns[sets]]
        if (places < 0).all():  # no column is here, and of an expert that went none is left at all
            return np.zeros(len(sets))
        used = torch.from_numpy(places >= 0).to(self.root.device)
        at = torch.from_numpy(np.maximum(places, 0)).to(self.root.device)
        if at.shape[1] == 1:
            curvature = self.root.square().sum(0)[at[:, 0]] * used[:, 0]
            losses = 0.5 * curvature / self.inverse.blocks(at)[:, 0, 0]
        else:
            both = used[:, :, None] & used[:, None, :]
            inner = self.inverse.blocks(at) * both + torch.diag_embed((~used).to(self.root.dtype))
            root = self.root.T[at] * used[:, :, None]  # [sets, columns, any]
            solved = torch.cholesky_solve(root @ root.mT, torch.linalg.cholesky(inner))
            losses = 0.5 * solved.diagonal(dim1=1, dim2=2).sum(1)
        return losses.clamp_min(0).cpu().numpy().astype(np.float64)

    def remove(self, sets: np.ndarray) -> float:
        """Take these channel sets out together; the loss that it adds."""
        columns = np.unique(self.columns[sets])
        columns = columns[self.place[columns] >= 0]
        if not len(columns):
            return 0.0
        gone = torch.from_numpy(self.place[columns]).to(self.root.device)
        across = self.inverse.rows(gone)
        factor = raised_root(across[:, gone], 0.0)
        root, across = (
            torch.linalg.solve_triangular(factor, part, upper=False)
            for part in (self.root[:, gone].T, across)
        )
        # Rows and columns of what goes become zero in both, and are cut out once they are an eighth: a copy
        # costs more than the update.
        self.inverse.eliminate(gone, across)
        self.root.addmm_(root.T, across, alpha=-1)
        self.place[columns] = -1
        alive = np.flatnonzero(self.place >= 0)
        if len(alive) * 8 <= self.root.shape[1] * 7:
            left = torch.from_numpy(self.place[alive]).to(self.root.device)
            self.inverse.keep(left)
            self.root = self.root.index_select(1, left)
            self.place[alive] = np.arange(len(alive))
        return 0.5 * float(root.square().sum())


def centred_of(columns: Columns) -> Tensor:
    """What repair has to make up for: XᵀX, without means where a bias gives them."""
    gram = columns.centred_gram or columns.gram
    assert gram is not None
    return gram()


def greedy(group: GroupColumns, problems: list[Elimination], rounds: int) -> Order:
    """Take out the cheapest channel sets round by round, equally many of each block.

    Orders of two depths agree as far as both go, and the losses of the steps add up to that of the whole
    removal.

    Args:
        problems: one for each block of each consumer; each is used up.
        rounds: about how many rounds a whole block would go in.
    """
    left = [*group.members]
    each = max(1, -(-len(left[0]) // rounds))
    order: list[list[int]] = [[] for _ in left]
    losses = [0.0]
    while len(order[0]) < group.deepest:
        alone, taken = list[np.ndarray](), list[np.ndarray]()
        for block, members in enumerate(left):
            worth = sum((problem.losses(members) for problem in problems), np.zeros(len(members)))
            cheapest = np.argsort(worth, kind="stable")[:each]
            alone.append(worth[cheapest])
            taken.append(members[cheapest])
            left[block] = np.delete(members, cheapest)
            order[block] += taken[-1].tolist()
        added = sum(problem.remove(np.concatenate(taken)) for problem in problems)
        steps = np.cumsum(sum(alone))
        shares = steps / steps[-1] if steps[-1] > 0 else np.arange(1, len(steps) + 1) / len(steps)
        losses += (losses[-1] + added * shares).tolist()
    return Order(np.array(order), np.maximum.accumulate(np.array(losses)))


def resolve_score(score: str | Score) -> GroupScore:
    """The score of groups that a name, or a score of columns, stands for (a function is taken to need
    calibration data).
    """
    if score == "obs":
        return OBS()
    function, needs_data = NAMED[score] if isinstance(score, str) else (score, True)
    return function if isinstance(function, GroupScore) else ByColumns(function, needs_data)


# --- The inverse of a damped Gram matrix, from which columns are eliminated.


@dataclass
class Inverse:
    """``H = (G + δI)⁻¹``, up to its diagonal: what is above is not kept up to date."""

    matrix: Tensor

    def blocks(self, at: Tensor) -> Tensor:
        """The parts between some columns, ``[sets, columns, columns]`` for places ``[sets, columns]``."""
        one, other = at[:, :, None], at[:, None, :]
        return self.matrix[one.maximum(other), one.minimum(other)]

    def rows(self, places: Tensor) -> Tensor:
        """Whole rows, shape ``[places, columns]``."""
        below = torch.arange(len(self.matrix), device=places.device) <= places[:, None]
        return torch.where(below, self.matrix[places], self.matrix.index_select(1, places).T)

    def eliminate(self, places: Tensor, across: Tensor) -> None:
        """Take columns out: H becomes the inverse of what is left of G + δI.

        Args:
            across: ``L⁻¹ H_P`` for the rows H_P of the places and ``LLᵀ = H_PP``.
        """
        add_product(self.matrix, across, across, alpha=-1)

    def keep(self, places: Tensor) -> None:
        """Forget all other columns, which were eliminated."""
        self.matrix = self.matrix.index_select(0, places).index_select(1, places)


@dataclass
class _OfFew(Inverse):
    """The same as ``(I − SᵀS) / δ`` where G is XᵀX with few rows X: the matrix is ``S = L⁻¹ X`` with
    ``LLᵀ = XXᵀ + δI``, in high precision, since little is left of the unit matrix where a column is large.
    """

    raised: float
    dtype: torch.dtype

    def blocks(self, at: Tensor) -> Tensor:
        columns, unit = self.matrix.T[at], at[:, :, None] == at[:, None, :]
        return ((columns @ -columns.mT).add_(unit) / self.raised).to(self.dtype)

    def rows(self, places: Tensor) -> Tensor:
        unit = places[:, None] == torch.arange(self.matrix.shape[1], device=places.device)
        return ((-self.matrix[:, places].T @ self.matrix).add_(unit) / self.raised).to(self.dtype)

    def eliminate(self, places: Tensor, across: Tensor) -> None:
        columns = self.matrix[:, places]
        unit = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
        factor = raised_root(unit - columns @ columns.T, 0.0)
        self.matrix = torch.linalg.solve_triangular(factor, self.matrix, upper=False)

    def keep(self, places: Tensor) -> None:
        self.matrix = self.matrix.index_select(1, places)


def damped_inverse(columns: Columns, gram: Tensor, damping: float) -> Inverse:
    """``(G + δI)⁻¹`` of the columns; with few rows X that is ``(I − Xᵀ (XXᵀ + δI)⁻¹ X) / δ``.

    δ is ``damping`` of the mean of G's diagonal, but more than what rounding can have made of G, which adds
    up products of float32 or of less: where few columns are ever anything but zero, or what is left of them
    without their means is small beside the means, the damping alone would be lost in it.

    Args:
        columns: the block.
        gram: G, of which the means may have been taken out, or X; G's diagonal is raised in place.

    Raises:
        CalibrationError: G is not finite.
    """
    assert columns.norms is not None
    energy, mean = float(columns.norms.square().sum()), float(diagonal_of(gram).mean())
    raised = max(damping * mean, ROUNDING * energy) if energy != 0 else 1.0
    try:
        if not is_few(gram):
            return Inverse(torch.cholesky_inverse(raised_root(gram, raised)))
        x = gram.to(precise(gram.device))
        factor = raised_root(x @ x.T, raised)
    except CalibrationError as error:
        raise CalibrationError(f"what was seen at '{columns.name}' {error}") from None
    solved = torch.linalg.solve_triangular(factor, x, upper=False)
    if _FEWER * len(solved) <= solved.shape[1]:
        return _OfFew(solved, raised, gram.dtype)
    # Little is left of the unit matrix where a column is large: it is rounded after the difference.
    inverse = torch.eye(solved.shape[1], dtype=gram.dtype, device=gram.device)
    add_product(inverse, solved, solved, alpha=-1)
    return Inverse(inverse.div_(raised))


def raised_root(matrix: Tensor, raised: float) -> Tensor:
    """L with ``LLᵀ = M + δI``, lower triangular, for the first sum δ of ``raised``, ten times that and so on
    that leaves it positive; the diagonal of M is raised in place.

    Raises:
        CalibrationError: M is not finite.
    """
    while math.isfinite(raised):
        matrix.diagonal().add_(raised)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        raised = 10 * raised or ROUNDING * float(matrix.diagonal().abs().mean()) or 1.0
    raise CalibrationError("is not finite; check the calibration data and the model's dtype")
