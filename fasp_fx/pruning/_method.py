"""The steps of a pruning between the analysis and the rewriting of a program, and what the names of a
configuration stand for there: which counts are possible, what groups cost, how many channel sets each loses,
which those are, and what repairs the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.allocation import (
    Allocation,
    Budget,
    Cap,
    CostAllocation,
    CostCurve,
    Costs,
    Global,
    Limit,
    Search,
    check_asked,
    check_patterns,
    counted,
    is_excluded,
    lost_by_pattern,
    uniform,
    validate,
)
from fasp_fx.analysis import APPROXIMATE, Analysis, Group, Groups, Resource, Sparsity
from fasp_fx.base import (
    between,
    computing,
    device_of,
    drawing_alike,
    float32_products,
    multiplies_bfloat16,
    tolerable,
    warn,
)
from fasp_fx.calibration import (
    ENOUGH,
    Batches,
    BudgetTrial,
    ByColumns,
    Choices,
    Consumer,
    Consumers,
    Decision,
    Drift,
    GroupScore,
    InputGradients,
    Ledger,
    Loss,
    MakeStatistic,
    ModelTrial,
    Observation,
    Outputs,
    Ranks,
    Restore,
    TokenRoles,
    Visit,
    in_pieces,
    mixed,
    next_token,
    order_of,
    orders_of,
    resolve_loss,
    resolve_score,
    restored_by,
    ridge,
    whole_batches,
    without_data,
)
from fasp_fx.capturing import Program, Runner, results
from fasp_fx.errors import (
    ArgumentError,
    CalibrationError,
    CalibrationWarning,
    NothingPrunableError,
    SparsityError,
)

from ._config import MEASURED, PruningConfig


@dataclass(frozen=True)
class Method:
    """How channels are chosen, and what stays is repaired.

    Attributes:
        config: what was asked for.
        loss: what is predicted by gradients; ``None``: nothing is, and consumers count by their own outputs.
        restore: repairs a consumer; ``None``: what stays is left as it is.
    """

    config: PruningConfig
    score: GroupScore
    allocation: Allocation
    loss: Loss | None
    restore: Restore | None

    @classmethod
    def of(cls, config: PruningConfig, auto: Literal["outputs", "next-token"] = "outputs") -> Method:
        """The method that a configuration names; ``loss="auto"`` stands for ``auto``."""
        restore = restored_by(config.restore) if callable(config.restore) else ridge
        return cls(
            config,
            resolve_score(config.effective_score),
            allocation_of(config),
            None if config.loss is None else resolve_loss(auto if config.loss == "auto" else config.loss),
            None if config.restore is None else restore,
        )

    @property
    def gradients(self) -> dict[str, MakeStatistic]:
        """The statistics of gradients that the score wants."""
        return {
            name: make
            for name, make in self.score.statistics.items()
            if getattr(make, "needs_gradient", False)
        }

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.score.needs_data or self.restore is not None or self.needs_costs

    @property
    def needs_costs(self) -> bool:
        """Whether the allocation wants cost curves."""
        return isinstance(self.allocation, CostAllocation)

    @property
    def runs_trials(self) -> bool:
        """Whether the allocation wants to run the model as it would be pruned."""
        return isinstance(self.allocation, Search)

    @property
    def loss_description(self) -> str:
        """What costs are predictions of."""
        if self.loss is None:
            return "the relative squared errors of the consumers' outputs, added up"
        if isinstance(self.loss, Outputs):
            return "half the squared error of the outputs, relative to their mean square"
        return "the cross-entropy of the next token" if self.loss is next_token else "the loss that was given"

    def in_words(self, rise: float) -> str:
        """A predicted rise of the loss on a scale that people know: ‖dense − pruned‖ / ‖dense‖ of all outputs
        together, in percent; the factor of the perplexity; else the rise itself.
        """
        if isinstance(self.loss, Outputs):
            return f"outputs differ by {100 * math.sqrt(2 * rise):.2f} %"
        return f"perplexity x {math.exp(min(rise, 99)):.3f}" if self.loss is next_token else f"{rise:.3g}"


def allocation_of(config: PruningConfig) -> Allocation:
    """The function that an allocation stands for."""
    if callable(config.allocation):
        return config.allocation
    by_costs = config.effective_score == "obs" and not isinstance(config.sparsity, Mapping)
    named: dict[str, Allocation] = {"search": Search(), "global": Global(), "uniform": uniform}
    return named[config.allocation or ("global" if by_costs else "uniform")]


# --- Which counts are possible, and how many channel sets each group loses.


@dataclass(frozen=True)
class Step:
    """Which numbers of channel sets of a group are possible.

    Attributes:
        multiple: as many stay of each block as are a multiple of it.
        at_once: whether all of them go or none.
    """

    multiple: int = 1
    at_once: bool = False


class Constraint(Protocol):
    """Which counts belong together, and which are possible, as a format of files says it.

    Attributes:
        source: what says it, in words.
    """

    source: str

    def __call__(self, groups: Sequence[Group]) -> tuple[list[int | None], list[Step]]:
        """For each group that can lose channel sets its tie, a number that it shares with those that lose as
        much as it does, ``None`` where it stays whole; and its steps, of which those of the first group of a
        tie count.

        Raises:
            NothingPrunableError: all groups stay whole.
        """


def constrained(budget: Budget, constraint: Constraint | None) -> Budget:
    """The budget for one group for all that are tied, in steps that are possible; errors as for
    :class:`Constraint`.
    """
    if constraint is None:
        return budget
    ties, steps = constraint(budget.groups)
    narrowed, by_name = budget.narrowed(ties), dict(zip([group.name for group in budget.groups], steps))
    narrowed.groups = [
        replace(
            group,
            at_once=by_name[group.name].at_once,
            multiple=math.lcm(group.multiple, by_name[group.name].multiple),
        )
        for group in narrowed.groups
    ]
    return narrowed


def open_budget(config: PruningConfig, analysis: Groups, count: Callable[[Cap | None], Resource]) -> Budget:
    """How much of what was asked for may stay, as a budget of the groups that can be pruned and are not
    excluded; without a limit where each pattern has its own sparsity.

    Args:
        count: counts a resource, or what sparsity is a fraction of.

    Raises:
        BudgetError: a resource cannot be counted.
        ArgumentError: a name pattern matches nothing.
        NothingPrunableError: no group can be pruned.
    """
    limits = [Limit.under(cap, count(cap)) for cap in config.budgets]
    if not limits and config.target_sparsity is not None:
        limits = [Limit(count(None), config.target_sparsity)]
    groups, chosen = analysis.groups, analysis.chosen
    check_patterns("exclude", config.exclude, groups)
    budget = Budget(chosen, limits).only([not is_excluded(group, config.exclude) for group in chosen])
    budget.advice = _advice(config, groups)
    if not budget.groups:
        reasons = "; ".join(sorted({group.reason for group in groups if group.reason}))
        why = "exclude= leaves all whole" if chosen else reasons or "it has no coupled weights"
        advice = f"; ask for {budget.advice}" if budget.advice else ""
        raise NothingPrunableError(f"no group of this model can be pruned: {why}{advice}")
    return budget


def check_request(
    method: Method, budget: Budget, costs: Costs | None = None, constraint: Constraint | None = None
) -> None:
    """Validate a request before the costs are measured; arguments and errors as for :func:`allocate`."""
    if isinstance(method.allocation, CostAllocation) and costs is None:
        method.allocation.check(budget, method.config.round_to)
    else:
        allocate(method, budget, costs, constraint=constraint)


def allocate(
    method: Method,
    budget: Budget,
    costs: Costs | None = None,
    trial: BudgetTrial | None = None,
    constraint: Constraint | None = None,
) -> list[int]:
    """How many channel sets each block of each chosen group of the model loses.

    Args:
        costs: the cost curves, where the allocation wants them.
        trial: runs the model as it would be pruned, where the allocation wants that.
        constraint: what the budget was constrained by.

    Raises:
        ArgumentError: a name pattern matches nothing, or the allocation returned what cannot be done.
        SparsityError, BudgetError: the sparsity or a budget is out of reach, or less than a step.
    """
    config, allocation = method.config, method.allocation
    if isinstance(config.sparsity, Mapping):
        check_asked(config.sparsity, budget.groups)
        lost = lost_by_pattern(budget, config.sparsity, config.round_to)
    elif not isinstance(allocation, CostAllocation):
        lost = validate(allocation(budget, config.round_to), budget)
    else:
        assert costs is not None
        more = (trial,) if isinstance(allocation, Search) else ()
        lost = validate(allocation(budget, config.round_to, budget.joined(costs), *more), budget)
    if constraint is not None and not any(lost):
        raise SparsityError(
            f"the sparsity is less than half a step of what {constraint.source} can say; ask for more"
        )
    return budget.spread(lost)


def expected_sparsity(config: PruningConfig, analysis: Analysis) -> float:
    """The sparsity that is asked for, or that something else comes to where all groups lose alike.

    Raises:
        FaspError: as for :func:`open_budget` and :func:`allocate`.
    """
    if config.target_sparsity is not None:
        return config.target_sparsity
    uniform = Method.of(replace(config, allocation="uniform"))
    lost = allocate(uniform, open_budget(config, analysis, partial(counted, analysis)))
    return Sparsity(analysis).removed(
        [count * group.blocks for count, group in zip(lost, analysis.chosen, strict=True)]
    )


def _advice(config: PruningConfig, groups: Sequence[Group]) -> str:
    """What would let more go, if anything: groups that a norm mixes stay unless they are asked for."""
    sizes = [
        group.size
        for group in groups
        if group.status == APPROXIMATE and group.granularity in config.granularity and group.deepest_loss
        if APPROXIMATE not in config.include and not is_excluded(group, config.exclude)
    ]
    include = (*config.include, APPROXIMATE)
    return f"include={include}, for {sum(sizes):,} channel sets more" if sizes else ""


# --- What observing the batches says: what goes, what repairs the rest, and what groups cost.


def precision_of(program: Program) -> str:
    """That of products of float32 while a program runs on calibration data: the device's choice."""
    device = computing() or device_of(program.module)
    return "medium" if multiplies_bfloat16(device, from_float32=True) else "highest"


