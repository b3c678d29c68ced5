"""Gram matrices of the consumers' inputs, accumulated where the model runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fasp_fx.base import keep, zeros

#: columns per block of a symmetric matrix, of which only blocks on and below the diagonal are computed
BLOCK = 384


#: X stands for XᵀX while it has at most one row for so many columns
FEW = 4

#: what a token is for: nothing (padding), fitting a restoration, or judging it
PADDING, FITTED, HELD = 0, 1, 2


class Statistic(Protocol):
    """A sum over the tokens of one block of a consumer, so that batches add up.

    Where processes share the batches it also needs ``reduce(add)``, which replaces each of its sums by what
    ``add`` makes of it (:data:`Add`).

    Attributes:
        needs_gradient: whether the gradient of the loss with respect to the tokens is needed.

    Examples:
        >>> class Count:  # how many tokens there were
        ...     needs_gradient = False
        ...     def __init__(self, columns, device):
        ...         self.count = 0.0
        ...     def update(self, tokens, gradient, weight):
        ...         self.count += float(weight.sum())
        >>> class ByCount(fasp_fx.calibration.GroupScore):
        ...     statistics = {"count": Count}
        ...     def __call__(self, group):
        ...         assert group.consumers[0].seen["count"].count == 4 * 64
        ...         return fasp_fx.calibration.by_value(group, np.arange(len(group.block_of)))
        >>> counted = fasp_fx.prune(captured, calibration=batches, score=ByCount(), sparsity=0.3)
    """

    needs_gradient: ClassVar[bool]

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        """Add some tokens.

        Args:
            tokens: the consumer's input, shape ``[tokens, columns]``.
            gradient: of the summed loss with respect to the tokens as this consumer reads them, of the same
                shape; ``None`` where it was not asked for or cannot be told (a window that slides, an input
                that several blocks share).
            weight: one for each token that counts, zero for padding, shape ``[tokens]``.
        """


#: what a sum becomes where several processes see some tokens each: the sum over all of them
Add = Callable[[Tensor], Tensor]

#: makes a statistic for one block of a consumer, from its number of columns and the device
MakeStatistic = Callable[[int, torch.device], Statistic]


class Gram:
    """Accumulates ``G = XᵀX`` over tokens, on the device of the activations (FASP, section 3): a sum, so
    that it can be all-reduced.

    Each batch's product is one of float32. Added up in float64 these give the same sum in any order, as far
    as float32 can tell, so that it does not matter which process saw which batch. Few rows are kept as they
    are: what is computed of them is less than what is computed of their product (:func:`is_few`). Of more,
    so many are multiplied at a time.

    Args:
        dtype: what products are added up in.

    Attributes:
        tokens: the number of rows of X seen.

    Examples:
        >>> from fasp_fx.calibration import Gram
        >>> gram = Gram(8, x.device)
        >>> for rows in x.split(16):  # batches add up
        ...     gram.update(rows)
        >>> torch.allclose(gram.compact(), x.T @ x, atol=1e-4)
        True
    """

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        # Of X, those that are not in G yet.
        self._rows = torch.empty((0, columns), dtype=torch.float32, device=device)
        self._matrix: Tensor | None = None  # the lower triangle of blocks of G
        self._zeros = partial(zeros, (columns, columns), dtype, device)
        self.tokens = 0

    def update(self, flat: Tensor, weight: float = 1.0) -> None:
        """Add the tokens of one batch, ``[tokens, columns]``, each of which counts so many times."""
        self.tokens += len(flat)
        # Of complex ones the real part of XᴴX, whose diagonal holds the norms.
        parts = [flat.real, flat.imag] if flat.is_complex() else [flat]
        rows = torch.cat([part.to(torch.float32) for part in parts])
        self._rows = torch.cat([self._rows, rows if weight == 1 else rows * weight**0.5])
        if FEW * len(self._rows) > flat.shape[1]:
            self._multiplied()

    def _multiplied(self) -> Tensor:
        """G, with all rows."""
        self._matrix = self._zeros() if self._matrix is None else self._matrix
        add_product(self._matrix, self._rows, self._rows)
        self._rows = self._rows[:0].clone()
        return self._matrix

    def reduce(self, add: Add) -> None:
        """Add what other processes have seen."""
        self.tokens = _added(add, self.tokens)
        if self.tokens:
            self._matrix = add(self._multiplied())

    def round(self) -> None:
        """Keep the sums in float32; nothing is added any more."""
        if self._matrix is not None:
            self._matrix = keep(self._multiplied().to(torch.float32))

    def diagonal(self) -> Tensor:
        """Sums of squares by column, shape ``[columns]``."""
        return diagonal_of(self._rows if self._matrix is None else self._multiplied())

    def compact(self) -> Tensor:
        """The whole matrix, float32, or X itself where it :func:`is_few`."""
        return self._rows.clone() if self._matrix is None else _mirrored(self._multiplied())


def is_few(gram: Tensor) -> bool:
    """Whether a Gram matrix is given by X with ``XᵀX = G``, which has fewer rows than columns."""
    return len(gram) < gram.shape[1]


def whole(gram: Tensor) -> Tensor:
    """The Gram matrix, of which X may be given."""
    return gram.T @ gram if is_few(gram) else gram


def joined(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two Gram matrices, of which X may be given."""
    # A matrix alone has as many rows as columns.
    return torch.cat([one, other]) if len(one) + len(other) < one.shape[1] else whole(one) + whole(other)


