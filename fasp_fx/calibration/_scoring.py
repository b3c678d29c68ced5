"""Scores: in which order the channel sets of a group go. A score knows weights and statistics, nothing of
graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fasp_fx.analysis import by_block
from fasp_fx.errors import ArgumentError, CalibrationError

from ._statistics import MakeStatistic, Statistic


@dataclass(frozen=True)
class Columns:
    """One block of one consumer as a score sees it.

    Attributes:
        weight: the consumer as a matrix, shape ``[rows, columns]``.
        norms: ‖X_j‖₂ of each column's input over the calibration tokens, shape ``[columns]``; ``None`` if
            nothing was observed.
        gram: a function that returns XᵀX, shape ``[columns, columns]``, float32; ``None`` if nothing was
            observed.
        sets: which of the group's channel sets takes a column along, shape ``[columns, axes]``; -1 where none
            does. A column with several goes with any.
        seen: the statistics that the score asked for, by name.
        centred_gram: as ``gram``, but of X without its columns' means where the consumer adds a bias that a
            repair changes along, and so gives the means; X itself where it has fewer rows than columns.
        name: tells the block from others of the model, the same in every run.

    Examples:
        >>> from fasp_fx.calibration import Columns
        >>> def loudest(columns: Columns) -> torch.Tensor:  # a score of one's own: quiet channels go first
        ...     return columns.norms
        >>> fasp_fx.prune(captured, calibration=batches, score=loudest, sparsity=0.3).report.parameters
        (884, 568)
    """

    weight: Tensor
    norms: Tensor | None
    gram: Callable[[], Tensor] | None
    sets: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), dtype=np.int64))
    seen: Mapping[str, Statistic] = field(default_factory=dict)
    centred_gram: Callable[[], Tensor] | None = None
    name: str = ""


@dataclass(frozen=True)
class GroupColumns:
    """One coupled group as a score sees it.

    Attributes:
        name: the group's name.
        block_of: for each channel set, the block that it belongs to, shape ``[sets]``.
        consumers: what loses columns with it, block by block.
        deepest: how many channel sets of a block may go at most; an order need not be longer.

    Examples:
        >>> from fasp_fx.calibration import Columns, GroupColumns, by_set
        >>> columns = Columns(torch.tensor([[1.0, 2.0, 2.0]]), None, None, sets=np.array([[0], [1], [1]]))
        >>> two = GroupColumns("fc.weight", block_of=np.zeros(2, int), consumers=[columns], deepest=1)
        >>> by_set(two, lambda columns: columns.weight.abs().sum(0).numpy())
        array([1., 4.])
    """

    name: str
    block_of: np.ndarray
    consumers: Sequence[Columns]
    deepest: int

    @property
    def members(self) -> list[np.ndarray]:
        """The channel sets of each block."""
        return by_block(self.block_of)


@dataclass(frozen=True)
class Order:
    """In which order channel sets go.

    Attributes:
        sets: for each block, its channel sets from the first that goes on, shape ``[blocks, steps]``.
        losses: the predicted rise of the loss once each block lost 0, 1, 2, … of them, shape ``[steps + 1]``;
            ``None``: the score does not predict it.

    Examples:
        >>> from fasp_fx.calibration import Order
        >>> order = Order(np.array([[2, 0, 1]]))  # one block, whose third channel set goes first
        >>> order.first(1)
        array([2])
    """

    sets: np.ndarray
    losses: np.ndarray | None = None

    def first(self, count: int) -> np.ndarray:
        """The channel sets that go where each block loses so many."""
        return self.sets[:, :count].reshape(-1)


class GroupScore(ABC):
    """A score of whole groups; derive from it what a function of single columns cannot say.

    Attributes:
        statistics: what has to be observed beside the Gram matrix, by name; each is made for a block of a
            consumer with its number of columns.
        needs_data: whether calibration data is needed.

    Examples:
        >>> from fasp_fx.calibration import GroupScore, by_value
        >>> class Last(GroupScore):  # the last channel sets go first
        ...     needs_data = False
        ...     def __call__(self, group):
        ...         return by_value(group, -np.arange(len(group.block_of)))
        >>> last = fasp_fx.prune(captured, score=Last(), restore=None, sparsity=0.3)
        >>> last.plan.groups[0].consumers[0].removed[-1]
        31
    """

    statistics: ClassVar[Mapping[str, MakeStatistic]] = {}
    needs_data: bool = True

    @abstractmethod
    def __call__(self, group: GroupColumns) -> Order:
        """The order in which a group's channel sets go, at least ``group.deepest`` for each block."""


#: the simple kind of score maps one consumer to a value per column, shape ``[columns]``; values of coupled
#: columns and of several consumers are added
ColumnScore = Callable[[Columns], Tensor]
Score = ColumnScore | GroupScore


class ByColumns(GroupScore):
    """The order by a score of single columns, the lowest first.

    Args:
        score: the value of each column.
        needs_data: whether it looks at more than weights.
    """

    def __init__(self, score: ColumnScore, needs_data: bool = True) -> None:
        self.score, self.needs_data = score, needs_data

    def __call__(self, group: GroupColumns) -> Order:
        return by_value(group, by_set(group, self.values))

    def values(self, columns: Columns) -> np.ndarray:
        """The value of each column.

        Raises:
            ArgumentError: the score returned no dense tensor of real numbers, or one of another shape.
        """
        values = dense_numbers("the score", self.score(columns), (columns.weight.shape[1],))
        return values.detach().to("cpu", torch.float64).numpy()


def dense_numbers(what: str, values: Any, shape: tuple[int, ...]) -> Tensor:
    """What code of the user's returned, if it is a tensor of real numbers of a shape.

    Raises:
        ArgumentError: it is none; begins with ``what``.
    """
    is_dense = isinstance(values, Tensor) and values.layout is torch.strided and not values.is_meta
    if not is_dense or values.is_complex() or values.shape != shape:
        raise ArgumentError(f"{what} must return a dense tensor of real numbers, shape {shape}")
    return values


def by_set(group: GroupColumns, values_of: Callable[[Columns], np.ndarray]) -> np.ndarray:
    """The values of all consumers' columns, added up for the channel sets that take them along, shape
    ``[sets]``.

    Args:
        values_of: the value of each column, shape ``[columns]``.

    Examples:
        >>> from fasp_fx.calibration import Columns, GroupColumns, by_set
        >>> columns = Columns(torch.tensor([[1.0, 2.0, 2.0]]), None, None, sets=np.array([[0], [1], [1]]))
        >>> heads = GroupColumns("fc.weight", np.zeros(2, int), [columns], deepest=1)
        >>> by_set(heads, lambda columns: columns.weight.abs().sum(0).numpy())
        array([1., 4.])
    """
    total = np.zeros(len(group.block_of))
    for columns in group.consumers:
        values = values_of(columns)
        for sets in columns.sets.T:
            np.add.at(total, sets[sets >= 0], values[sets >= 0])
    return total


def by_value(group: GroupColumns, values: np.ndarray) -> Order:
    """The order in which the lowest go first.

    Args:
        values: of each channel set, shape ``[sets]``.

    Raises:
        CalibrationError: they are not finite.

    Examples:
        >>> from fasp_fx.calibration import GroupColumns, by_value
        >>> three = GroupColumns("fc.weight", np.zeros(3, int), [], deepest=2)
        >>> by_value(three, np.array([0.5, 0.1, 0.9])).sets
        array([[1, 0, 2]])
    """
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"the scores of group '{group.name}' are not finite; check the weights and the calibration data"
        )
    return Order(np.stack([members[np.argsort(values[members], kind="stable")] for members in group.members]))
