"""Which channels of a program go, and what repairs the rest, by what calibration data says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasp_fx.analysis import Group
from fasp_fx.base import computing, drawing_alike
from fasp_fx.calibration import (
    Choices,
    Consumer,
    Consumers,
    Decision,
    Drift,
    Ledger,
    TokenRoles,
    Visit,
    order_of,
    without_data,
)
from fasp_fx.capturing import Runner

from ._method import Method, precision_of


def by_score(method: Method, consumers: Consumers, lost: Sequence[int]) -> Choices:
    """The channel sets that go first by the score.

    Args:
        lost: channel sets that each block of each chosen group loses.
    """

    def choose(group: Group, count: int, weight_of: Callable[[Consumer], Tensor]) -> np.ndarray:
        return order_of(consumers, group, method.score, count, weight_of).first(count)

    counts = zip(consumers.analysis.chosen, lost, strict=True)
    return {group.name: partial(choose, group, count) for group, count in counts if count}


def calibrate(
    method: Method,
    consumers: Consumers,
    choices: Choices,
    batches: list[list[Any]] | None,
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
    drawn_on = [*program.weights().values(), torch.empty(0, device=device)]
    with torch.no_grad(), drawing_alike(drawn_on):
        runner = running()
        drift = Drift(running(), runner, strength) if strength else None
        statistics, precision = method.score.statistics, precision_of(program)
        return Visit(consumers, choices, statistics, method.restore, roles, precision).run(
            runner, drift, ledger, advance
        )
