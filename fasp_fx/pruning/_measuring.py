"""What the groups of a model cost: its dense programs are observed on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fasp_fx.allocation import CostCurve, Costs, Search
from fasp_fx.base import between, computing, drawing_alike, float32_products, tolerable, warn
from fasp_fx.calibration import (
    ENOUGH,
    ByColumns,
    Consumers,
    InputGradients,
    ModelTrial,
    Observation,
    Outputs,
    Ranks,
    TokenRoles,
    in_pieces,
    orders_of,
    whole_batches,
)
from fasp_fx.capturing import results
from fasp_fx.errors import ArgumentError, CalibrationError, CalibrationWarning

from ._config import MEASURED
from ._method import Method, precision_of


@dataclass
class Measured:
    """What observing the dense programs of a model came to.

    Attributes:
        method: without a loss where none could be differentiated.
        curves: the cost curves by the groups' names in the whole model, where they were wanted.
        trials: by program, what runs it as it would be pruned, where the allocation wants that.
    """

    method: Method
    curves: dict[str, CostCurve] = field(default_factory=dict)
    trials: dict[str, ModelTrial] = field(default_factory=dict)

    def costs(self, fingerprint: str) -> Costs:
        """The curves, for the model of that fingerprint."""
        config = self.method.config
        return Costs(self.curves, fingerprint, config.score_name, config.granularity)


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
    inputs: Callable[[str], list[list[Any]]]
    ranks: Ranks
    wants_curves: bool
    part: int | None = None

    def run(self, method: Method, advance: Callable[[float], None]) -> Measured:
        """Observe all programs."""
        measured = Measured(method)
        for number, path in enumerate(self.consumers):
            method = measured.method
            if not self.wants_curves and (not method.gradients or method.loss is None):
                break
            share = between(advance, number / len(self.consumers), (number + 1) / len(self.consumers))
            observation, by = self._observed(method, path, share)
            if by != method and measured.curves:
                for consumers in self.consumers.values():
                    consumers.forget()
                return self.run(by, advance)
            measured.method = by
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
            precision = precision_of(consumers.analysis.program)
            measured.trials[path] = ModelTrial(observation, orders, method.allocation.sequences, precision)

    def _observed(
        self, method: Method, path: str, advance: Callable[[float], None]
    ) -> tuple[Observation, Method]:
        """Observe a program: its sequences as they came where pieces of them do not serve, and only forward
        where nothing else does. What was observed, and the method that served.

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
            pieces = whole if callable(method.config.loss) else in_pieces(program, whole)
            can_go_without = method.config.loss == "auto" and method.loss is not None
            attempts = [
                (pieces, method),
                *([(whole, method)] if len(pieces) > len(whole) else []),
                *([(whole, replace(method, loss=None))] if can_go_without else []),
            ]
            for number, (tried, by) in enumerate(attempts):
                try:
                    roles = TokenRoles(program, [piece.inputs for piece in tried], hold_out=False)
                    observation = Observation(consumers, tried, roles, wanted, by.loss, self.ranks)
                    observation.run(-(-len(tried) // part), ENOUGH / less, advance)
                    break
                except tolerable(CalibrationError) as error:
                    if number + 1 == len(attempts):
                        raise
                    failure = error
                    consumers.forget()
        if by.loss is None and method.loss is not None:
            everywhere = f" in all parts of the model, since part '{path}' cannot" if path else ""
            warn(
                f"{failure}, as is done now{everywhere}: each consumer counts by the relative error of its"
                " own output",
                CalibrationWarning,
            )
        returned = (node for node in results(program.module.graph) if isinstance(node, fx.Node))
        if isinstance(by.loss, Outputs) and any(node in roles.unmatched for node in returned):
            warn(roles.remark(), CalibrationWarning)  # the loss counts them, which no report would say
        return observation, by