def by_score(method: Method, consumers: Consumers, lost: Sequence[int]) -> Choices:
    """The channel sets that go first by the score.

    Args:
        lost: channel sets that each block of each chosen group loses.
    """

    def choose(group: Group, count: int, weight_of: Callable[[Consumer], Tensor]) -> np.ndarray:
        return order_of(consumers, group, method.score, count, weight_of).first(count)

    return {
        group.name: partial(choose, group, count)
        for group, count in zip(consumers.analysis.chosen, lost, strict=True)
        if count
    }


def calibrate(
    method: Method,
    consumers: Consumers,
    choices: Choices,
    batches: Batches | None,
    ledger: Ledger,
    advance: Callable[[float], None],
) -> Decision:
    """Run the calibration batches of a program, choose what goes and repair what stays.

    Args:
        choices: which channel sets go.
        ledger: decides, with the processes that share the batches, and keeps it for the same calibration to
            go on from there.
    """
    program, strength, device = consumers.analysis.program, method.config.effective_drift, computing()
    if batches is None:
        decision = without_data(consumers, choices)
        advance(1.0)
        return decision
    numbers = ledger.ranks.own(len(batches))
    some = [batches[index] for index in numbers]
    running = partial(Runner, program, some, numbers=numbers, returns=False, device=device)
    roles = TokenRoles(program, batches, hold_out=method.restore is not None)
    with torch.no_grad(), drawing_alike([*program.weights().values(), torch.empty(0, device=device)]):
        runner = running()
        drift = Drift(running(), runner, strength) if strength else None
        statistics, precision = method.score.statistics, precision_of(program)
        return Visit(consumers, choices, statistics, method.restore, roles, precision).run(
            runner, drift, ledger, advance
        )


