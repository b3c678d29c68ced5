"""Exact losses after repair, and the greedy order by them: the structured form of Optimal Brain Surgeon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ._inverse import ROUNDING, damped_inverse, raised_root
from ._scoring import NAMED, ByColumns, Columns, GroupColumns, GroupScore, Order, Score
from ._statistics import InputGradients, MakeStatistic, diagonal_of, energy_of, is_few, whole

#: the diagonal of the Gram matrix is raised by this part of its mean, as OSSCAR (arXiv 2403.12983) and ZipLM
#: (2302.04089) do
DAMPING = 1e-2
#: a group's channel sets go in about so many rounds; between rounds the losses of those that stay are
#: computed anew
ROUNDS = 48
#: the part of the curvature that is taken to be the same for all rows, since few batches say little of single
#: ones
SHRINKAGE = 0.1


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
        problems = []
        for columns in group.consumers:
            gram = centred_of(columns)
            root = self.root(columns, gram)
            problems.append(Elimination(columns, len(group.block_of), gram, root, DAMPING))
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
        if (
            places < 0
        ).all():  # they have no column here, and of an expert that went no column is left at all
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
    function = {"obs": OBS(), **NAMED}[score] if isinstance(score, str) else score
    return function if isinstance(function, GroupScore) else ByColumns(function)
