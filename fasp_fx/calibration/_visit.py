"""Calibrate, choose, restore: visit the consumers in graph order and decide each group once all its consumers
were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from ..analysis._analysis import Analysis
from ..analysis.channels import Use
from ..analysis.groups import Group
from ..base._device import float32_products
from ..base._offload import keep
from ..base._warn import warn
from ..capturing._fx import attribute
from ..capturing._runner import Runner
from ..errors import CalibrationError, CalibrationWarning
from ._consumers import Consumer, Consumers
from ._drift import Drift
from ._marks import Marks
from ._matrices import ConsumerMatrices, read_otherwise, states_before, token_dims
from ._order import order_of
from ._product_repair import Mended, ProductEnergies, mend
from ._products import place_of
from ._ranks import Ranks
from .restoration import Restore, Restored, left_alone, ridge, together, without_values
from .scoring import GroupScore
from .statistics import SplitGram, precise

if TYPE_CHECKING:
    from ._journal import Journal

#: tokens held out from which on they may choose any strength of the ridge
_JUDGES = 8
#: why a drift changes no repair, by how far it came
_UNDRIFTED = (
    "no layer that loses channels gives what is added, as it is, to a value that was computed before",
    "nothing is removed before what the outputs of the layers that lose channels are added to",
    "no layer whose output is added to a value that has changed is repaired",
)


@dataclass
class Decision:
    """What was chosen.

    Attributes:
        gone: removed channel numbers.
        weights: restored weights and biases by canonical name.
        biases: by the names of restored weights, the biases that were restored along.
        outcomes: of the restorations of weights.
        products: by the names of groups that no weight reads, the repair of the product that their channels
            are summed over in.
        notes: remarks for the report.
    """

    gone: np.ndarray
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, list[Restored]] = field(default_factory=dict)
    products: dict[str, Mended] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decided(analysis: Analysis, decision: Decision) -> list[Group]:
    """The groups that lose anything, in graph order."""
    return [group for group in analysis.chosen if decision.gone[np.isin(analysis.labels, group.sets)].any()]


class Observer:
    """Decides all groups of one analysis.

    Args:
        consumers: those of the analysis whose chosen groups are decided, with what was seen at them before.
        lost: channel sets that each block of each chosen group loses.
        score: the order in which they go.
        restore: repairs a consumer, or ``None``.
        precision: of products of float32 while batches run and are observed; scores and repairs are computed
            in full.
        ranks: the processes that share the batches.
        journal: what was decided before, and where that is written which is decided now; of the first process
            alone.
    """

    def __init__(
        self,
        consumers: Consumers,
        lost: list[int],
        score: GroupScore,
        restore: Restore | None,
        precision: str = "highest",
        ranks: Ranks | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.ranks, self._journal = ranks or Ranks(), journal
        analysis = consumers.analysis
        self.analysis, self.consumers = analysis, consumers
        self.score, self.restore, self.precision = score, restore, precision
        self.groups = analysis.chosen
        self.lost = lost
        self.decision = Decision(np.zeros(analysis.numbering.total, dtype=bool))
        self.products = consumers.products
        self._observed = False
        self._repairs = 0
        self._known = False  # what is decided at this stop is in the journal
        self._drift: Drift | None = None
        self._drifted = 0  # how far a drift came, of what _UNDRIFTED says
        self._marks: Marks | None = None
        self._tokens: dict[
            str, int
        ] = {}  # the fewest that a block of a weight saw; of weights that may be repaired
        self._undecided = {group.name for group in self.groups}
        self._energies = self._product_repairs() if restore is not None else {}
        self._waiting = {
            g.name: {use.node for use in g.uses} | {product.node for product in self.products.of(g)}
            for g in self.groups
        }

    def run(
        self,
        runner: Runner | None,
        marks: Marks | None,
        progress: Callable[[float], None],
        drift: Drift | None = None,
    ) -> Decision:
        """Visit all consumers in graph order; without a runner and marks of its tokens nothing is observed.

        Args:
            drift: what repairs make up for besides.

        Warns:
            CalibrationWarning: the data are too few to repair with; once for all consumers.
        """
        self._observed, self._drift, self._marks = runner is not None, drift, marks
        position = {node: index for index, node in enumerate(self.analysis.program.module.graph.nodes)}
        stops = sorted(
            {node for waiting in self._waiting.values() for node in waiting}, key=position.__getitem__
        )
        known = self._recall(marks)
        for count, node in enumerate(stops):
            self._known = count < known
            if runner is not None and marks is not None:
                with float32_products(self.precision):
                    self._advance(runner, marks, node)
            for waiting in self._waiting.values():
                waiting.discard(node)
            ready = [
                group
                for group in self.groups
                if not self._waiting[group.name] and group.name in self._undecided
            ]
            for group in ready:
                self._choose(group, runner)
            self._finish(ready, runner)
            for group in ready:
                self._mend(group, runner)
            if runner is not None:
                here = [
                    product
                    for group in ready
                    if group.name not in self.decision.products
                    for product in self.products.of(group)
                    if product.node is node
                ]
                self.products.cut(runner, list(dict.fromkeys(here)), self.decision.gone)
            if not self._known:
                self._record(count + 1, marks)
            progress((count + 1) / len(stops))
        if marks is not None and marks.unmatched:
            self.decision.notes.append(marks.remark())
        if drift is not None and self._drifted < len(_UNDRIFTED):
            self.decision.notes.append(
                f"a drift of {drift.part:g} was to be made up for, and changes no repair:"
                f" {_UNDRIFTED[self._drifted]}"
            )
        self.decision.notes.extend(warn_of_few(self.decision.outcomes, self._tokens))
        return self.decision

    def _recall(self, marks: Marks | None) -> int:
        """Take up what the journal knows; of how many stops."""
        known, remarks = self.ranks.first(
            (0, {}) if self._journal is None else (self._journal.stops, self._journal.remarks)
        )
        self._tokens, self._drifted = dict(remarks.get("tokens", {})), remarks.get("drifted", 0)
        names = {node.name: node for node in self.analysis.program.module.graph.nodes}
        if marks is not None:
            marks.unmatched |= {names[name]: None for name in remarks.get("unmatched", ()) if name in names}
        return known

    def _record(self, stops: int, marks: Marks | None) -> None:
        """Write into the journal, where nothing that was seen is still waited with."""
        if (
            self._journal is not None
            and marks is not None
            and all(consumer.grams is None for consumer in self.consumers.by_key.values())
        ):
            unmatched = [node.name for node in marks.unmatched]
            self._journal.commit(
                stops, {"tokens": self._tokens, "drifted": self._drifted, "unmatched": unmatched}
            )

    def _advance(self, runner: Runner, marks: Marks, stop: fx.Node) -> None:
        """Run the batches up to a node, and observe what it is about to read."""
        for each in [runner] if self._drift is None else [runner, self._drift.dense]:
            each.advance(runner.index(stop))
        if not self._known:
            self._observe(
                runner,
                marks,
                [
                    use
                    for consumer in self.consumers.by_key.values()
                    for use in consumer.uses
                    if use.node is stop
                ],
            )
        products = [
            product for group in self.groups for product in self.products.of(group) if product.node is stop
        ]
        self.products.observe(runner, marks, list(dict.fromkeys(products)), self.ranks)
        for energies in self._energies.values() if not self._known else ():
            if energies.product.node is stop:
                energies.observe(runner, marks, self.ranks)

    def _observe(self, runner: Runner, marks: Marks, uses: list[Use]) -> None:
        for use in uses:
            consumer = self.consumers.of(use)
            matrices = ConsumerMatrices(use, self.analysis.walk.values)
            ends = list(runner.read(use.route)) if use.route is not None else None
            weight = self._weight(consumer)
            changes = (
                self._drift.at(use, runner) if self._drift is not None and len(consumer.uses) == 1 else None
            )
            consumer.beside = 0 if changes is None else matrices.read(weight).shape[1]
            self.ranks.once(*consumer.sums())
            for index, (batch, activation) in enumerate(
                zip(runner.numbers, _inputs(runner, use), strict=True)
            ):
                consumer.prepare(self.score.statistics, activation.device, precise(activation.device))
                dims = token_dims(activation.dim(), use.activation_layout)
                own = (
                    marks.of(batch, use.activation, activation, dims)
                    if ends is None
                    else marks.routed(batch, use.activation, ends[index])
                )
                pieces = matrices.tokens(activation, own, None if ends is None else ends[index])
                # Statistics that need gradients were shown the dense model's before.
                consumer.see(
                    pieces,
                    lambda statistic: not statistic.needs_gradient,
                    None if changes is None else next(changes),
                )
            self.ranks.add_up(*consumer.sums())
            assert consumer.grams is not None
            last = max(runner.index(other.node) for other in consumer.uses)
            for gram in consumer.grams if runner.index(use.node) == last else ():
                gram.round()
            if not consumer.sees_finite():
                raise CalibrationError(
                    f"the input of '{use.weight}' is not finite on the calibration data; check the batches"
                    " and the model's dtype"
                )
            self._tokens[use.weight] = min(
                self._tokens.get(use.weight, 1 << 62), min(gram.tokens for gram in consumer.grams)
            )

    def _product_repairs(self) -> dict[str, ProductEnergies]:
        """What is to be seen of the products whose repair has a place, by the names of the groups that lose
        channels there.
        """
        found = {}
        for group, lost in zip(self.groups, self.lost, strict=True):
            products = self.products.of(group)
            if lost and products:
                place = (
                    place_of(self.analysis, products[0])
                    if len(products) == 1
                    else f"{len(products)} products share its channels"
                )
                if isinstance(place, str):
                    self.decision.notes.append(f"'{group.name}' is not repaired: {place}")
                else:
                    found[group.name] = ProductEnergies(self.analysis, products[0], place)
        return found

    def _mend(self, group: Group, runner: Runner | None) -> None:
        """Repair the product that the channels of a group are summed over in."""
        energies = self._energies.pop(group.name, None)
        if energies is None or not self._observed or self.restore is None:
            return
        gone = self.decision.gone
        outcome = self._shared(lambda: energies.solve(ridge, gone))
        if not self._known and runner is not None and self._marks is not None:
            outcome = energies.judged(outcome, gone, runner, self._marks, self.ranks)
            if self._journal is not None:
                self._journal.note_restored(self._repairs - 1, outcome)
        mended = mend(energies.place, outcome, self.analysis, self.decision.weights)
        self.decision.weights |= mended.weights
        self.decision.products[group.name] = Mended(mended.weights, without_values(outcome))
        if runner is not None:
            energies.carry(outcome, runner)

    def _weight(self, consumer: Consumer, runner: Runner | None = None) -> Tensor:
        """What a consumer's weight is now, where the runner executes nodes."""
        held = self.decision.weights.get(consumer.weight)
        found = held if held is not None else self.consumers.weight(consumer)
        brought: Tensor = found if runner is None else runner.bring(found)
        return brought

    def _choose(self, group: Group, runner: Runner | None) -> None:
        self._undecided.discard(group.name)
        lost = self.lost[self.groups.index(group)]
        if not lost:
            return
        removed = self.ranks.first(
            self._journal.removed.get(group.name) if self._known and self._journal is not None else None
        )
        if removed is None:
            order = order_of(
                self.consumers,
                group,
                self.score,
                self.products,
                self._observed,
                lost,
                partial(self._weight, runner=runner),
            )
            removed = self.ranks.first(np.concatenate([sets[:lost] for sets in order.sets]))
            if self._journal is not None:
                self._journal.note_removed(group.name, removed)
        self.decision.gone |= np.isin(self.analysis.labels, group.sets[removed])

    def _finish(self, ready: list[Group], runner: Runner | None) -> None:
        """Restore (or cut) the consumers all of whose groups are decided."""
        for consumer in dict.fromkeys(c for group in ready for c in self.consumers.of_group[group.name]):
            touching = [
                group.name for group in self.groups if consumer in self.consumers.of_group[group.name]
            ]
            if any(name in self._undecided for name in touching):
                continue
            gone = consumer.gone(self.decision.gone)
            if gone.any() or consumer.blocks_gone(self.decision.gone).any():
                self._repair(consumer, torch.from_numpy(~gone), runner)
            consumer.grams = None

    def _repair(self, consumer: Consumer, kept: Tensor, runner: Runner | None) -> None:
        weight = self._weight(consumer)
        read = consumer.matrices.read(self._weight(consumer, runner))
        kept = kept.to(read.device)
        whole = torch.from_numpy(~consumer.blocks_gone(self.decision.gone)).to(weight.device)
        # The Gram matrix holds no imaginary part, which the solution for a complex weight would need.
        if (
            self.restore is not None
            and (consumer.grams is not None or self._known)
            and not weight.is_complex()
            and not bool(kept.all())
        ):
            otherwise = read_otherwise(self.analysis, consumer.matrices)
            restore = self.restore if otherwise is None else left_alone
            if otherwise is not None:
                self._tokens.pop(consumer.weight, None)
                self.decision.notes.append(f"'{consumer.weight}' is not repaired, because {otherwise}")
            if consumer.intercept is not None:
                # A column of ones that stays, whose weight is added to the bias.
                read, kept = (
                    torch.cat([read, torch.zeros_like(read[:, :, :1])], 2),
                    torch.cat([kept, torch.ones_like(kept[:, :1])], 1),
                )
            if self._drift is not None and consumer.beside:
                # What is beside counts as columns of their own, which go.
                own = torch.eye(consumer.beside, dtype=read.dtype, device=read.device)
                read = torch.cat([read, self._drift.part * own.expand(len(read), -1, -1)], 2)
            outcome = self._shared(
                partial(_restored, restore, read, consumer.grams, kept, consumer.intercept is not None)
            )
            if consumer.beside:
                drifts = any(bool(gram.norms()[-consumer.beside :].any()) for gram in consumer.grams or ())
                self._drifted = max(self._drifted, 1 + drifts + (drifts and outcome.used))
            if consumer.intercept is not None:
                self._raise_bias(
                    consumer.weight, consumer.intercept, outcome.weight[:, :, -1].reshape(-1), runner
                )
                outcome = replace(outcome, weight=outcome.weight[:, :, :-1])
            self.decision.outcomes.setdefault(consumer.weight, []).append(without_values(outcome))
            pruned = keep(consumer.matrices.write(outcome.weight.to(weight.device), weight))
            self.decision.weights[consumer.weight] = pruned
        else:
            pruned = consumer.matrices.write((read * kept[:, None]).to(weight.device), weight)
        if runner is not None:
            if not bool(whole.all()):
                # Tokens of an expert that goes were sent to it already: it gives them nothing, and no other
                # takes its place.
                pruned = consumer.matrices.write(
                    consumer.matrices.read(pruned) * whole[:, None, None], weight
                )
            runner.overrides[consumer.weight] = keep(pruned)

    def _raise_bias(self, weight: str, name: str, raised: Tensor, runner: Runner | None) -> None:
        """Add to the bias of a repaired weight."""
        if not bool(raised.any()):
            return
        bias: Tensor = attribute(self.analysis.program.module, name).detach()
        self.decision.weights[name] = keep(bias + raised.to(bias))
        self.decision.biases[weight] = name
        if runner is not None:
            runner.overrides[name] = self.decision.weights[name]

    def _shared(self, solve: Callable[[], Restored]) -> Restored:
        """The outcome of a repair, as the journal has it, or of the process whose turn it is."""
        number, self._repairs = self._repairs, self._repairs + 1
        if self._known:
            return self.ranks.share(0, self._journal and self._journal.restored(number))
        owner = number % self.ranks.size
        outcome: Restored = self.ranks.share(owner, solve() if owner == self.ranks.rank else None)
        if self._journal is not None:
            self._journal.note_restored(number, outcome)
        return outcome


