"""What calibration data says of a program: what its groups cost, seen at its dense self; which of its
channels go; and what repairs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx

from fasp_fx.allocation import Allocation, CostAllocation, CostCurve, Costs, Search
from fasp_fx.base import (
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
    ByColumns,
    Consumers,
    Decision,
    GroupScore,
    InputGradients,
    Journal,
    Loss,
    MakeStatistic,
    Marks,
    ModelTrial,
    Observer,
    Outputs,
    Piece,
    Ranks,
    Restore,
    curves_of,
    in_pieces,
    next_token,
    observe_batches,
    orders_of,
    resolve_loss,
    resolve_score,
    restored_by,
    ridge,
    whole_batches,
    without_data,
)
from fasp_fx.capturing import Program, Runner, results
from fasp_fx.errors import ArgumentError, CalibrationError, CalibrationWarning

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
            config.allocator,
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
    def needs_costs(self) -> bool:
        """Whether the allocation wants cost curves."""
        return isinstance(self.allocation, CostAllocation)

    @property
    def runs_trials(self) -> bool:
        """Whether the allocation wants to run the model as it would be pruned."""
        return isinstance(self.allocation, Search)

    @property
    def needs_measuring(self) -> bool:
        """Whether the dense model is observed before anything is chosen."""
        return self.needs_costs or (bool(self.gradients) and self.loss is not None)

    @property
    def loss_description(self) -> str:
        """What costs are predictions of."""
        if self.loss is None:
            return "the relative squared errors of the consumers' outputs, added up"
        if isinstance(self.loss, Outputs):
            return "half the squared error of the outputs, relative to their mean square"
        return "the cross-entropy of the next token" if self.loss is next_token else "the loss that was given"


def precision_of(program: Program) -> str:
    """That of products of float32 while a program runs on calibration data: the device's choice."""
    device = computing() or device_of(program.module)
    return "medium" if multiplies_bfloat16(device) else "highest"


# --- Measuring.


