"""What the groups of a model cost, seen at its dense self."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..allocation._allocation import TrialAllocation
from ..allocation.costs import CostCurve, Costs
from ..analysis.groups import Group
from ..base._device import float32_products
from ..base._offload import computing
from ..base._tolerable import tolerable
from ..base._undisturbed import drawing_alike, in_turns
from ..base._warn import warn
from ..calibration._calibration import Piece, in_pieces, whole_batches
from ..calibration._consumers import Consumers
from ..calibration._gradients import ENOUGH, observe_batches
from ..calibration._marks import Marks
from ..calibration._order import curves_of, orders_of
from ..calibration._ranks import Ranks
from ..calibration._trial import ModelTrial
from ..calibration.losses import Outputs
from ..calibration.statistics import InputGradients
from ..capturing._fx import results
from ..errors import ArgumentError, CalibrationError, CalibrationWarning
from ._method import Method, precision_of
from .config import MEASURED


@dataclass(frozen=True)
class Measured:
    """What was seen of the dense model.

    Attributes:
        method: without a loss where none could be differentiated.
        costs: the cost curves by the groups' names in the whole model, if the allocation wants them.
        trials: by program, what runs it as it would be pruned, if the allocation wants that.
    """

    method: Method
    costs: Costs | None = None
    trials: Mapping[str, ModelTrial] = field(default_factory=dict)


def measure_costs(
    method: Method,
    consumers: Mapping[str, Consumers],
    inputs: Callable[[str], list[list[Any]]],
    within: Callable[[str, Group], Group],
    fingerprint: str,
    ranks: Ranks,
    advance: Callable[[float], None],
    costs: Costs | None = None,
    part: int | None = None,
) -> Measured:
    """Observe the dense programs of a model, forward and, where there is a loss, back: cost curves, if the
    allocation wants them, and gradients for the score, which stay with the consumers.

    An allocation that runs trials is given orders and Gram matrices from here, also where the curves were
    measured before. All programs are measured without gradients once one of them cannot run back: relative
    errors of consumers are no losses of outputs, and neither are compared with the other.

    Args:
        inputs: the graph inputs of the calibration batches of a program.
        within: a group of a program as it is known in the whole model.
        fingerprint: of the model.
        costs: the cost curves, where they were measured before.
        part: one in so many sequences is run, the first ones, and more of them where tokens are few;
            ``None``: by the quality asked for.
    """
    is_wanted = method.needs_costs and (costs is None or method.runs_trials)
    curves: dict[str, CostCurve] = {}
    trials: dict[str, ModelTrial] = {}
    for number, (path, own) in enumerate(consumers.items()):
        if not is_wanted and (not method.gradients or method.loss is None):
            break

        @in_turns
        def advanced(fraction: float, done: int = number) -> None:
            advance((done + fraction) / len(consumers))

        by, found, trial = _measured(method, own, is_wanted, ranks, path, inputs(path), advanced, part)
        if by != method and curves:
            for seen in consumers.values():
                seen.forget()
            return measure_costs(by, consumers, inputs, within, fingerprint, ranks, advance, costs, part)
        method = by
        if trial is not None:
            trials[path] = trial
        curves |= {
            within(path, group).name: found[group.name]
            for group in own.analysis.chosen
            if group.name in found
        }
    if is_wanted and costs is None:
        costs = Costs(curves, fingerprint, method.score_name, method.config.granularity)
    return Measured(method, costs, trials)


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
    part = part or MEASURED[method.config.quality] * (2 if method.is_of_columns else 1)
    with drawing_alike(program.weights().values()), float32_products(precision_of(program)):
        by, pieces, marks = _observed(method, consumers, is_wanted, ranks, path, batches, advance, part)
    curves: Mapping[str, CostCurve] = {}
    trial: ModelTrial | None = None
    if is_wanted:
        with torch.no_grad():
            orders = orders_of(consumers, consumers.analysis.chosen, method.score)
        curves = curves_of(orders)
        if isinstance(allocation, TrialAllocation):
            trial = ModelTrial(
                consumers,
                orders,
                pieces,
                marks,
                by.resolved_loss,
                allocation.sequences,
                method.restore is not None,
                precision_of(program),
                ranks,
            )
    consumers.forget_activations()
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
    pieces = whole if callable(method.loss) else in_pieces(program, whole)
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
                by.resolved_loss,
                marks,
                advance,
                -(-len(given) // part),
                ranks,
                ENOUGH / 2 if method.is_of_columns else ENOUGH,
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
    if isinstance(by.resolved_loss, Outputs) and any(node in marks.unmatched for node in returned):
        warn(marks.remark(), CalibrationWarning)  # the loss counts them, which no report would say
    return by, given, marks


__all__ = ["Measured", "measure_costs"]