def _restored(
    restore: Restore, matrices: Tensor, grams: list[SplitGram] | None, kept: Tensor, has_ones: bool
) -> Restored:
    """The outcome of a repair, block by block, for the columns that ``kept`` speaks of.

    Args:
        has_ones: whether the last of these columns holds ones.
    """
    assert grams is not None
    parts = []
    for matrix, gram, left in zip(matrices, grams, kept, strict=True):
        fitted, held = (
            None if part is None else keep(part.symmetric(torch.float32)) for part in (gram.fitted, gram.held)
        )
        assert fitted is not None
        own = left.nonzero()[:, 0]
        # Weights that meet about as many tokens as there are unknowns fit no others, which a handful of them
        # held out need not show: a ridge as strong as there are unknowns for each token keeps them near.
        few = restore is ridge and gram.held is not None and 0 < gram.held.tokens < _JUDGES
        more = {"least": len(own) / gram.fitted.tokens} if few and gram.fitted.tokens else {}
        outcome = restore(matrix, fitted, held, own, has_ones, **more)
        parts.append(replace(outcome, weight=outcome.weight[:, : len(left)]))
    return together(parts)


def _inputs(runner: Runner, use: Use) -> Iterator[Tensor]:
    """What a consumer about to be executed is contracted with, for each batch."""
    if use.recurrence is None:
        yield from runner.read(use.activation)
        return
    for results, start in zip(runner.ahead(use.node), runner.read(use.recurrence.start), strict=True):
        yield states_before(start, results[0], use.recurrence.steps)


#: the least part of the error on tokens held out that is worth calling a gain
_GAIN = 0.02
#: tokens for each column from which it is not the amount of data that limits a repair
_ENOUGH = 10


def warn_of_few(outcomes: Mapping[str, Sequence[Restored]], tokens: Mapping[str, int]) -> list[str]:
    """Warn where at least half of the consumers saw fewer tokens than they have columns, or few tokens and
    gained nothing, or next to nothing; what was said.

    Args:
        outcomes: of each consumer.
        tokens: of those that could be repaired, the fewest calibration tokens that a block saw.
    """
    columns = {name: found[0].weight.shape[-1] for name, found in outcomes.items() if name in tokens}
    few = [
        name
        for name, count in columns.items()
        if tokens[name] < count or (tokens[name] < _ENOUGH * count and not any(map(_gained, outcomes[name])))
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


def _gained(outcome: Restored) -> bool:
    if outcome.held_before is None or outcome.held_after is None:
        return False
    return outcome.held_before == 0 or outcome.held_after < (1 - _GAIN) * outcome.held_before


__all__ = ["warn_of_few"]