def between(advance: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """The progress of a step, as a part of that of all."""
    return lambda fraction: advance(start + (end - start) * fraction)


def measure_costs(
    method: Method,
    consumers: Mapping[str, Consumers],
    inputs: Callable[[str], list[list[Any]]],
    fingerprint: str,
    ranks: Ranks,
    advance: Callable[[float], None],
    costs: Costs | None = None,
    part: int | None = None,
) -> tuple[Method, Costs | None, dict[str, ModelTrial]]:
    """Observe the dense programs of a model, forward and, where there is a loss, back: cost curves, if the
    allocation wants them, and gradients for the score, which stay with the consumers.

    An allocation that runs trials is given orders and Gram matrices from here, also where the curves were
    measured before. All programs are measured without gradients once one of them cannot run back: relative
    errors of consumers are no losses of outputs, and neither are compared with the other.

    Args:
        inputs: the graph inputs of the calibration batches of a program.
        fingerprint: of the model.
        costs: the cost curves, where they were measured before.
        part: one in so many sequences is run, the first ones, and more of them where tokens are few;
            ``None``: by the quality asked for.

    Returns:
        The method, without a loss where none could be differentiated; the cost curves by the groups' names in
        the whole model; and by program, what runs it as it would be pruned: the last two if the allocation
        wants them.
    """
    is_wanted = method.needs_costs and (costs is None or method.runs_trials)
    curves: dict[str, CostCurve] = {}
    trials: dict[str, ModelTrial] = {}
    for number, (path, own) in enumerate(consumers.items()):
        if not is_wanted and (not method.gradients or method.loss is None):
            break

        share = between(advance, number / len(consumers), (number + 1) / len(consumers))
        by, found, trial = _measured(method, own, is_wanted, ranks, path, inputs(path), share, part)
        if by != method and curves:
            for seen in consumers.values():
                seen.forget()
            return measure_costs(by, consumers, inputs, fingerprint, ranks, advance, costs, part)
        method = by
        if trial is not None:
            trials[path] = trial
        curves |= {f"{path}.{name}" if path else name: curve for name, curve in found.items()}
    if is_wanted and costs is None:
        costs = Costs(curves, fingerprint, method.config.score_name, method.config.granularity)
    return method, costs, trials


def _measured(
    method: Method,
    consumers: Consumers,
    is_wanted: bool,
    ranks: Ranks,
    path: str,
    batches: list[list[Any]],
    advance: Callable[[float], None],
    part: int | None,
) -> tuple[Method, Mapping[str, CostCurve], ModelTrial | None]:
    """Measure one program.

    Returns the method, without a loss where none could be differentiated, the curves, and what runs trials.
    """
    if computing() is not None:
        raise ArgumentError(
            "gradients are taken where the weights are, all of which their way back needs, and not on"
            f" {computing()}; leave out the device of offload(), or use quality='fast'"
        )
    program, allocation = consumers.analysis.program, method.allocation
    # Losses of single columns take less data to predict than those of whole groups.
    less = 2 if isinstance(method.score, ByColumns) else 1
    part = part or MEASURED[method.config.quality] * less
    with drawing_alike(program.weights().values()), float32_products(precision_of(program)):
        by, pieces, marks = _observed(
            method, consumers, is_wanted, ranks, path, batches, advance, part, ENOUGH / less
        )
    curves: Mapping[str, CostCurve] = {}
    trial: ModelTrial | None = None
    if is_wanted:
        with torch.no_grad():
            orders = orders_of(consumers, consumers.analysis.chosen, method.score)
        curves = curves_of(orders)
        if isinstance(allocation, Search):
            trial = ModelTrial(
                consumers,
                orders,
                pieces,
                marks,
                by.loss,
                allocation.sequences,
                method.restore is not None,
                precision_of(program),
                ranks,
            )
    consumers.forget(gradients=False)
    return by, curves, trial


def _observed(
    method: Method,
    consumers: Consumers,
    is_wanted: bool,
    ranks: Ranks,
    path: str,
    batches: list[list[Any]],
    advance: Callable[[float], None],
    part: int,
    enough: float,
) -> tuple[Method, list[Piece], Marks]:
    """Run one in ``part`` of the sequences; as they came where pieces of them do not serve, and only forward
    where nothing else does.

    Returns the method that serves, all sequences in the pieces that do, and which of their tokens are
    padding.

    A loss of the user's sees whole batches, whose sequences it may compare.

    Raises:
        CalibrationError: see :func:`observe_batches`.
    """
    program = consumers.analysis.program
    for_costs = {"gradients": InputGradients, **method.score.statistics}
    wanted = for_costs if is_wanted else method.gradients
    # Refuses a mask that hides everything by the number of its batch.
    Marks(program, batches, hold_out=False)
    whole = whole_batches(program, batches)
    pieces = whole if callable(method.config.loss) else in_pieces(program, whole)
    attempts = [(pieces, method)]
    if len(pieces) > len(whole):
        attempts.append((whole, method))
    if method.config.loss == "auto" and method.loss is not None:
        attempts.append((whole, replace(method, loss=None)))
    for number, (given, by) in enumerate(attempts):
        try:
            marks = Marks(program, [piece.inputs for piece in given], hold_out=False)
            observe_batches(
                consumers,
                given,
                wanted,
                by.loss,
                marks,
                advance,
                -(-len(given) // part),
                ranks,
                enough,
            )
            break
        except tolerable(CalibrationError) as error:
            if number + 1 == len(attempts):
                raise
            failure = error
            consumers.forget()
    if by.loss is None and method.loss is not None:
        everywhere = f" in all parts of the model, since part '{path}' cannot" if path else ""
        warn(
            f"{failure}, as is done now{everywhere}: each consumer counts by the relative error of its own"
            " output",
            CalibrationWarning,
        )
    returned = (node for node in results(program.module.graph) if isinstance(node, fx.Node))
    if isinstance(by.loss, Outputs) and any(node in marks.unmatched for node in returned):
        warn(marks.remark(), CalibrationWarning)  # the loss counts them, which no report would say
    return by, given, marks


# --- Choosing and repairing.


def calibrate(
    method: Method,
    consumers: Consumers,
    lost: list[int],
    batches: list[list[Any]] | None,
    ranks: Ranks,
    advance: Callable[[float], None],
    journal: Journal | None = None,
) -> Decision:
    """Run the calibration batches of a program, choose what goes and repair what stays.

    Args:
        lost: channel sets that each block of each chosen group loses.
        journal: keeps what is decided, for the same calibration to go on from there.
    """
    program, drift, device = consumers.analysis.program, method.config.effective_drift, computing()
    if batches is None:
        found = without_data(consumers, lost, method.score)
        advance(1.0)
        return found
    own = ranks.own(len(batches))
    given = [batches[index] for index in own]
    running = partial(Runner, program, given, numbers=own, returns=False, device=device)
    marks = Marks(program, batches, hold_out=method.restore is not None)
    drawn_on = [*program.weights().values(), torch.empty(0, device=device)]
    with torch.no_grad(), drawing_alike(drawn_on):
        return Observer(
            consumers,
            lost,
            method.score,
            method.restore,
            running(),
            marks,
            precision_of(program),
            ranks,
            journal,
            running() if drift else None,
            drift,
        ).run(advance)


__all__ = ["Method", "between", "calibrate", "measure_costs"]
