"""Channels contracted between two activations (rows of W_Q and W_K): how much their product or the loss would
lose without some.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fasp_fx.analysis import Analysis, Group, Product, Repeating, repeating
from fasp_fx.base import device_of
from fasp_fx.capturing import Runner, attribute

from ._ranks import Ranks
from ._roles import TokenRoles
from ._scoring import ByColumns, Columns
from ._statistics import PADDING, precise

#: what is seen of a product besides its operands, 0 and 1
EFFECT = "effect"


class ObservedProducts:
    """What is seen of the operands of products, channel by channel.

    Channel i adds the matrix q_i k_iᵀ to the product of queries and keys, whose Frobenius norm is ‖q_i‖₂
    ‖k_i‖₂: that is its score, where ‖q_i‖₂ runs over all that a channel set holds of an operand (every head
    and layer that shares one table of rotations, say). Several products are added.

    Where a loss is run back, h_ti is its gradient with respect to the query's channel i at token t, so that
    to first order the loss falls by q_ti h_ti without it. The mean of the squares over the loss' terms is the
    curvature by Fisher's information, and half of it what the channel costs: the unit of the costs of
    consumers (:class:`fasp_fx.calibration.OBS`).

    Args:
        groups: those that can be pruned; products decide those of them that no weight reads.

    Attributes:
        terms: of how many terms the loss was the sum.
    """

    def __init__(self, analysis: Analysis, groups: list[Group]) -> None:
        self.analysis = analysis
        self.of_group = {
            group.name: [
                product
                for product in analysis.walk.facts.products
                if np.isin(analysis.labels[product.numbers], group.sets).any()
            ]
            for group in groups
            if not group.uses
        }
        #: sums of squares of a product's operands, 0 and 1, and of the effects of the first, for each of its
        #: channel numbers
        self._sums: dict[tuple[Product, int | str], Tensor] = {}
        self.terms = 0

    @property
    def all(self) -> list[Product]:
        """The products of all groups, each once."""
        return list(dict.fromkeys(product for products in self.of_group.values() for product in products))

    def of(self, group: Group) -> list[Product]:
        """The products that decide a group: those of one without consumers."""
        return self.of_group.get(group.name, [])

    def observe(self, runner: Runner, roles: TokenRoles, products: list[Product], ranks: Ranks) -> None:
        """Add the squares of the operands of products about to be executed, without padding, over the batches
        of all processes.
        """
        for product in products:
            for operand, node in enumerate(product.operands):
                for number, batch in zip(runner.numbers, runner.read(node), strict=True):
                    self.see(product, operand, batch, roles, number)
                self.add_up(product, operand, ranks, runner.device)

    def see(self, product: Product, what: int | str, value: Tensor, roles: TokenRoles, number: int) -> None:
        """Add the squares of one operand of a product, or of its effects, in one batch, without padding."""
        operand = 0 if what == EFFECT else int(what)
        squares = value.detach().abs().to(torch.float32).square()
        for layout in layouts_along(self.analysis, product, operand):
            sizes = enumerate(zip(layout.numbers.shape, layout.varies, strict=True))
            tokens = [dim for dim, (size, varies) in sizes if size == 1 or varies]
            counts = roles.of(number, product.operands[operand], value, tokens) != PADDING
            more = layout.summed((squares * counts).to(precise(value.device))).reshape(-1)
            numbers = layout.numbers.numpy().reshape(-1)
            shared = np.isin(numbers, product.numbers)
            place = torch.from_numpy(np.searchsorted(product.numbers, numbers[shared])).to(more.device)
            self._sum(product, what, more.device).index_add_(0, place, more[torch.from_numpy(shared)])

    def _sum(self, product: Product, what: int | str, device: torch.device) -> Tensor:
        return self._sums.setdefault(
            (product, what), torch.zeros(len(product.numbers), dtype=precise(device), device=device)
        )

    def add_up(
        self, product: Product, what: int | str, ranks: Ranks, device: torch.device | None = None
    ) -> None:
        """Add what other processes have seen of an operand or of effects; this one may have seen none.

        Args:
            device: where the program runs; ``None``: where it is.
        """
        ranks.add(self._sum(product, what, device or device_of(self.analysis.program.module)))

    def effects(self) -> list[Tensor]:
        """The sums of the squared effects."""
        return [value for (_, what), value in self._sums.items() if what == EFFECT]

    def keep_effects(self) -> None:
        """Keep nothing of what was seen but effects on the loss."""
        self._sums = {key: value for key, value in self._sums.items() if key[1] == EFFECT}

    def costs(self, group: Group) -> np.ndarray:
        """What each channel set of a group costs, in the order of ``group.sets``: by its effects on the loss,
        or where no loss was run back, half its part of the squared scores.
        """
        products = self.of(group)
        if products and all((product, EFFECT) in self._sums for product in products):
            effects: np.ndarray = np.sum([self._by_set(group, one, EFFECT) for one in products], 0)
            return 0.5 * effects / max(self.terms, 1)
        scores = np.zeros(group.size)
        for product in products:
            energies = [self._by_set(group, product, operand) for operand in range(len(product.operands))]
            scores += np.prod(np.sqrt(energies), 0)
        return 0.5 * scores**2 / max(float((scores**2).sum()), 1e-300)

    def _by_set(self, group: Group, product: Product, what: int | str) -> np.ndarray:
        """What was seen of a product, added up for the channel sets of a group."""
        total = np.zeros(group.size)
        _add(total, group, self.analysis, product.numbers, self._sums[product, what].cpu().numpy())
        return total

    def cut(self, runner: Runner, products: list[Product], gone: np.ndarray) -> None:
        """Take removed channels out of products about to be executed: zeros in the first operand."""
        kept = torch.from_numpy(~np.append(gone, False))  # the last entry serves NONE (-1)
        for product in products:
            for layout in layouts_along(self.analysis, product, 0):
                runner.change(product.operands[0], partial(_masked, kept, layout))


def _masked(kept: Tensor, layout: Repeating, value: Tensor) -> Tensor:
    """An operand with zeros in the channels that go; which are kept is given by channel number."""
    return value * kept[layout.at(value.shape)].to(value)


def layouts_along(analysis: Analysis, product: Product, operand: int) -> list[Repeating]:
    """How the channels that a product sums over lie along one of its operands."""
    node = product.operands[operand]
    axes = [
        axis.numbers
        for axis in analysis.walk.values[node].axes
        if np.isin(axis.numbers.numpy(), product.numbers).any()
    ]
    # A node that a pass has written may have none: nothing is known then of sizes that vary.
    recorded = node.meta.get("val")
    layouts = [repeating(numbers, numbers.shape if recorded is None else recorded.shape) for numbers in axes]
    return [layout for layout in layouts if layout is not None]  # the analysis leaves others whole


def row_scores(analysis: Analysis, group: Group, score: ByColumns, within: str) -> np.ndarray:
    """Without data, one value for each channel set: the score of the producers' rows, added up.

    Args:
        within: the path of the submodule that was captured, if it was none of the whole model.
    """
    total = np.zeros(group.size)
    for slot in group.slots:
        is_whole = slot.kind == "weight" and slot.block_dim is None
        weight = attribute(analysis.program.module, slot.name) if is_whole else None
        if isinstance(weight, Tensor) and weight.dim() > 1 and weight.is_floating_point():
            rows = weight.detach().movedim(slot.dim, -1).reshape(-1, weight.shape[slot.dim])
            columns = Columns(rows, None, None, name=f"{within}, {slot.name}, {slot.dim}, 0")
            _add(total, group, analysis, slot.numbers().numpy(), score.values(columns))
    return total


def _add(
    total: np.ndarray, group: Group, analysis: Analysis, numbers: np.ndarray, values: np.ndarray
) -> None:
    sets = sets_in(group, analysis.labels, numbers)
    np.add.at(total, sets[sets >= 0], values[sets >= 0])


def sets_in(group: Group, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For channel numbers of any shape, which of a group's channel sets each belongs to, counted in the order
    of ``group.sets``; -1 where none.

    Args:
        labels: the channel set of each channel number.
    """
    place = np.full(len(labels) + 1, -1)  # of each channel set; the last entry serves NONE (-1)
    place[group.sets] = np.arange(group.size)
    return place[np.where(numbers >= 0, labels[np.maximum(numbers, 0)], -1)]
