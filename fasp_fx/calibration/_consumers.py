"""The consumers of an analysis' groups, and what is seen at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis._analysis import Analysis
from ..analysis.channels import Use
from ..analysis.groups import Group
from ..capturing._fx import attribute
from ..errors import ArgumentError
from ._matrices import ConsumerMatrices, bias_of, centred, with_ones
from ._products import ObservedProducts, sets_in
from .scoring import Columns, GroupColumns
from .statistics import PADDING, MakeStatistic, SplitGram, Statistic


class Consumer:
    """One weight read as matrices, with all uses that read it so, and for each block a Gram matrix and what a
    score asked for.

    Attributes:
        grams: one for each block, once its input was seen; behind the columns come a column of ones, where
            there is an intercept, and those of ``beside``.
        intercept: the bias that a repair may change along, by name, if there is one.
        beside: how many rows the consumer has where what earlier removals changed of its output is seen as
            well; else 0.
        seen: for each block, the statistics that a score asked for, by name.
    """

    def __init__(self, analysis: Analysis, use: Use) -> None:
        self.matrices = ConsumerMatrices(use, analysis.walk.values)
        self.weight = use.weight
        self.uses: list[Use] = []
        self.grams: list[SplitGram] | None = None
        self.intercept: str | None = None
        self.beside = 0
        self.seen: list[dict[str, Statistic]] = []

    @property
    def blocks(self) -> int:
        """How many blocks it is read as."""
        return len(self.matrices.columns)

    def sees_finite(self) -> bool:
        """Whether all that its Gram matrices were shown is finite."""
        parts = (part for gram in self.grams or () for part in gram.parts)
        return all(bool(torch.isfinite(part.diagonal()).all()) for part in parts)

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
        columns = self.matrices.columns.shape[1]
        if self.grams is None:
            self.grams = [
                SplitGram(columns + (self.intercept is not None) + self.beside, device, dtype)
                for _ in range(self.blocks)
            ]
        if not self.seen:
            self.seen = [{} for _ in range(self.blocks)]
        for seen in self.seen:
            for name, make in wanted.items():
                if name not in seen:
                    seen[name] = made = make(columns, device)
                    if not isinstance(getattr(made, "needs_gradient", None), bool):
                        raise ArgumentError(
                            f"the statistic '{name}', a {type(made).__name__}, does not say whether it needs"
                            " gradients; give its class needs_gradient = True or False"
                        )

    def see(
        self,
        pieces: Iterable[tuple[int, Tensor, Tensor]],
        takes: Callable[[Statistic], bool],
        beside: Tensor | None = None,
    ) -> None:
        """Add tokens, without gradients.

        Args:
            pieces: block, tokens ``[tokens, columns]`` and their marks ``[tokens]``.
            takes: which statistics they are for, besides the Gram matrices.
            beside: of a consumer of one piece, what the output is to make up for, ``[tokens, rows]``.
        """
        assert self.grams is not None
        for block, tokens, kinds in pieces:
            seen = tokens if self.intercept is None else with_ones(tokens)
            self.grams[block].update(seen if beside is None else torch.cat([seen, beside], 1), kinds)
            for statistic in filter(takes, self.seen[block].values()):
                statistic.update(tokens.clone(), None, counting(kinds, tokens))

    def sums(self) -> tuple[list[SplitGram], list[dict[str, Statistic]]]:
        """What is seen of activations as the batches pass: Gram matrices and, for each block, statistics that
        need no gradient.
        """
        return self.grams or [], [
            {name: one for name, one in seen.items() if not one.needs_gradient} for seen in self.seen
        ]

    def gone(self, gone: np.ndarray) -> np.ndarray:
        """Which columns go, shape ``[blocks, columns]``."""
        return np.append(gone, False)[self.matrices.columns].any(-1)  # the last entry serves NONE (-1)

    def blocks_gone(self, gone: np.ndarray) -> np.ndarray:
        """Which blocks go whole, shape ``[blocks]``."""
        own = self.matrices.use.block_numbers
        return np.zeros(len(self.matrices.columns), dtype=bool) if own is None else gone[own]


class Consumers:
    """All consumers of the groups that can be pruned.

    Args:
        repaired: whether they are to be repaired, with an intercept where there is a bias.
        within: the path of the submodule that was captured, if it was none of the whole model.
    """

    def __init__(self, analysis: Analysis, repaired: bool = True, within: str = "") -> None:
        self.analysis, self.within = analysis, within
        self.by_key: dict[tuple[Any, ...], Consumer] = {}
        self.of_group = {
            group.name: list(dict.fromkeys(self.of(use) for use in group.uses)) for group in analysis.chosen
        }
        self.products = ObservedProducts(analysis, analysis.chosen)
        for consumer in self.by_key.values() if repaired else ():
            consumer.intercept = bias_of(analysis, consumer.uses, consumer.matrices)

    def of(self, use: Use) -> Consumer:
        """The consumer that a use belongs to."""
        made = Consumer(self.analysis, use)
        consumer = self.by_key.setdefault(made.matrices.key, made)
        if use not in consumer.uses:
            consumer.uses.append(use)
        return consumer

    def weight(self, consumer: Consumer) -> Tensor:
        """A consumer's weight as the program has it."""
        found: Tensor = attribute(self.analysis.program.module, consumer.weight).detach()
        return found

    def forget_activations(self) -> None:
        """Keep nothing of what was seen but what needs gradients: later passes see other activations."""
        self.products.forget(effects=False)
        for consumer in self.by_key.values():
            consumer.grams = None
            consumer.seen = [
                {name: statistic for name, statistic in seen.items() if statistic.needs_gradient}
                for seen in consumer.seen
            ]

    def forget(self) -> None:
        """Keep nothing of what was seen."""
        self.products.forget()
        for consumer in self.by_key.values():
            consumer.grams, consumer.seen, consumer.beside = None, [], 0

    def view(self, group: Group, deepest: int, weight_of: Callable[[Consumer], Tensor]) -> GroupColumns:
        """A group as a score sees it.

        Args:
            deepest: how many channel sets of a block may go at most.
            weight_of: what a consumer's weight is now.
        """
        own = [
            columns
            for consumer in self.of_group[group.name]
            for columns in self._columns(group, consumer, weight_of(consumer))
        ]
        return GroupColumns(group.name, np.asarray(group.block_of), own, deepest)

    def _columns(self, group: Group, consumer: Consumer, weight: Tensor) -> list[Columns]:
        """A consumer as a score sees it, block by block."""
        labels = self.analysis.labels
        own = consumer.matrices.use.block_numbers
        whole = (
            group.granularity == "expert" and own is not None and bool(np.isin(labels[own], group.sets).all())
        )
        found = []
        for block, matrix in enumerate(consumer.matrices.read(weight)):
            gram = None if consumer.grams is None else consumer.grams[block]
            products = None if gram is None else partial(_first, gram, matrix.shape[1])
            numbers = consumer.matrices.columns[block]
            if whole and own is not None:  # a block that goes takes all of its columns along
                numbers = np.broadcast_to(own[block], (len(numbers), 1))
            found.append(
                Columns(
                    matrix.clone(),  # what a score does to it in place is its own business
                    None if gram is None else gram.norms()[: matrix.shape[1]],
                    products,
                    sets_in(group, labels, numbers),
                    consumer.seen[block] if consumer.seen else {},
                    (
                        products
                        if consumer.intercept is None or gram is None or products is None
                        else partial(_centred, gram, matrix.shape[1])
                    ),
                    f"{self.within}, {consumer.weight}, {block}",
                )
            )
        return found


def counting(kinds: Tensor, tokens: Tensor) -> Tensor:
    """One for each token that counts and zero for padding, as real numbers also where tokens are complex."""
    return (kinds != PADDING).to(tokens.dtype.to_real())


def _first(gram: SplitGram, columns: int) -> Tensor:
    """The Gram matrix without what was seen beside the columns."""
    return gram.symmetric()[:columns, :columns]


def _centred(gram: SplitGram, columns: int) -> Tensor:
    return centred(gram.symmetric(), columns)


__all__ = ["Consumer", "Consumers", "counting"]
