"""Calibrate, choose, restore: visit the consumers in graph order and decide each group once all its consumers
were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis import Analysis, Group, Use
from fasp_fx.base import float32_products, keep, warn
from fasp_fx.capturing import Runner, attribute, same_sizes
from fasp_fx.errors import CalibrationWarning
from fasp_fx.patterns import CASTS, CHECKS, RESHAPES

from ._consumers import Consumer, Consumers, order_of
from ._marks import Marks
from ._matrices import ConsumerMatrices, read_otherwise, states_before
from ._ranks import Ranks
from ._restoration import Restore, Restored, ridge, together, without_values
from ._scoring import GroupScore
from ._statistics import SplitGram, precise

if TYPE_CHECKING:
    from ._journal import Journal

#: tokens held out from which on they may choose any strength of the ridge
_JUDGES = 8


@dataclass
class Decision:
    """What was chosen.

    Attributes:
        gone: removed channel numbers.
        weights: restored weights and biases by canonical name.
        biases: by the names of restored weights, the biases that were restored along.
        outcomes: of the restorations of weights.
        notes: remarks for the report.
    """

    gone: np.ndarray
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[Restored]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decided(analysis: Analysis, decision: Decision) -> list[Group]:
    """The groups that lose anything, in graph order."""
    return [group for group in analysis.chosen if decision.gone[np.isin(analysis.labels, group.sets)].any()]


def without_data(consumers: Consumers, lost: Sequence[int], score: GroupScore) -> Decision:
    """What goes where nothing is observed, by a score of weights alone.

    Args:
        lost: channel sets that each block of each chosen group loses.
    """
    analysis = consumers.analysis
    decision = Decision(np.zeros(analysis.numbering.total, dtype=bool))
    for group, count in zip(analysis.chosen, lost, strict=True):
        if count:
            order = order_of(consumers, group, score, False, count, consumers.weight)
            decision.gone |= np.isin(analysis.labels, group.sets[order.first(count)])
    return decision


class Observer:
    """Decides all groups of one analysis.

    Args:
        consumers: those of the analysis whose chosen groups are decided, with what was seen at them before.
        lost: channel sets that each block of each chosen group loses.
        score: the order in which they go.
        restore: repairs a consumer, or ``None``.
        runner, marks: runs the batches, and tells what their tokens are for.
        precision: of products of float32 while batches run and are observed; scores and repairs are computed
            in full.
        ranks: the processes that share the batches.
        journal: what was decided before, and where that is written which is decided now; of the first process
            alone.
        dense: runs the dense model, on the same batches as the pruned one.
        drift: how much repairs are to make up for of what earlier removals changed in the values that
            consumers' outputs are added to.
    """

    def __init__(
        self,
        consumers: Consumers,
        lost: list[int],
        score: GroupScore,
        restore: Restore | None,
        runner: Runner,
        marks: Marks,
        precision: str,
        ranks: Ranks,
        journal: Journal | None = None,
        dense: Runner | None = None,
        drift: float = 0.0,
    ) -> None:
        self.analysis, self.consumers, self.products = consumers.analysis, consumers, consumers.products
        self.groups, self.lost, self.score, self.restore = self.analysis.chosen, lost, score, restore
        self.runner, self.marks, self.precision, self.ranks = runner, marks, precision, ranks
        self._journal, self._dense, self._drift = journal, dense, drift
        self.decision = Decision(np.zeros(self.analysis.numbering.total, dtype=bool))
        self._decisions = 0
        self._known = False  # what is decided at this stop is in the journal
        place = runner.index
        read = {
            group.name: [place(use.node) for use in group.uses]
            + [place(product.node) for product in self.products.of(group)]
            for group in self.groups
        }
        self._stops = sorted({stop for own in read.values() for stop in own})
        #: where all that decides a group has been seen
        self._last = {name: max(own, default=min(self._stops, default=0)) for name, own in read.items()}

    def run(self, progress: Callable[[float], None]) -> Decision:
        """Visit all consumers in graph order.

        Warns:
            CalibrationWarning: the data are too few to repair with; once for all consumers.
        """
        # What the journal knows; of how many stops.
        known, unmatched = self.ranks.first(
            (0, []) if self._journal is None else (self._journal.stops, self._journal.unmatched)
        )
        self.marks.unmatched |= {node: None for node in self.runner.nodes if node.name in unmatched}
        for count, stop in enumerate(self._stops):
            self._known = count < known
            with float32_products(self.precision):
                self._advance(self.runner.nodes[stop])
            ready = [group for group in self.groups if self._last[group.name] == stop]
            for group in ready:
                self._choose(group)
            self._finish(ready, stop)
            for group in ready:
                products = [one for one in self.products.of(group) if self.runner.index(one.node) == stop]
                self.products.cut(self.runner, products, self.decision.gone)
            if not self._known:
                self._record(count + 1)
            progress((count + 1) / len(self._stops))
        if self.marks.unmatched:
            self.decision.notes.append(self.marks.remark())
        self.decision.notes.extend(warn_of_few(self.decision.outcomes))
        return self.decision

    def _record(self, stops: int) -> None:
        """Write into the journal, where nothing that was seen is still waited with."""
        seen = (consumer.grams for consumer in self.consumers.by_key.values())
        if self._journal is not None and all(grams is None for grams in seen):
            self._journal.commit(stops, [node.name for node in self.marks.unmatched])

    def _advance(self, stop: fx.Node) -> None:
        """Run the batches up to a node, and observe what it is about to read."""
        for each in filter(None, (self.runner, self._dense)):
            each.advance(each.index(stop))
        for consumer in self.consumers.by_key.values() if not self._known else ():
            for use in consumer.uses:
                if use.node is stop:
                    self._observe(consumer, use)
            if max(self.runner.index(use.node) for use in consumer.uses) == self.runner.index(stop):
                self._add_up(consumer)
        products = [
            product for group in self.groups for product in self.products.of(group) if product.node is stop
        ]
        self.products.observe(self.runner, self.marks, list(dict.fromkeys(products)), self.ranks)

    def _observe(self, consumer: Consumer, use: Use) -> None:
        runner = self.runner
        matrices = ConsumerMatrices(use, self.analysis.walk.values)
        ends = None if use.route is None else list(runner.read(use.route))
        changes = self._changed(use) if len(consumer.uses) == 1 else None
        consumer.beside = 0 if changes is None else matrices.read(self._weight(consumer)).shape[1]
        for index, (batch, activation) in enumerate(zip(runner.numbers, _inputs(runner, use), strict=True)):
            consumer.prepare(self.score.statistics, activation.device, precise(activation.device))
            end = None if ends is None else ends[index]
            # Statistics that need gradients were shown the dense model's before.
            consumer.see(
                matrices.tokens(activation, self.marks.at(batch, use, activation, end), end),
                lambda statistic: not statistic.needs_gradient,
                None if changes is None else next(changes),
            )

    def _changed(self, use: Use) -> Iterator[Tensor] | None:
        """By how much the output of a consumer about to be executed would have to differ for what it is added
        to to be the dense model's again, for each batch, ``[tokens, rows]``; ``None`` where it is added to
        nothing that is there, or nothing is to be made up for.
        """
        beside = None if self._dense is None else added_to(use)
        if beside is None or self._dense is None or self.runner.index(beside) > self.runner.index(use.node):
            return None
        rows = use.node.meta["val"].shape[-1]
        pairs = zip(self._dense.read(beside), self.runner.read(beside), strict=True)
        return ((dense - found).reshape(-1, rows) for dense, found in pairs)

    def _add_up(self, consumer: Consumer) -> None:
        """Add up what all processes saw of a consumer, all of whose uses have been observed."""
        self.ranks.add_up(consumer.sums(gradients=False))
        for part in (part for gram in consumer.grams or () for part in gram.parts):
            part.round()
        consumer.check_finite()

    def _weight(self, consumer: Consumer) -> Tensor:
        """What a consumer's weight is now."""
        held = self.decision.weights.get(consumer.weight)
        return held if held is not None else self.consumers.weight(consumer)

    def _brought(self, consumer: Consumer) -> Tensor:
        """The same where nodes are executed."""
        found: Tensor = self.runner.bring(self._weight(consumer))
        return found

    def _choose(self, group: Group) -> None:
        lost = self.lost[self.groups.index(group)]
        if lost:
            found = self._shared(lambda: {"weight": self._first(group, lost)})
            self.decision.gone |= np.isin(self.analysis.labels, group.sets[found["weight"].numpy()])

    def _first(self, group: Group, lost: int) -> Tensor:
        """The channel sets of a group that go by the score."""
        order = order_of(self.consumers, group, self.score, True, lost, self._brought)
        return torch.from_numpy(order.first(lost))

    def _finish(self, ready: list[Group], stop: int) -> None:
        """Restore (or cut) the consumers all of whose groups are decided."""
        of_group, gone = self.consumers.of_group, self.decision.gone
        for consumer in dict.fromkeys(own for group in ready for own in of_group[group.name]):
            if any(consumer in of_group[name] for name, last in self._last.items() if last > stop):
                continue
            if consumer.gone(gone).any() or consumer.blocks_gone(gone).any():
                self._repair(consumer, torch.from_numpy(~consumer.gone(gone)))
            consumer.grams = None

    def _repair(self, consumer: Consumer, kept: Tensor) -> None:
        weight, read = self._weight(consumer), consumer.matrices.read(self._brought(consumer))
        kept = kept.to(read.device)
        # The Gram matrix holds no imaginary part, which the solution for a complex weight would need.
        restore = None if weight.is_complex() or bool(kept.all()) else self.restore
        otherwise = None if restore is None else read_otherwise(self.analysis, consumer.matrices)
        if otherwise is not None:
            self.decision.notes.append(f"'{consumer.weight}' is not repaired, because {otherwise}")
        if restore is None or otherwise is not None:
            pruned = consumer.matrices.write((read * kept[:, None]).to(weight.device), weight)
        else:
            outcome = self._restored(consumer, restore, read, kept)
            self.decision.outcomes.setdefault(consumer.weight, []).append(without_values(outcome))
            pruned = keep(consumer.matrices.write(outcome.weight.to(weight.device), weight))
            self.decision.weights[consumer.weight] = pruned
        whole = torch.from_numpy(~consumer.blocks_gone(self.decision.gone)).to(weight.device)
        if not bool(whole.all()):
            # Tokens of an expert that goes were sent to it already: it gives them nothing, and no other takes
            # its place.
            pruned = consumer.matrices.write(consumer.matrices.read(pruned) * whole[:, None, None], weight)
        self.runner.overrides[consumer.weight] = keep(pruned)

    def _restored(self, consumer: Consumer, restore: Restore, read: Tensor, kept: Tensor) -> Restored:
        """The repair of a consumer's matrices, whose bias is raised along."""
        if consumer.intercept is not None:
            # A column of ones that stays, whose weight is added to the bias.
            read = torch.cat([read, torch.zeros_like(read[:, :, :1])], 2)
            kept = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
        if consumer.beside:
            # What is beside counts as columns of their own, which go.
            own = torch.eye(consumer.beside, dtype=read.dtype, device=read.device)
            read = torch.cat([read, self._drift * own.expand(len(read), -1, -1)], 2)
        has_ones = consumer.intercept is not None
        grams = consumer.grams or ()
        outcome = Restored(**self._shared(lambda: vars(_restored(restore, read, grams, kept, has_ones))))
        if consumer.intercept is None:
            return outcome
        if bool((raised := outcome.weight[:, :, -1].reshape(-1)).any()):
            bias: Tensor = attribute(self.analysis.program.module, consumer.intercept).detach()
            self.decision.weights[consumer.intercept] = keep(bias + raised.to(bias))
            self.decision.biases[consumer.weight] = consumer.intercept
            self.runner.overrides[consumer.intercept] = self.decision.weights[consumer.intercept]
        return replace(outcome, weight=outcome.weight[:, :, :-1])

    def _shared(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is decided, as the journal has it, or as the process does whose turn it is; with one tensor,
        its ``weight``.
        """
        number, self._decisions = self._decisions, self._decisions + 1
        if self._known:
            known: dict[str, Any] = self.ranks.share(0, self._journal and self._journal.known(number))
            return known
        owner = number % self.ranks.size
        found: dict[str, Any] = self.ranks.share(owner, decide() if owner == self.ranks.rank else None)
        if self._journal is not None:
            self._journal.new[number] = found
        return found


def _restored(
    restore: Restore, matrices: Tensor, grams: Sequence[SplitGram], kept: Tensor, has_ones: bool
) -> Restored:
    """The outcome of a repair, block by block, for the columns that ``kept`` speaks of.

    Args:
        has_ones: whether the last of these columns holds ones.
    """
    parts = []
    for matrix, gram, left in zip(matrices, grams, kept, strict=True):
        fitted, held, *_ = [*map(keep, gram.compact()), None]
        own = left.nonzero()[:, 0]
        # Weights that meet about as many tokens as there are unknowns fit no others, which a handful of them
        # held out need not show: a ridge as strong as there are unknowns for each token keeps them near.
        few = restore is ridge and 0 < gram.held.tokens < _JUDGES
        more = {"least": len(own) / gram.fitted.tokens} if few and gram.fitted.tokens else {}
        outcome = restore(matrix, fitted, held, own, has_ones, **more)
        parts.append(replace(outcome, weight=outcome.weight[:, : len(left)]))
    return replace(together(parts), tokens=min(gram.tokens for gram in grams))


def _inputs(runner: Runner, use: Use) -> Iterator[Tensor]:
    """What a consumer about to be executed is contracted with, for each batch."""
    if use.recurrence is None:
        yield from runner.read(use.activation)
        return
    for results, start in zip(runner.ahead(use.node), runner.read(use.recurrence.start), strict=True):
        yield states_before(start, results[0], use.recurrence.steps)


#: tokens for each column from which it is not the amount of data that limits a repair
_ENOUGH = 10


def warn_of_few(outcomes: Mapping[str, Sequence[Restored]]) -> list[str]:
    """Warn where at least half of the consumers saw fewer tokens than they have columns, or few tokens and
    were not repaired; what was said.

    Args:
        outcomes: of each consumer.
    """
    tokens = {name: min(outcome.tokens for outcome in found) for name, found in outcomes.items()}
    columns = {name: found[0].weight.shape[-1] for name, found in outcomes.items()}
    few = [
        name
        for name, found in outcomes.items()
        if tokens[name] < columns[name] * (1 if any(one.used for one in found) else _ENOUGH)
    ]
    if not few or 2 * len(few) < len(columns):
        return []
    first = min(few, key=lambda name: tokens[name] / columns[name])
    said = (
        f"too little calibration data to repair {len(few)} of {len(columns)} consumers: '{first}' has"
        f" {columns[first]:,} columns and saw {tokens[first]:,} tokens, a quarter of which is held out to"
        " judge repairs by; a repair that gains next to nothing there is not made, and one that few tokens"
        " judge keeps near the weights as they were; calibrate on more, some"
        f" {_ENOUGH * columns[first]:,} tokens of four sequences or more"
    )
    warn(said, CalibrationWarning)
    return [said]


#: products of tokens and a weight, and which argument the tokens are
_PLAIN = {"aten.linear.default": 0, "aten.mm.default": 0, "aten.addmm.default": 1}


def added_to(use: Use) -> fx.Node | None:
    """What a consumer's output is added to, if that is a computed value, and the output is laid out as the
    tokens are: a product with the last dimension of its input, the rows in the last of its own, which is at
    most reshaped and cast before.
    """
    end, at = use.node, _PLAIN.get(str(use.node.target))
    if at is None or use.node.args[at] is not use.activation or len(use.columns) != 1:
        return None
    while len(users := [user for user in end.users if str(user.target) not in CHECKS]) == 1:
        (user,) = users
        if user.target is torch.ops.aten.add.Tensor and not user.kwargs:
            (beside, *_) = [argument for argument in user.args if argument is not end] or [end]
            if not isinstance(beside, fx.Node) or beside.op != "call_function" or beside is end:
                return None
            return beside if same_sizes(beside.meta["val"].shape, end.meta["val"].shape) else None
        if str(user.target) not in RESHAPES | CASTS:
            return None
        end = user
    return None