def diagonal_of(gram: Tensor) -> Tensor:
    """The diagonal of a Gram matrix, of which X may be given."""
    return gram.square().sum(0) if is_few(gram) else gram.diagonal()


def _mirrored(matrix: Tensor) -> Tensor:
    """The whole of a symmetric matrix of which blocks up to the diagonal are given, float32."""
    mirrored = torch.empty_like(matrix, dtype=torch.float32)
    for start in range(0, len(mirrored), BLOCK):
        stop = min(start + BLOCK, len(mirrored))
        mirrored[start:stop, :start] = matrix[start:stop, :start]
        mirrored[:start, start:stop] = matrix[start:stop, :start].T
        block = matrix[start:stop, start:stop].tril()
        mirrored[start:stop, start:stop] = block + block.tril(-1).T
    return mirrored


def add_product(matrix: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """Add ``α LᵀR``, which is symmetric, to the blocks of a matrix up to its diagonal: just over half of the
    work.

    Args:
        left, right: shape ``[any, columns]``.
    """
    for start in range(0, len(matrix) if len(left) else 0, BLOCK):
        stop = min(start + BLOCK, len(matrix))
        blocks, lines = matrix[start:stop, :stop], left[:, start:stop].T
        if blocks.dtype == left.dtype:
            blocks.addmm_(lines, right[:, :stop], alpha=alpha)
        else:
            blocks.add_(lines @ right[:, :stop], alpha=alpha)


def energy_of(rows: Tensor, gram: Tensor) -> float:
    """``tr(R G Rᵀ)`` for the last columns of a Gram matrix, of which X may be given, as many as the rows
    have, in its precision.
    """
    first, rows = gram.shape[1] - rows.shape[1], rows.to(gram.dtype)
    if is_few(gram):
        return float((gram[:, first:] @ rows.T).square().sum())
    gram, total = gram[first:, first:], 0.0
    for start in range(0, len(gram), BLOCK):
        stop = start + BLOCK
        block, before = rows[:, start:stop], rows[:, :start]
        # It is symmetric: what lies on one side of the diagonal counts twice.
        sides = block @ gram[start:stop, start:stop] + 2 * (before @ gram[:start, start:stop])
        total += float((sides * block).sum())
    return max(total, 0.0)


class SplitGram:
    """Gram matrices of the tokens that a restoration is fitted on and of those held out to judge it.

    Args:
        dtype: what products are added up in.

    Attributes:
        fitted: of the tokens of the role :data:`FITTED`.
        held: of the tokens of the role :data:`HELD`.
    """

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.fitted, self.held = (Gram(columns, device, dtype) for _ in range(2))

    def update(self, tokens: Tensor, roles: Tensor, weight: float = 1.0) -> None:
        """Add tokens ``[tokens, columns]``, each as its role ``[tokens]`` says; each counts so many times."""
        for role, gram in ((FITTED, self.fitted), (HELD, self.held)):
            chosen = roles == role
            if bool(chosen.any()):
                gram.update(tokens if bool(chosen.all()) else tokens[chosen], weight)

    def reduce(self, add: Add) -> None:
        """Add what other processes have seen."""
        for part in (self.fitted, self.held):
            part.reduce(add)

    @property
    def parts(self) -> list[Gram]:
        """Those of tokens that there are: the second only if any were held out."""
        return [self.fitted, self.held] if self.held.tokens else [self.fitted]

    @property
    def tokens(self) -> int:
        """Tokens seen, held out or not."""
        return sum(part.tokens for part in self.parts)

    def norms(self) -> Tensor:
        """‖X_j‖₂ per column over all tokens, shape ``[columns]``, float64."""
        return torch.stack([part.diagonal().double().clamp_min(0) for part in self.parts]).sum(0).sqrt()

    def compact(self) -> list[Tensor]:
        """The Gram matrix of each part, float32, or X itself where it :func:`is_few`."""
        return [part.compact() for part in self.parts]

    def total(self) -> Tensor:
        """The same over all tokens."""
        return reduce(joined, self.compact())


class InputGradients:
    """Accumulates ``HᵀH`` of the gradients of a loss with respect to a consumer's input.

    Since H = gW, the mean is WᵀSW with the covariance S of the gradients g at the consumer's output.

    Where the gradient with respect to the input cannot be told consumer by consumer, the mean square of the
    gradients at its output is kept alone.

    Attributes:
        tokens: how many gradients were seen.
        terms: of how many terms the loss was the sum.

    Examples:
        >>> from fasp_fx.calibration import GroupScore, InputGradients, by_set, by_value
        >>> class Taylor(GroupScore):  # the first-order change of the loss
        ...     statistics = {"gradients": InputGradients}
        ...     def __call__(self, group):
        ...         def values(columns):
        ...             return (columns.seen["gradients"].mean().diagonal().sqrt() * columns.norms).numpy()
        ...         return by_value(group, by_set(group, values))
        >>> first_order = fasp_fx.prune(captured, calibration=batches, score=Taylor(), sparsity=0.3)
    """

    needs_gradient: ClassVar[bool] = True

    def __init__(self, columns: int, device: torch.device) -> None:
        self._gram = Gram(columns, device)
        self.squares, self.tokens, self.terms = 0.0, 0, 0

    def update(self, tokens: Tensor, gradient: Tensor | None, weight: Tensor) -> None:
        """Add gradients; see :class:`Statistic`."""
        if gradient is not None:
            chosen = gradient[weight > 0]
            self._gram.update(chosen)
            self.tokens += len(chosen)

    def update_output(self, gradient: Tensor, count: int) -> None:
        """Add gradients at the output, of any shape.

        Args:
            count: how many of them are of tokens that count; those of padding do not.
        """
        self.squares += float(gradient.detach().abs().float().square().sum())
        self.tokens += count

    def reduce(self, add: Add) -> None:
        """Add what other processes have seen; the number of terms is theirs already."""
        self._gram.reduce(add)
        self.squares = float(add(torch.tensor(self.squares, dtype=torch.float64)))
        self.tokens = _added(add, self.tokens)

    def diagonal(self) -> Tensor:
        """Sums of squared gradients, by column where they are known so, shape ``[columns]`` or ``[1]``."""
        return self._gram.diagonal() if self._gram.tokens else torch.tensor([self.squares])

    def mean(self) -> Tensor | None:
        """The mean of ``hᵀh`` over tokens, for one term of the loss; ``None`` where gradients were seen at
        the output alone.
        """
        return None if (gram := self.compact()) is None else whole(gram)

    def compact(self) -> Tensor | None:
        """The same, or H with ``HᵀH`` equal to it where it :func:`is_few`."""
        if not self._gram.tokens:
            return None
        gram, count = self._gram.compact(), max(self.tokens * self.terms, 1)
        return gram / (count**0.5 if is_few(gram) else count)

    def mean_square(self) -> float:
        """The mean square of the gradients at the output, for one term of the loss."""
        return self.squares / max(self.tokens * self.terms, 1)


def _added(add: Add, number: int) -> int:
    return int(add(torch.tensor(int(number), dtype=torch.int64)))


def precise(device: torch.device) -> torch.dtype:
    """The most precise dtype for solves on a device."""
    return torch.float32 if device.type == "mps" else torch.float64
