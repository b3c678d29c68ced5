"""Calibrate, choose, restore: the batches wait before each node that reads what a group loses, which is
observed there; a group is decided once all its consumers were seen, and a consumer repaired once all its
groups are decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis import Group, Product, Use
from fasp_fx.base import float32_products
from fasp_fx.capturing import Runner, arguments, same_sizes
from fasp_fx.patterns import CASTS, CHECKS, RESHAPES, affine, lookup

from ._consumers import Consumer, Consumers
from ._journal import Ledger
from ._matrices import ConsumerMatrices, states_before
from ._ranks import Ranks
from ._repair import Decision, Repairs, nothing, warn_of_few
from ._restoration import Restore
from ._roles import TokenRoles
from ._statistics import MakeStatistic, precise

#: which channel sets of a group go, by their places among those of the group; is given what the weight of a
#: consumer is now
Choose = Callable[[Callable[[Consumer], Tensor]], np.ndarray]
#: for each group that loses anything, by name, what says which of its channel sets go
Choices = Mapping[str, Choose]


def without_data(consumers: Consumers, choices: Choices) -> Decision:
    """What goes where nothing is observed."""
    decision = nothing(consumers.analysis)
    for group in consumers.analysis.chosen:
        if group.name in choices:
            decision.take(consumers.analysis, group, choices[group.name](consumers.weight))
    return decision


@dataclass(frozen=True)
class ObservationPoint:
    """A node before which the batches wait.

    Attributes:
        uses: what is read there, by consumer, and whether the consumer is read nowhere later.
        products: those of activations that are about to be executed.
        groups: those that are decided there.
        consumers: those all of whose groups are decided then.
        cut: the products that lose channels there.
    """

    node: fx.Node
    uses: list[tuple[Consumer, list[Use], bool]]
    products: list[Product]
    groups: list[Group]
    consumers: list[Consumer]
    cut: list[Product]


def points_of(consumers: Consumers, place: Callable[[fx.Node], int]) -> list[ObservationPoint]:
    """Where the batches wait, in graph order, so that every group is decided.

    Args:
        place: of a node in graph order.
    """
    groups, of_group, of = consumers.analysis.chosen, consumers.of_group, consumers.products.of
    readers = {
        group.name: [use.node for use in group.uses] + [product.node for product in of(group)]
        for group in groups
    }
    order = sorted({node for nodes in readers.values() for node in nodes}, key=place)
    # Where all that decides a group has been seen.
    last = {name: max(nodes or order[:1], key=place) for name, nodes in readers.items() if order}
    ends = {consumer: max(consumer.uses, key=lambda use: place(use.node)).node for consumer in consumers}
    closes = {
        consumer: max((last[name] for name, some in of_group.items() if consumer in some), key=place)
        for consumer in consumers
    }
    points = []
    for node in order:
        ready = [group for group in groups if last[group.name] is node]
        uses = ((each, [use for use in each.uses if use.node is node]) for each in consumers)
        touched = dict.fromkeys(consumer for group in ready for consumer in of_group[group.name])
        points.append(
            ObservationPoint(
                node,
                [(consumer, here, ends[consumer] is node) for consumer, here in uses if here],
                [product for product in consumers.products.all if product.node is node],
                ready,
                [consumer for consumer in touched if closes[consumer] is node],
                [product for group in ready for product in of(group) if product.node is node],
            )
        )
    return points


@dataclass(frozen=True)
class Visit:
    """How the consumers of a program are visited.

    Attributes:
        consumers: those whose groups are decided, with what was seen at them before.
        choices: which channel sets go.
        statistics: what is observed beside Gram matrices, by name.
        restore: repairs a consumer; ``None``: what stays is left as it is.
        roles: what the tokens of the batches are for.
        precision: of products of float32 while batches run and are observed; scores and repairs are computed
            in full.
    """

    consumers: Consumers
    choices: Choices
    statistics: Mapping[str, MakeStatistic]
    restore: Restore | None
    roles: TokenRoles
    precision: str

    def run(
        self, runner: Runner, drift: Drift | None, ledger: Ledger, progress: Callable[[float], None]
    ) -> Decision:
        """Visit all consumers in graph order.

        Args:
            runner: runs the batches of this process.
            drift: what repairs are to make up for; ``None``: nothing.
            ledger: decides, together with the other processes.

        Warns:
            CalibrationWarning: the data are too few to repair with; once for all consumers.
        """
        consumers, analysis = self.consumers, self.consumers.analysis
        decision = nothing(analysis)
        repairs = Repairs(consumers, runner, self.restore, drift.strength if drift else 0.0, decision)
        self.roles.unmatched |= {node: None for node in runner.nodes if node.name in ledger.unmatched}
        points = points_of(consumers, runner.index)
        for count, point in enumerate(points):
            is_new, decide = count >= ledger.points, partial(ledger.decide, count)
            with float32_products(self.precision):
                for each in (runner, drift.dense) if drift else (runner,):
                    each.advance(each.index(point.node))
                if is_new:
                    self.observe(point, runner, drift, ledger.ranks)
                consumers.products.observe(runner, self.roles, point.products, ledger.ranks)
            for group in point.groups:
                if choose := self.choices.get(group.name):
                    chosen = decide(partial(_chosen, choose, repairs))
                    decision.take(analysis, group, chosen["weight"].numpy())
            for consumer in point.consumers:
                repairs.finish(consumer, decide)
            consumers.products.cut(runner, point.cut, decision.gone)
            # Nothing that was seen may still be waited with.
            if is_new and all(consumer.grams is None for consumer in consumers):
                ledger.commit(count + 1, [node.name for node in self.roles.unmatched])
            progress((count + 1) / len(points))
        if self.roles.unmatched:
            decision.notes.append(self.roles.remark())
        decision.notes.extend(warn_of_few(decision.outcomes))
        return decision

    def observe(self, point: ObservationPoint, runner: Runner, drift: Drift | None, ranks: Ranks) -> None:
        """Observe what a node is about to read; of a consumer that is read nowhere later, add up what all
        processes saw.
        """
        for consumer, uses, is_last in point.uses:
            for use in uses:
                changes = drift.of(use) if drift is not None and len(consumer.uses) == 1 else None
                self._observe(consumer, use, runner, changes)
            if is_last:
                grams = consumer.grams or []
                ranks.add_up([*grams, *(one for one in consumer.statistics if not one.needs_gradient)])
                for part in (part for gram in grams for part in gram.parts):
                    part.round()
                consumer.check_finite()

    def _observe(
        self, consumer: Consumer, use: Use, runner: Runner, changes: Iterator[Tensor] | None
    ) -> None:
        matrices = ConsumerMatrices(use, self.consumers.analysis.walk.values)
        ends = [None] * len(runner.numbers) if use.route is None else list(runner.read(use.route))
        consumer.drift_rows = (
            0 if changes is None else consumer.matrices.rows(self.consumers.weight(consumer))
        )
        for batch, activation, end in zip(runner.numbers, _inputs(runner, use), ends, strict=True):
            consumer.prepare(self.statistics, activation.device, precise(activation.device))
            # Statistics that need gradients were shown the dense model's before.
            consumer.see(
                matrices.tokens(activation, self.roles.at(batch, use, activation, end), end),
                lambda statistic: not statistic.needs_gradient,
                None if changes is None else next(changes),
                self.roles.weights[batch],
            )


def _chosen(choose: Choose, repairs: Repairs) -> dict[str, Tensor]:
    """Which channel sets go, as a decision."""
    return {"weight": torch.from_numpy(choose(repairs.brought))}


def _inputs(runner: Runner, use: Use) -> Iterator[Tensor]:
    """What a consumer about to be executed is contracted with, for each batch."""
    if use.recurrence is None:
        return runner.read(use.activation)
    steps, both = use.recurrence.steps, (runner.ahead(use.node), runner.read(use.recurrence.start))
    return (states_before(start, results[0], steps) for results, start in zip(*both, strict=True))


# --- What earlier removals changed in the values that the outputs of consumers are added to.


@dataclass(frozen=True)
class Drift:
    """The dense model beside the pruned one, on the same batches.

    Attributes:
        dense, pruned: run them.
        strength: how much of what changed repairs are to make up for, from 0 to 1.
    """

    dense: Runner
    pruned: Runner
    strength: float

    def of(self, use: Use) -> Iterator[Tensor] | None:
        """By how much the output of a consumer about to be executed would have to differ for what it is added
        to to be the dense model's again, for each batch, ``[tokens, rows]``; ``None`` where it is added to
        nothing that is there.
        """
        residual = added_to(use)
        if residual is None or self.pruned.index(residual) > self.pruned.index(use.node):
            return None
        rows = use.node.meta["val"].shape[-1]
        pairs = zip(self.dense.read(residual), self.pruned.read(residual), strict=True)
        return ((dense - pruned).reshape(-1, rows) for dense, pruned in pairs)


def added_to(use: Use) -> fx.Node | None:
    """What a consumer's output is added to, if that is a computed value, and the output is laid out as the
    tokens are: a product with the last dimension of its input, the rows in the last of its own, which is at
    most reshaped and cast before.
    """
    end, rule = use.node, lookup(use.node.target)
    if rule is None or affine(end.target) is None or len(rule.alternatives) != 1 or len(use.columns) != 1:
        return None
    form, named = rule.alternatives[0], arguments(end)
    tokens = next((each.dims for each in form.operands if named.get(each.name) is use.activation), ())
    if not tokens or tokens[-1] not in form.summed or {*form.results[0][-1:]} <= {*tokens}:
        return None
    while len(users := [user for user in end.users if str(user.target) not in CHECKS]) == 1 and (
        str(users[0].target) in RESHAPES | CASTS
    ):
        (end,) = users
    if len(users) != 1 or users[0].target is not torch.ops.aten.add.Tensor or users[0].kwargs:
        return None
    (residual, *_) = [argument for argument in users[0].args if argument is not end] or [end]
    if not isinstance(residual, fx.Node) or residual.op != "call_function" or residual is end:
        return None
    return residual if same_sizes(residual.meta["val"].shape, end.meta["val"].shape) else None
