"""The consumers of an analysis' groups, what is seen at them, and in which order channel sets go by that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fasp_fx.analysis import Analysis, Group, Use
from fasp_fx.capturing import attribute
from fasp_fx.errors import ArgumentError, CalibrationError

from ._matrices import ConsumerMatrices, bias_of
from ._obs import DAMPING, centred_of, damped_inverse
from ._products import ObservedProducts, row_scores, sets_in
from ._scoring import ByColumns, Columns, GroupColumns, GroupScore, Order, by_set, by_value
from ._statistics import (
    PADDING,
    InputGradients,
    MakeStatistic,
    SplitGram,
    Statistic,
    diagonal_of,
    is_few,
    whole,
)


class Consumer:
    """One weight read as matrices, with all uses that read it so, and for each block a Gram matrix and what a
    score asked for.

    Attributes:
        grams: one for each block, once its input was seen; behind the columns come a column of ones, where
            there is an intercept, and those of the drift.
        intercept: the bias that a repair may change along, by name, if there is one.
        drift_rows: how many rows the consumer has where what earlier removals changed of its output is seen
            as well; else 0.
        seen: for each block, the statistics that a score asked for, by name.
    """

    def __init__(self, analysis: Analysis, use: Use) -> None:
        self.matrices = ConsumerMatrices(use, analysis.walk.values)
        self.weight = use.weight
        self.uses: list[Use] = []
        self.grams: list[SplitGram] | None = None
        self.intercept: str | None = None
        self.drift_rows = 0
        self.seen: list[dict[str, Statistic]] = []

    def check_finite(self) -> None:
        """Refuse what its Gram matrices were shown, if it is not finite.

        Raises:
            CalibrationError: it is not; names the weight.
        """
        parts = (part for gram in self.grams or () for part in gram.parts)
        if not all(bool(torch.isfinite(part.diagonal()).all()) for part in parts):
            raise CalibrationError(
                f"the input of '{self.weight}' is not finite on the calibration data; check the batches and"
                " the model's dtype"
            )

    def prepare(
        self,
        wanted: Mapping[str, MakeStatistic],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make the Gram matrices and the statistics of each block, where they are not there yet.

        Args:
            dtype: what Gram matrices are added up in.
        """
        blocks, columns = self.matrices.columns.shape[:2]
        if self.grams is None:
            width = columns + (self.intercept is not None) + self.drift_rows
            self.grams = [SplitGram(width, device, dtype) for _ in range(blocks)]
        self.seen = self.seen or [{} for _ in range(blocks)]
        for seen in self.seen:
            seen.update({name: make(columns, device) for name, make in wanted.items() if name not in seen})

    def see(
        self,
        pieces: Iterable[tuple[int, Tensor, Tensor]],
        takes: Callable[[Statistic], bool],
        drift: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        """Add tokens, without gradients.

        Args:
            pieces: block, tokens ``[tokens, columns]`` and their roles ``[tokens]``.
            takes: which statistics they are for, besides the Gram matrices.
            drift: of a consumer of one piece, what the output is to make up for, ``[tokens, rows]``.
            weight: how much a token counts that is no padding.
        """
        assert self.grams is not None
        for block, tokens, roles in pieces:
            ones = [] if self.intercept is None else [tokens.new_ones((len(tokens), 1))]
            self.grams[block].update(
                torch.cat([tokens, *ones, *([] if drift is None else [drift])], 1), roles, weight
            )
            for statistic in filter(takes, self.seen[block].values()):
                statistic.update(tokens.clone(), None, counting(roles, tokens) * weight)

    @property
    def statistics(self) -> list[Any]:
        """What a score asked for, of all blocks, in an order that is always the same."""
        return [statistic for seen in self.seen for _, statistic in sorted(seen.items())]

    def gone(self, gone: np.ndarray) -> np.ndarray:
        """Which columns go, shape ``[blocks, columns]``."""
        return np.append(gone, False)[self.matrices.columns].any(-1)  # the last entry serves NONE (-1)

    def blocks_gone(self, gone: np.ndarray) -> np.ndarray:
        """Which blocks go whole, shape ``[blocks]``."""
        numbers = self.matrices.use.block_numbers
        return np.zeros(len(self.matrices.columns), dtype=bool) if numbers is None else gone[numbers]


class Consumers:
    """All consumers of the groups that can be pruned.

    Args:
        is_repaired: whether they are to be repaired, with an intercept where there is a bias.
        within: the path of the submodule that was captured, if it was none of the whole model.
    """

    def __init__(self, analysis: Analysis, is_repaired: bool = True, within: str = "") -> None:
        self.analysis, self.is_repaired, self.within = analysis, is_repaired, within
        self.by_key: dict[tuple[Any, ...], Consumer] = {}
        self.of_group = {
            group.name: list(dict.fromkeys(self.of(use) for use in group.uses)) for group in analysis.chosen
        }
        self.products = ObservedProducts(analysis, analysis.chosen)
        for consumer in self if is_repaired else ():
            consumer.intercept = bias_of(analysis, consumer.uses, consumer.matrices)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(self.by_key.values())

    def of(self, use: Use) -> Consumer:
        """The consumer that a use belongs to."""
        new = Consumer(self.analysis, use)
        consumer = self.by_key.setdefault(new.matrices.key, new)
        if use not in consumer.uses:
            consumer.uses.append(use)
        return consumer

    def weight(self, consumer: Consumer) -> Tensor:
        """A consumer's weight as the program has it."""
        return cast(Tensor, attribute(self.analysis.program.module, consumer.weight).detach())

    def keep_gradients(self) -> None:
        """Keep nothing of what was seen but what needs gradients: later passes see other activations."""
        self.products.keep_effects()
        for consumer in self:
            consumer.grams, consumer.drift_rows = None, 0
            consumer.seen = [
                {name: statistic for name, statistic in seen.items() if statistic.needs_gradient}
                for seen in consumer.seen
            ]

    def forget(self) -> None:
        """Keep nothing of what was seen."""
        self.products = ObservedProducts(self.analysis, self.analysis.chosen)
        for consumer in self:
            consumer.grams, consumer.drift_rows, consumer.seen = None, 0, []

    def view(self, group: Group, deepest: int, weight_of: Callable[[Consumer], Tensor]) -> GroupColumns:
        """A group as a score sees it.

        Args:
            deepest: how many channel sets of a block may go at most.
            weight_of: what a consumer's weight is now.
        """
        blocks = [
            columns
            for consumer in self.of_group[group.name]
            for columns in self._columns(group, consumer, weight_of(consumer))
        ]
        return GroupColumns(group.name, np.asarray(group.block_of), blocks, deepest)

    def _columns(self, group: Group, consumer: Consumer, weight: Tensor) -> list[Columns]:
        """A consumer as a score sees it, block by block."""
        labels, has_ones = self.analysis.labels, consumer.intercept is not None
        experts = consumer.matrices.use.block_numbers if group.granularity == "expert" else None
        are_sets = experts is not None and bool(np.isin(labels[experts], group.sets).all())
        blocks = []
        for block, matrix in enumerate(consumer.matrices.read(weight)):
            gram = None if consumer.grams is None else consumer.grams[block]
            numbers, width = consumer.matrices.columns[block], matrix.shape[1]
            if experts is not None and are_sets:  # a block that goes takes all of its columns along
                numbers = np.broadcast_to(experts[block], (len(numbers), 1))
            blocks.append(
                Columns(
                    matrix.clone(),  # what a score does to it in place is its own business
                    None if gram is None else gram.norms()[:width],
                    None if gram is None else partial(_first, gram, width),
                    sets_in(group, labels, numbers),
                    consumer.seen[block] if consumer.seen else {},
                    None if gram is None else partial(_centred, gram, width, has_ones),
                    f"{self.within}, {consumer.weight}, {block}",
                )
            )
        return blocks


def counting(roles: Tensor, tokens: Tensor) -> Tensor:
    """One for each token that counts and zero for padding, as real numbers also where tokens are complex."""
    return (roles != PADDING).to(tokens.dtype.to_real())


def _first(gram: SplitGram, columns: int) -> Tensor:
    """The Gram matrix without what was seen beside the columns."""
    return whole(gram.total())[:columns, :columns]


#: the part of the means that is not taken for granted
STAYING = 1e-3


def _centred(gram: SplitGram, columns: int, has_ones: bool) -> Tensor:
    """The same, or X where it has fewer rows than columns; with ones behind the columns, what is left of it
    without the means of the columns, which an intercept takes over.

    A thousandth of the means stays, as if the ones were damped: of few tokens a mean says little, and all
    columns may be constant.
    """
    total = gram.total()
    x, ones = total[:, :columns], total[:, columns : columns + 1]
    if not is_few(total):
        x, sums = x[:columns], ones[:columns]
        return x - sums @ sums.T / (ones[columns].clamp_min(1.0) * (1 + STAYING)) if has_ones else x
    if has_ones:
        x = x - ones @ (ones.T @ x) * ((1 - (STAYING / (1 + STAYING)) ** 0.5) / ones.sum().clamp_min(1.0))
    return x if is_few(x) else x.T @ x


def order_of(
    consumers: Consumers,
    group: Group,
    score: GroupScore,
    deepest: int,
    weight_of: Callable[[Consumer], Tensor],
) -> Order:
    """The order of one group.

    Args:
        deepest: how many channel sets of a block may go at most.
        weight_of: what a consumer's weight is now.

    Raises:
        ArgumentError: the score returned an order that is none, or cannot say one for a group without
            consumers.
        CalibrationError: a score is not finite.
    """
    view = consumers.view(group, deepest, weight_of)
    if view.consumers:
        return checked(score(view), view)
    if score.needs_data:
        return by_value(view, consumers.products.costs(group))
    if isinstance(score, ByColumns):
        return by_value(view, row_scores(consumers.analysis, group, score, consumers.within))
    raise ArgumentError(
        f"no weight reads the channels of '{view.name}', and {type(score).__name__} orders those of"
        " weights alone; exclude it"
    )


def checked(order: Order, view: GroupColumns) -> Order:
    """What a score returned, as arrays, if it is an order of the group.

    Raises:
        ArgumentError: channel sets of each block do not stand in it once, or not as many as may go, or losses
            do not fit.
    """
    sets, members = np.asarray(order.sets), view.members
    losses = None if order.losses is None else np.asarray(order.losses, np.float64)
    if not (
        np.issubdtype(sets.dtype, np.integer)
        and sets.ndim == 2
        and len(sets) == len(members)
        and sets.shape[1] >= view.deepest
        and all(
            len(np.unique(row)) == len(row) and np.isin(row, of_block).all()
            for row, of_block in zip(sets, members, strict=True)
        )
        and (losses is None or (losses.shape == (sets.shape[1] + 1,) and np.isfinite(losses).all()))
    ):
        raise ArgumentError(
            f"the score returned no order of '{view.name}': give for each of its {len(members)} blocks at"
            f" least {view.deepest} of the block's own channel sets, each once, and as losses None, or one"
            " finite number for each number of channel sets from 0 on"
        )
    return Order(sets.astype(np.int64), losses)


def orders_of(consumers: Consumers, groups: Sequence[Group], score: GroupScore) -> dict[str, Order]:
    """The order of each group, with its losses.

    A score that predicts losses gives its own. Of another, the order is taken, and each column costs ``½ Q_jj
    √(G_jj / [G⁻¹]_jj)``. Without repair it would cost ``½ Q_jj G_jj``, and ``½ Q_jj / [G⁻¹]_jj`` if all
    others stayed and were repaired (:class:`fasp_fx.calibration.OBS`); since many go that would make up
    for one another, what it costs lies between, and the geometric mean stands for that. What no weight
    reads, but a product of activations, costs what the loss loses with it, or where no loss was run back,
    its part of the product's energy.

    Args:
        consumers: those of the groups, with Gram matrices and, where a loss was given, gradients.
    """
    orders = {}
    for group in groups:
        order = order_of(consumers, group, score, group.deepest_loss, consumers.weight)
        losses = order.losses
        if losses is None:
            view = consumers.view(group, order.sets.shape[1], consumers.weight)
            costs = by_set(view, _column_costs) if group.uses else consumers.products.costs(group)
            losses = np.concatenate([[0.0], np.cumsum(costs[order.sets].sum(0))])
        most = order.sets.shape[1] if group.uses else group.deepest_loss
        orders[group.name] = Order(order.sets[:, :most], losses[: most + 1])
    return orders


def _column_costs(columns: Columns) -> np.ndarray:
    """``½ Q_jj √(G_jj / [G⁻¹]_jj)`` of each column, shape ``[columns]``."""
    gram = centred_of(columns)
    energies = diagonal_of(gram).clamp_min(0)
    each = torch.arange(len(energies), device=gram.device)[:, None]
    alone = energies / damped_inverse(columns, gram, DAMPING).blocks(each)[:, 0, 0]
    squares = columns.weight.abs().to(gram.dtype).square().sum(0)
    gradients = columns.seen.get("gradients")
    if isinstance(gradients, InputGradients) and gradients.tokens:
        mean = gradients.mean()
        curvature = squares * gradients.mean_square() if mean is None else mean.diagonal().to(gram)
    else:  # by the relative squared error of the output
        curvature = squares / (float((squares * energies).sum()) or 1.0)
    return (0.5 * curvature * alone.clamp_min(0).sqrt()).cpu().numpy().astype(np.float64)
