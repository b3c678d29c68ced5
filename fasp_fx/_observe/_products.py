"""Channels contracted between two activations: how much their product would lose, and what is left of it without some."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..analysis import Analysis
from ..channels import Axis, Product, Slot, attribute
from ..groups import Group
from ..scoring import ByColumns, Columns
from ..statistics import PADDING, precise
from ._consumers import sets_in
from ._marks import Marks
from ._ranks import Ranks
from ._runner import Runner


class ObservedProducts:
    """Norms of the operands of products, channel by channel.

    Channel i adds the matrix q_i k_iᵀ to the product of queries and keys, whose Frobenius norm is ‖q_i‖₂ ‖k_i‖₂: that is its score, where ‖q_i‖₂ runs over
    all that a channel set holds of an operand (every head and layer that shares one table of rotations, say). Several products are added.
    """

    def __init__(self, analysis: Analysis, groups: list[Group]) -> None:
        self.analysis = analysis
        self.of_group: dict[str, list[Product]] = {}
        for group in groups:
            if not group.uses:
                self.of_group[group.name] = [p for p in analysis.walk.facts.products if np.isin(analysis.labels[p.numbers], group.sets).any()]
        self._squares: dict[tuple[int, int, int], Tensor] = {}

    def of(self, group: Group) -> list[Product]:
        """The products that decide a group: those of one without consumers."""
        return self.of_group.get(group.name, [])

    def observe(self, runner: Runner, marks: Marks, products: list[Product], ranks: Ranks) -> None:
        """Add the squares of the operands of products about to be executed, without padding, over the batches of all processes."""
        for product in products:
            for operand, axes in enumerate(self._axes(product)):
                node = product.operands[operand]
                for number, batch in zip(runner.numbers, runner.read(node), strict=True):
                    for index, axis in enumerate(axes):
                        rest = [dim for dim, size in enumerate(axis.numbers.shape) if size == 1]
                        counts = marks.of(number, node, batch, rest) != PADDING
                        key = (id(product), operand, index)
                        square = (batch.detach().abs().to(torch.float32).square() * counts).sum(rest, keepdim=True).to(precise(batch.device))
                        self._squares[key] = self._squares[key] + square if key in self._squares else square
                for index in range(len(axes)):
                    ranks.add(self._squares[id(product), operand, index])

    def scores(self, group: Group) -> np.ndarray:
        """One value for each channel set of a group, in the order of ``group.sets``."""
        total = np.zeros(group.size)
        for product in self.of(group):
            worth = np.ones(group.size)
            for operand, axes in enumerate(self._axes(product)):
                held = np.zeros(group.size)
                for index, axis in enumerate(axes):
                    _add(held, group, self.analysis, axis.numbers.reshape(-1).numpy(), self._squares[id(product), operand, index].cpu().numpy().reshape(-1))
                worth *= np.sqrt(held)
            total += worth
        return total

    def cut(self, runner: Runner, products: list[Product], gone: np.ndarray) -> None:
        """Take removed channels out of products about to be executed: zeros in the first operand."""
        kept = torch.from_numpy(~np.append(gone, False))  # the last entry serves NONE (-1)
        for product in products:
            for axis in self._axes(product)[0]:
                runner.multiply(product.operands[0], kept[axis.numbers])

    def _axes(self, product: Product) -> list[list[Axis]]:
        """The axes of each operand that the product sums over."""
        values = self.analysis.walk.values
        return [[axis for axis in values[node].axes if np.isin(axis.numbers.numpy(), product.numbers).any()] for node in product.operands]


def row_scores(analysis: Analysis, group: Group, score: ByColumns) -> np.ndarray:
    """Without data, one value for each channel set: the score of the producers' rows, added up."""
    total = np.zeros(group.size)
    for slot in group.slots:
        weight = attribute(analysis.program.module, slot.name) if slot.kind == "weight" else None
        if isinstance(weight, Tensor) and weight.dim() > 1 and weight.is_floating_point():
            for numbers, piece in _blocks(slot, weight.detach()):
                rows = piece.movedim(slot.dim, -1).reshape(-1, piece.shape[slot.dim])
                _add(total, group, analysis, numbers, score.values(Columns(rows, None, None)))
    return total


def _blocks(slot: Slot, weight: Tensor) -> list[tuple[np.ndarray, Tensor]]:
    numbers = slot.numbers().numpy()
    if slot.block_dim is None:
        return [(numbers, weight)]
    return list(zip(numbers, weight.chunk(slot.blocks, slot.block_dim), strict=True))


def _add(total: np.ndarray, group: Group, analysis: Analysis, numbers: np.ndarray, values: np.ndarray) -> None:
    sets = sets_in(group, analysis.labels, numbers)
    np.add.at(total, sets[sets >= 0], values[sets >= 0])
