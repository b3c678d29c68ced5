"""Carry out a configuration on an analysed program: how much goes, and what."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from ..allocation._allocation import Budget, Ceiling, CostAllocation, Target, TrialAllocation, validate
from ..allocation._limits import alike, departures, joined
from ..allocation._selection import (
    check_asked,
    check_patterns,
    held_by,
    is_excluded,
    lost_by_pattern,
    read_by,
)
from ..allocation.costs import Costs
from ..analysis._analysis import Analysis
from ..analysis.groups import Group
from ..analysis.resources import Resource, Sparsity
from ..base._device import device_of, float32_products, multiplies_bfloat16
from ..base._tolerable import short_of_memory, tolerable
from ..base._undisturbed import drawing_alike, in_turns
from ..base._warn import warn
from ..base.offload._current import computing
from ..calibration._needed import Needed
from ..calibration.losses import Outputs, resolve_loss
from ..calibration.obs import resolve_score
from ..calibration.observe._consumers import Consumers
from ..calibration.observe._drift import Drift
from ..calibration.observe._gradients import ENOUGH, observe_batches
from ..calibration.observe._marks import Marks
from ..calibration.observe._order import curves_of, orders_of
from ..calibration.observe._pieces import Piece, halved, in_pieces, whole_batches
from ..calibration.observe._ranks import Ranks
from ..calibration.observe._trial import ModelTrial
from ..calibration.observe._visit import Decision, Observer
from ..calibration.restoration import restored_by, ridge
from ..calibration.scoring import ByColumns
from ..calibration.statistics import InputGradients, MakeStatistic, SquaredInputGradients
from ..capturing._fx import results
from ..capturing._program import Program
from ..capturing._runner import Runner
from ..errors import (
    ArgumentError,
    CalibrationError,
    CalibrationWarning,
    NothingPrunableError,
    OffloadError,
    first_line,
)
from .config import MEASURED, PruningConfig

if TYPE_CHECKING:
    from ..calibration._journal import Journal


class Chooser:
    """Chooses by a configuration, for one program or for several after another.

    Args:
        auto: the loss that ``loss="auto"`` stands for.
        ranks: the processes that share the calibration batches.

    Attributes:
        notes: what there is to say of the allocation, for the report.
    """

    def __init__(
        self,
        config: PruningConfig,
        auto: Literal["outputs", "next-token"] = "outputs",
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self._loss = auto if config.loss == "auto" else config.loss
        self._score, self._allocate = resolve_score(config.named_score), config.allocator
        self._restore = (
            None
            if config.restore is None
            else restored_by(config.restore)
            if callable(config.restore)
            else ridge
        )
        self._trial: ModelTrial | None = None
        self.notes: list[str] = []
        self._gradients = {
            name: make
            for name, make in self._score.statistics.items()
            if getattr(make, "needs_gradient", False)
        }

    @property
    def measures(self) -> bool:
        """Whether the dense model is observed before anything is chosen."""
        return self.needs_costs or (bool(self._gradients) and self.takes_gradients)

    @property
    def takes_gradients(self) -> bool:
        """Whether there is a loss to take gradients of; what is measured without is of another unit."""
        return self._loss is not None

    @property
    def needs_costs(self) -> bool:
        """Whether the allocation wants cost curves."""
        return isinstance(self._allocate, CostAllocation)

    @property
    def tries(self) -> bool:
        """Whether the allocation wants to try what it thinks of."""
        return isinstance(self._allocate, TrialAllocation)

    @property
    def _is_of_columns(self) -> bool:
        """Whether the score is one of single columns, whose losses take less data to predict than those of
        whole groups.
        """
        return isinstance(self._score, ByColumns)

    @property
    def said_loss(self) -> str:
        """What costs are predictions of."""
        if self._loss is None:
            return "the relative squared errors of the consumers' outputs, added up"
        if callable(self._loss):
            return "the loss that was given"
        return {"next-token": "the cross-entropy of the next token"}.get(
            self._loss, "half the squared error of the outputs, relative to their mean square"
        )

    def budget(self, analysis: Analysis) -> Budget:
        """How much of the resources asked for may stay of a program.

        Raises:
            BudgetError: a resource cannot be counted of it.
        """
        if not self.config.caps:
            return self.budget_of(Sparsity(analysis))
        return Budget(analysis.chosen, [Ceiling(cap, cap.resource(analysis)) for cap in self.config.caps])

    def budget_of(self, counted: Resource) -> Budget:
        """How much of the counted weights may stay by the sparsity asked for; without a limit where each
        pattern has its own.
        """
        sparsity = self.config.requested
        return Budget(counted.groups, [] if sparsity is None else [Target(counted, sparsity)])

    def check(self, budget: Budget, groups: Sequence[Group], costs: Costs | None = None) -> None:
        """Refuse what can be known to be in vain before the costs are measured; arguments and errors as for
        :meth:`allocate`.
        """
        check_patterns("exclude", self.config.exclude, groups, held_by)
        part = self._part(budget)
        if not self.needs_costs or not budget.groups or costs is not None:
            self.allocate(budget, groups, costs)
            return
        assert isinstance(self._allocate, CostAllocation)
        self._allocate.check(part, self.config.round_to)

    def expected_sparsity(self, analysis: Analysis) -> float:
        """The sparsity that is asked for, or that a budget comes to where all groups lose alike.

        Raises:
            FaspError: as for :meth:`budget` and :meth:`allocate`.
        """
        if (asked := self.config.requested) is not None and not self.config.caps:
            return asked
        budget, alike = self.budget(analysis), Chooser(replace(self.config, allocation="uniform"))
        return Sparsity(analysis).removed(budget.counts(alike.allocate(budget, analysis.groups, None)))

    def measure(
        self,
        consumers: Consumers,
        batches: list[list[Any]],
        fingerprint: str,
        advance: Callable[[float], None],
        costs: Costs | None = None,
        part: int | None = None,
        within: str | None = None,
    ) -> Costs | None:
        """Observe the dense model, forward and, where there is a loss, back: the cost curves if the
        allocation wants them, and gradients for the score.

        An allocation that tries what it thinks of is given orders and Gram matrices from here, also where the
        curves were measured before.

        Args:
            consumers: of the analysis to measure; what needs gradients stays with them.
            batches: of calibration.
            fingerprint: of the model.
            costs: the cost curves, where they were measured before.
            part: one in so many sequences is run, the first ones, and more of them where tokens are few;
                ``None``: by the quality asked for.
            within: the path of the submodule that is measured, where others are measured alike.
        """
        config, advance = self.config, in_turns(advance)
        is_wanted = self.needs_costs and (costs is None or self.tries)
        gradients = SquaredInputGradients if self._is_of_columns else InputGradients
        wanted = {"gradients": gradients, **self._score.statistics} if is_wanted else self._gradients
        if not self.measures or (not is_wanted and not self._gradients):
            return costs
        if computing() is not None:
            raise ArgumentError(
                "gradients are taken where the weights are, all of which their way back needs, and not on"
                f" {computing()}; leave out the device of offload(), or use quality='fast'"
            )
        program = consumers.analysis.program
        with drawing_alike(program.weights().values()), float32_products(self._precision(program)):
            pieces, marks = self._observe(
                consumers,
                batches,
                wanted,
                advance,
                part or MEASURED[config.quality] * (2 if self._is_of_columns else 1),
                within,
            )
        if is_wanted:
            with torch.no_grad():
                orders = orders_of(consumers, consumers.analysis.chosen, self._score)
            if costs is None:
                costs = Costs(curves_of(orders), fingerprint, _score_of(config), config.granularity)
            if isinstance(self._allocate, TrialAllocation):
                loss, repairs = (
                    (None if self._loss is None else resolve_loss(self._loss)),
                    self._restore is not None,
                )
                most, precision = self._allocate.sequences, self._precision(program)
                self._trial = ModelTrial(
                    consumers, orders, pieces, marks, loss, most, repairs, precision, self.ranks
                )
        consumers.forget_activations()
        return costs

    def _observe(
        self,
        consumers: Consumers,
        batches: list[list[Any]],
        wanted: Mapping[str, MakeStatistic],
        advance: Callable[[float], None],
        part: int,
        within: str | None,
    ) -> tuple[list[Piece], Marks]:
        """Run one in ``part`` of the sequences; as they came where pieces of them do not serve, and only
        forward where nothing else does.

        Returns all sequences in the pieces that serve, and which of their tokens are padding.

        A loss of the user's sees whole batches, whose sequences it may compare.

        Raises:
            CalibrationError: see :func:`observe_batches`.
        """
        program, config = consumers.analysis.program, self.config
        # Refuses a mask that does not fit by the number of its batch.
        Marks(program, batches, config.padding_mask, hold_out=False)
        whole = whole_batches(program, batches)
        pieces = whole if callable(self._loss) else in_pieces(program, whole)
        attempts = [(pieces, self._loss)]
        if len(pieces) > len(whole):
            attempts.append((whole, self._loss))
        if config.loss == "auto":
            attempts.append((whole, None))
        for number, (given, loss) in enumerate(attempts):
            try:
                marks = Marks(program, [piece.inputs for piece in given], config.padding_mask, hold_out=False)
                found = None if loss is None else resolve_loss(loss)
                enough = ENOUGH / 2 if self._is_of_columns else ENOUGH
                observe_batches(
                    consumers,
                    given,
                    wanted,
                    found,
                    marks,
                    advance,
                    -(-len(given) // part),
                    self.ranks,
                    enough,
                )
                break
            except tolerable(CalibrationError) as error:
                if number + 1 == len(attempts):
                    raise
                failure = error
                consumers.forget()
        if loss is None and self._loss is not None:
            self._loss = None
            everywhere = f" in all parts of the model, since part '{within}' cannot" if within else ""
            warn(
                f"{failure}, as is done now{everywhere}: each consumer counts by the relative error of its"
                " own output",
                CalibrationWarning,
            )
        returned = (node for node in results(program.module.graph) if isinstance(node, fx.Node))
        if isinstance(found, Outputs) and any(node in marks.unmatched for node in returned):
            warn(marks.remark(), CalibrationWarning)  # the loss counts them, which no report would say
        return given, marks

    def _precision(self, program: Program) -> str:
        """That of products of float32 while a program runs on calibration data."""
        device = computing() or device_of(program.module)
        return "medium" if multiplies_bfloat16(device) else "highest"

    def allocate(
        self,
        budget: Budget,
        groups: Sequence[Group],
        costs: Costs | None,
        advance: Callable[[float], None] = lambda fraction: None,
    ) -> list[int]:
        """How many channel sets each block of each of the budget's groups loses.

        Args:
            groups: all groups of the model, those that cannot be pruned among them.
            costs: the cost curves, where the allocation wants them.
            advance: called with the fraction of a search done.

        Raises:
            NothingPrunableError: no group can be pruned.
            ArgumentError: a name pattern matches nothing, or the allocation returned what cannot be done.
            SparsityError, BudgetError: the sparsity or a budget is out of reach.
        """
        config = self.config
        check_patterns("exclude", config.exclude, groups, held_by)
        if not budget.groups:
            reasons = sorted({group.reason for group in groups if group.reason})
            raise NothingPrunableError(
                "no group of this model can be pruned: "
                + ("; ".join(reasons) if reasons else "it has no coupled weights")
            )
        if isinstance(config.sparsity, Mapping):
            check_patterns("sparsity", config.sparsity, groups, read_by)
            check_asked(config.sparsity, config.exclude, groups, budget.groups)
        kept = part = self._part(budget)
        if config.uniform_layers:
            places = alike(part.groups)
            kept = part.narrowed(places)
            averages = isinstance(self._allocate, CostAllocation) and self._allocate.averages
            costs = None if costs is None else joined(costs, part.groups, places, averages)

        def spread(lost: Sequence[int]) -> list[int]:
            """What all groups of the budget lose, of what those lose that stand for them."""
            return kept.spread(lost, budget)

        trial, self._trial = self._trial, None  # its Gram matrices are not needed any more
        if trial is not None:
            trial.serve(kept.groups, spread, in_turns(advance))
        found = self._allocated(kept, costs, trial)
        self.notes = [] if trial is None else trial.notes
        if callable(self.config.allocation) and not isinstance(self.config.sparsity, Mapping):
            self.notes = [*departures(found, kept, self.config.round_to), *self.notes]
        return spread(found)

    def _part(self, budget: Budget) -> Budget:
        """The budget of the groups that are not excluded."""
        if not self.config.exclude or not budget.groups:
            return budget
        excluded = [is_excluded(group, self.config.exclude) for group in budget.groups]
        if all(excluded):
            raise NothingPrunableError(
                "every group that can be pruned is excluded; leave out some of exclude="
            )
        return budget.only([not out for out in excluded])

    def _allocated(self, budget: Budget, costs: Costs | None, trial: ModelTrial | None) -> list[int]:
        config = self.config
        if isinstance(config.sparsity, Mapping):
            return lost_by_pattern(budget, config.sparsity, config.round_to)
        if isinstance(self._allocate, CostAllocation):
            assert costs is not None
            if isinstance(self._allocate, TrialAllocation):
                return validate(self._allocate(budget, config.round_to, costs, trial), budget)
            return validate(self._allocate(budget, config.round_to, costs), budget)
        return validate(self._allocate(budget, config.round_to), budget)

    def choose(
        self,
        consumers: Consumers,
        lost: list[int],
        batches: list[list[Any]] | None,
        advance: Callable[[float], None],
        journal: Journal | None = None,
    ) -> Decision:
        """Run the calibration batches, choose what goes and repair what stays; with batches of half the size
        where memory is too short for them.

        Args:
            journal: keeps what is decided, for the same choice to go on from there.
        """
        divided, advance = False, in_turns(advance)
        while True:
            try:
                decision = self._chosen(consumers, lost, batches, advance, journal)
                break
            except short_of_memory() as error:
                short = error.with_traceback(None)  # which would hold on to all that was computed
            consumers.forget_activations()
            gc.collect()
            smaller = self._smaller(consumers.analysis.program, batches)
            if smaller is None and computing() is None:
                raise short
            if smaller is None:
                raise self._too_little(consumers, short) from short
            batches, divided = smaller, True
            journal = None if journal is None else journal.reopened()
        if divided and batches is not None:
            decision.notes.append(
                f"memory was too short for the calibration batches, which were divided into {len(batches)}"
            )
        return decision

    def _smaller(self, program: Program, batches: list[list[Any]] | None) -> list[list[Any]] | None:
        """Batches of half the size; ``None`` where they cannot be halved, or other processes go on with the
        larger ones.
        """
        if batches is None or self.ranks.size > 1:
            return None
        try:
            return halved(program, batches)
        except short_of_memory():  # not even a few positions fit
            return None

    def _chosen(
        self,
        consumers: Consumers,
        lost: list[int],
        batches: list[list[Any]] | None,
        advance: Callable[[float], None],
        journal: Journal | None,
    ) -> Decision:
        analysis = consumers.analysis
        part = self.config.drift_part
        own = () if batches is None else self.ranks.own(len(batches))
        given = [] if batches is None else [batches[index] for index in own]
        count = 0 if batches is None else 2 if part else 1
        device = computing()
        runners = [
            Runner(analysis.program, given, numbers=own, returns=False, device=device) for _ in range(count)
        ]
        marks = (
            None
            if batches is None
            else Marks(
                analysis.program, batches, self.config.padding_mask, hold_out=self._restore is not None
            )
        )
        drawn_on = [*analysis.program.weights().values(), torch.empty(0, device=device)]
        with torch.no_grad(), drawing_alike(drawn_on):
            observer = Observer(
                consumers,
                lost,
                self._score,
                self._restore,
                self._precision(analysis.program),
                self.ranks,
                journal,
            )
            drift = Drift(runners[1], part) if len(runners) > 1 else None
            return observer.run(runners[0] if runners else None, marks, advance, drift)

    def _too_little(self, consumers: Consumers, error: Exception) -> OffloadError:
        """What to say where a device has too little memory beside weights in files: what it takes."""
        kind = next(iter(consumers.analysis.program.parameters().values())).dtype
        every = list(consumers.by_key.values())
        taken = Needed(consumers.analysis, every, kind, self.config.requested or 0.0).on_device
        return OffloadError(
            f"'{computing()}' has too little memory: {first_line(error)}; it takes some"
            f" {taken / 2**30:.2f} GiB with batches as large as the example; give smaller ones, or leave out"
            " the device of offload()"
        )


def _score_of(config: PruningConfig) -> str:
    """What tells a configuration's score from others; of one that nothing tells, a text that no score has."""
    try:
        return config.score_name
    except ArgumentError:
        return f"{type(config.named_score).__qualname__} ?"


__all__ = ["Chooser"]
