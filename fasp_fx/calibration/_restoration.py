"""Restoration of a consumer on the columns that are kept: a ridge regression whose strength is chosen on
tokens held out, or one of your own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from fasp_fx.base import keep
from fasp_fx.errors import ArgumentError

from ._scoring import dense_numbers
from ._statistics import diagonal_of, energy_of, is_few, joined, precise, whole

#: strengths to choose from, relative to the mean of the Gram matrix's diagonal; beside them stands infinity,
#: which leaves the kept columns as they are
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
#: combinations of the weight's rows on which strengths are compared
SKETCHED = 64


@dataclass(frozen=True)
class Restored:
    """The outcome for one consumer. Errors are ‖X(W − V)ᵀ‖²_F / ‖XWᵀ‖²_F; *before*, V is W with the removed
    columns zero, *after*, it is the restored one.

    Attributes:
        weight: shape ``[rows, columns]``, zero in the removed columns.
        error_before, error_after: over all tokens.
        held_before, held_after: over the tokens held out, *after* for the V that was fitted without them;
            ``None`` where none were.
        used: whether anything was repaired; otherwise ``weight`` holds the kept columns as they were.
        strength: δ relative to the mean of the Gram matrix's diagonal, infinite where nothing was repaired;
            of several blocks the least.
        tokens: how many calibration tokens were seen, of several blocks the fewest.
    """

    weight: Tensor
    error_before: float
    error_after: float
    held_before: float | None
    held_after: float | None
    used: bool
    strength: float
    tokens: int = 0


@dataclass(frozen=True)
class Problem:
    """One consumer (one block of a stacked or grouped one) whose columns M stay, as a restoration of your own
    is given it.

    Attributes:
        weight: W, shape ``[rows, columns]``.
        gram: XᵀX of the calibration tokens, without those held out, shape ``[columns, columns]``, in float32.
        held: XᵀX of the tokens held out, a quarter of all; ``None``: none were.
        kept: M, indices of columns, shape ``[kept]``.
        has_ones: whether the last kept column holds ones, whose coefficients are added to the bias. Its
            weights are zero.

    Examples:
        >>> from fasp_fx.calibration import Problem, damped
        >>> def tikhonov(problem: Problem) -> torch.Tensor:  # a repair of one's own
        ...     return damped(problem.weight, problem.gram, problem.kept, 1e-3)[:, problem.kept]
        >>> repaired = fasp_fx.prune(captured, calibration=batches, restore=tikhonov, sparsity=0.3)
    """

    weight: Tensor
    gram: Tensor
    held: Tensor | None
    kept: Tensor
    has_ones: bool = False


#: A restoration of your own: the weight of the kept columns, shape ``[rows, kept]``. It stays whatever error
#: it makes; the report says which.
Restoration = Callable[[Problem], Tensor]

#: What a consumer is restored by inside the library, its Gram matrices as they are or as X, where that has
#: fewer rows than columns; and the least ridge, relative to the mean of the diagonal.
Restore = Callable[[Problem, float], Restored]


def together(blocks: Sequence[Restored]) -> Restored:
    """The outcome for a consumer of several blocks: weight ``[blocks, rows, columns]``, errors averaged over
    the blocks.
    """
    before = [block.held_before for block in blocks if block.held_before is not None]
    after = [block.held_after for block in blocks if block.held_after is not None]
    return Restored(
        torch.stack([block.weight for block in blocks]),
        fmean([block.error_before for block in blocks]),
        fmean([block.error_after for block in blocks]),
        fmean(before) if before else None,
        fmean(after) if after else None,
        any(block.used for block in blocks),
        min(block.strength for block in blocks),
    )


def ridge(problem: Problem, least: float = 0.0) -> Restored:
    """``V = W (G + δI)[:, M] (G[M, M] + δI)⁻¹``, which minimises ``‖X(W − V)ᵀ‖²_F + δ‖V − W[:, M]‖²_F`` over
    weights V on the columns M.

    This is the least-squares restoration of FASP (arXiv 2501.09412, section 3) with a ridge toward the kept
    weights instead of toward zero: δ → 0 is least squares, δ → ∞ leaves W[:, M] as it is. δ is the one of
    :data:`GRID`, or ∞, whose solution on the fitted tokens has the least error on those held out, which
    follows from their Gram matrix. With it V is solved once more on all tokens. Nothing is repaired where
    that would raise the error over all tokens or over those held out, where none were held out, and where the
    system cannot be solved.

    Args:
        problem: its Gram matrices symmetric, or X, where that has fewer rows than columns. A column of ones
            the ridge takes as if it were as large as the columns are in the mean.
        least: no δ below that is tried.

    Examples:
        >>> from fasp_fx.calibration import Problem, ridge
        >>> gram = torch.ones(2, 2)  # two columns whose inputs are alike: the first can serve for both
        >>> problem = Problem(torch.ones(1, 2), gram, gram, kept=torch.tensor([0]), has_ones=False)
        >>> ridge(problem).weight.round(decimals=2)
        tensor([[2., 0.]])
    """
    solver = _Solver(problem)
    strength, held_factor = solver.choose(least)
    outcome, (whole, held_out) = solver.solved(strength), solver.before
    if outcome.error_after < whole and (outcome.held_after or 0.0) < held_out:
        return replace(outcome, held_after=held_out * held_factor)
    return solver.unchanged()


def restored_by(restoration: Restoration) -> Restore:
    """What a restoration of the user's stands for; arguments of what is returned as for :func:`ridge`.

    Raises:
        ArgumentError: it returned no dense tensor of real numbers, one of another shape, or one that is not
            finite.
    """

    def restore(problem: Problem, least: float) -> Restored:
        weight, judging = problem.weight, problem.held
        # Copies: what it does to them in place is its own business.
        copies = replace(
            problem,
            weight=weight.clone(),
            gram=whole(problem.gram).clone(),
            held=None if judging is None else whole(judging).clone(),
            kept=problem.kept.clone(),
        )
        stored = dense_numbers("restore=", restoration(copies), (len(weight), len(problem.kept))).to(weight)
        if not bool(torch.isfinite(stored).all()):
            raise ArgumentError(
                f"restore= returned a weight that is not finite as {weight.dtype}; return"
                " problem.weight[:, problem.kept] where nothing can be solved"
            )
        return _Solver(replace(problem, has_ones=False)).judged(stored, 0.0)

    return restore


def damped(weight: Tensor, gram: Tensor, kept: Tensor, strength: float) -> Tensor:
    """The solution of :func:`ridge` for one strength, which nothing judges; shape ``[rows, columns]``, zero
    in the removed columns.

    Args:
        weight: shape ``[rows, columns]``.
        gram: XᵀX, shape ``[columns, columns]``, symmetric, in the precision to solve in.
        kept: as for :func:`ridge`.
        strength: δ relative to the mean of the Gram matrix's diagonal. Where the system is singular to
            rounding all the same, nothing is repaired.

    Examples:
        >>> from fasp_fx.calibration import damped
        >>> weight, gram = torch.ones(1, 2), torch.ones(2, 2)  # two columns whose inputs are alike
        >>> damped(weight, gram, kept=torch.tensor([0]), strength=1e-6).round(decimals=3)
        tensor([[2., 0.]])
    """
    order, repaired = _kept_first(kept, weight.shape[1]), weight.clone()
    raised = strength * (float(gram.diagonal().mean()) or 1.0)
    gone = weight[:, order[len(kept) :]].to(gram.dtype)
    repaired[:, order[len(kept) :]] = 0
    if (added := _solve(gram[order[:, None], order], len(kept), gone, raised)) is not None:
        repaired[:, kept] = (weight[:, kept] + added).to(weight.dtype)
    return repaired


def _kept_first(kept: Tensor, columns: int) -> Tensor:
    """The indices of all columns, those that are kept first."""
    removed = torch.ones(columns, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    return torch.cat([kept, removed.nonzero()[:, 0]])


class _Solver:
    """One consumer with its columns in the order [M, P], kept and removed, and Gram matrices scaled so that
    their mean diagonal over all tokens is one.

    V = W_M + Z with Z = W_P G[P, M] (G[M, M] + δI)⁻¹, so that W − V is −Z on M and W_P on P. Errors are
    pairs: over all tokens, and over those held out.
    """

    def __init__(self, problem: Problem) -> None:
        weight, kept, fitted, judging = problem.weight, problem.kept, problem.gram, problem.held
        self.weight, self.kept, self.count, self.judges = weight, kept, len(kept), judging is not None
        self.ones = _size_of_ones(fitted, int(kept[-1])) if problem.has_ones else None
        order = _kept_first(kept, weight.shape[1])
        grams = [self._ordered(gram, order) for gram in (fitted, fitted[:0] if judging is None else judging)]
        scale = sum(float(diagonal_of(gram).mean()) for gram in grams) or 1.0
        self.fitted, self.held = (keep(gram.div_(scale**0.5 if is_few(gram) else scale)) for gram in grams)
        self.rows = weight[:, order].to(torch.promote_types(self.fitted.dtype, weight.dtype))
        self.start, self.gone = self.rows[:, : self.count], self.rows[:, self.count :]
        self.totals = self._energies(self.rows)
        self.before = self._relative(self.gone)

    def _ordered(self, gram: Tensor, order: Tensor) -> Tensor:
        # Little is computed of few rows, and in full precision.
        gram = gram[:, order].to(precise(gram.device)) if is_few(gram) else gram[order[:, None], order]
        if self.ones is not None:
            gram[:, self.count - 1] *= self.ones
            if not is_few(gram):
                gram[self.count - 1] *= self.ones
        return gram

    def choose(self, smallest: float) -> tuple[float, float]:
        """The best strength, and by what factor its solution changes the error on the tokens held out;
        infinity and 1 where none from the smallest on is better than no repair.
        """
        strengths = [strength for strength in GRID if strength >= smallest]
        if not (strengths and self.judges and 0 < self.count < self.rows.shape[1]):
            return math.inf, 1.0
        # By a sketch of the rows; what comes of the best is solved for all of them and judged anew.
        gone = _sketch(self.rows)[:, self.count :].to(self.fitted.dtype)
        before = energy_of(gone, self.held)

        @functools.cache
        def error(place: int) -> float:
            added = self._solve(gone, self.fitted, strengths[place])
            return math.inf if added is None else energy_of(torch.cat([-added, gone], 1), self.held)

        # Downhill from the middle: too weak a ridge fits noise, too strong a one nothing.
        place = len(strengths) // 2
        for step in (1, -1):
            while 0 <= place + step < len(strengths) and error(place + step) < error(place):
                place += step
        return (strengths[place], error(place) / before) if error(place) < before else (math.inf, 1.0)

    def solved(self, strength: float) -> Restored:
        """The solution on all tokens; the kept columns as they are where there is none."""
        added = (
            None
            if math.isinf(strength)
            else self._solve(self.gone, joined(self.fitted, self.held).to(self.gone.dtype), strength)
        )
        stored = None if added is None else (self.start + added).to(self.weight.dtype)
        return self.unchanged() if stored is None else self.judged(stored, strength)

    def judged(self, stored: Tensor, strength: float) -> Restored:
        """A weight of the kept columns with the errors it makes."""
        difference = torch.cat([self.start - stored.to(self.start.dtype), self.gone], 1)
        return self._outcome(stored, self._relative(difference), strength)

    def unchanged(self) -> Restored:
        """The kept columns as they are."""
        return self._outcome(self.weight[:, self.kept], self.before, math.inf)

    def _outcome(self, stored: Tensor, after: list[float], strength: float) -> Restored:
        weight = torch.zeros_like(self.weight).index_copy(1, self.kept, stored)
        if self.ones is not None:
            weight[:, self.kept[-1]] *= self.ones
        held_before, held_after = (pair[1] if self.judges else None for pair in (self.before, after))
        used = not math.isinf(strength)
        return Restored(weight, self.before[0], after[0], held_before, held_after, used, strength)

    def _solve(self, gone: Tensor, gram: Tensor, strength: float) -> Tensor | None:
        """Z for the removed columns of some rows of W; ``None`` if the system is singular to rounding."""
        return _solve(gram, self.count, gone, strength * diagonal_of(gram).mean())

    def _energies(self, rows: Tensor) -> tuple[float, float]:
        """Of the last of the ordered columns."""
        fitted, judging = energy_of(rows, self.fitted), energy_of(rows, self.held)
        return fitted + judging, judging

    def _relative(self, rows: Tensor) -> list[float]:
        pairs = zip(self._energies(rows), self.totals, strict=True)
        return [error / total if total else 0.0 for error, total in pairs]


def _solve(gram: Tensor, count: int, gone: Tensor, raised: Tensor | float) -> Tensor | None:
    """``Z = W_P G[P, M] (G[M, M] + δI)⁻¹``, shape ``[rows, kept]``; ``None`` if the system is singular to
    rounding.

    With few rows X it is ``W_P X_Pᵀ (X_M X_Mᵀ + δI)⁻¹ X_M``, which takes a system of as many unknowns as
    there are rows.

    Args:
        gram: G, or X with few rows; its columns are M, then P.
        count: how many columns are M.
        gone: W_P, shape ``[rows, removed]``.
        raised: δ.
    """
    few, start, across = is_few(gram), gram[:, :count], gram[:count, count:]
    inner = start @ start.T if few else start[:count].clone()
    inner.diagonal().add_(raised)
    factor, failed = torch.linalg.cholesky_ex(inner)
    del inner
    if int(failed):
        return None
    if few:
        added = torch.cholesky_solve(gram[:, count:] @ gone.T, factor).T @ start
    elif gone.shape[1] < len(gone):  # fewer columns went than there are rows to solve for
        added = gone @ torch.cholesky_solve(across, factor).T
    else:
        added = torch.cholesky_solve(across @ gone.T, factor).T
    return added if bool(torch.isfinite(added).all()) else None


def _size_of_ones(gram: Tensor, place: int) -> float:
    """What to multiply ones by, so that they are as large as the columns before them are in the mean."""
    diagonal = diagonal_of(gram)
    count, mean = float(diagonal[place]), float(diagonal[:place].mean()) if place else 0.0
    return (mean / count) ** 0.5 if count > 0 and mean > 0 else 1.0


def _sketch(rows: Tensor) -> Tensor:
    """Random combinations of the rows whose errors are those of all rows in expectation; always the same
    ones.
    """
    if len(rows) <= SKETCHED:
        return rows
    generator = torch.Generator(device="cpu").manual_seed(0)
    mix = torch.randn(SKETCHED, len(rows), generator=generator, dtype=torch.float32, device="cpu")
    return mix.to(rows) @ rows