@dataclass
class Measured:
    """What observing the dense programs of a model came to.

    Attributes:
        method: by which, without a loss where none could be differentiated.
        curves: the cost curves by the groups' names in the whole model, where they were wanted.
        trials: by program, what runs it as it would be pruned, where the allocation wants that.
    """

    method: Method
    curves: dict[str, CostCurve] = field(default_factory=dict)
    trials: dict[str, ModelTrial] = field(default_factory=dict)

    def costs(self, fingerprint: str) -> Costs:
        """The curves, for the model of that fingerprint."""
        asked = self.method.config
        return Costs(self.curves, fingerprint, asked.score_name, asked.granularity)


@dataclass(frozen=True)
class Measurement:
    """How the dense programs of a model are observed, forward and, where there is a loss, back: cost curves,
    and gradients for the score, which stay with the consumers.

    All programs are measured without gradients once one of them cannot run back: relative errors of consumers
    are no losses of outputs, and neither are compared with the other.

    Attributes:
        consumers: of each program.
        inputs: the graph inputs of the calibration batches of a program.
        ranks: the processes that share the batches.
        wants_curves: whether cost curves are made.
        part: one in so many sequences is run, the first ones, and more of them where tokens are few;
            ``None``: by the quality asked for.
    """

    consumers: Mapping[str, Consumers]
    inputs: Callable[[str], Batches]
    ranks: Ranks
    wants_curves: bool
    part: int | None = None

    def run(self, method: Method, advance: Callable[[float], None]) -> Measured:
        """Observe all programs."""
        measured = Measured(method)
        for number, path in enumerate(self.consumers):
            if not self.wants_curves and (not method.gradients or method.loss is None):
                break
            share = between(advance, number / len(self.consumers), (number + 1) / len(self.consumers))
            try:
                observation = self._observed(method, path, share)
            except tolerable(CalibrationError) as failure:
                if method.config.loss != "auto" or method.loss is None:
                    raise
                for consumers in self.consumers.values():
                    consumers.forget()
                measured = self.run(replace(method, loss=None), advance)
                everywhere = f" in all parts of the model, since part '{path}' cannot" if path else ""
                warn(
                    f"{failure}, as is done now{everywhere}: each consumer counts by the relative error of"
                    " its own output",
                    CalibrationWarning,
                )
                break
            if self.wants_curves:
                self._judge(observation, measured, path)
            observation.consumers.keep_gradients()
        return measured

    def _judge(self, observation: Observation, measured: Measured, path: str) -> None:
        """Make the curves of a program that was observed, and what runs it as it would be pruned."""
        consumers, method = observation.consumers, measured.method
        with torch.no_grad():
            orders = orders_of(consumers, consumers.analysis.chosen, method.score)
        within = f"{path}." if path else ""
        measured.curves |= {
            f"{within}{name}": CostCurve(order.losses)
            for name, order in orders.items()
            if order.losses is not None
        }
        if isinstance(method.allocation, Search):
            measured.trials[path] = ModelTrial(
                observation, orders, method.allocation.sequences, precision_of(consumers.analysis.program)
            )

    def _observed(self, method: Method, path: str, advance: Callable[[float], None]) -> Observation:
        """Observe a program: its sequences as they came where pieces of them do not serve.

        A loss of the user's sees whole batches, whose sequences it may compare.

        Raises:
            CalibrationError: see :meth:`Observation.run`.
        """
        if computing() is not None:
            raise ArgumentError(
                "gradients are taken where the weights are, all of which their way back needs, and not on"
                f" {computing()}; leave out the device of offload(), or use quality='fast'"
            )
        consumers, batches = self.consumers[path], self.inputs(path)
        program = consumers.analysis.program
        # Losses of single columns take less data to predict than those of whole groups.
        less = 2 if isinstance(method.score, ByColumns) else 1
        part = self.part or MEASURED[method.config.quality] * less
        for_costs = {"gradients": InputGradients, **method.score.statistics}
        wanted = for_costs if self.wants_curves else method.gradients
        with drawing_alike(program.weights().values()), float32_products(precision_of(program)):
            # Refuses a mask that hides everything by the number of its batch.
            TokenRoles(program, batches, hold_out=False)
            whole = whole_batches(program, batches)
            has_failed = method.config.loss == "auto" and method.loss is None
            pieces = whole if callable(method.config.loss) or has_failed else in_pieces(program, whole)
            for tried in [mixed(pieces, batches), mixed(whole, batches)]:
                try:
                    roles = TokenRoles(program, [piece.inputs for piece in tried], hold_out=False)
                    observation = Observation(consumers, tried, roles, wanted, method.loss, self.ranks)
                    at_least = max(-(-len(tried) // part), len(batches.by_source()))
                    observation.run(at_least, ENOUGH / less, advance)
                    break
                except tolerable(CalibrationError):
                    if len(tried) == len(whole):
                        raise
                    consumers.forget()
        returned = (node for node in results(program.module.graph) if isinstance(node, fx.Node))
        if isinstance(method.loss, Outputs) and any(node in roles.unmatched for node in returned):
            warn(roles.remark(), CalibrationWarning)  # the loss counts them, which no report would say
        return observation
