"""Hold a model with gates against the dense program with the closed channels masked, before it is trained: a
weight that the model reads past the attribute of its module is not multiplied by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ...analysis._analysis import Analysis
from ...analysis.groups import Group, by_block
from ...base._tolerable import tolerable
from ...base._warn import warn
from ...capturing._compare_with_model import called, trouble_with
from ...capturing._program import Program
from ...errors import ArgumentError, CalibrationError, VerificationWarning
from ...pruning.check._bisect import largest_passing_subset
from ...pruning.check._reference import masked_program

if TYPE_CHECKING:
    from ._gates import Gates


def check_effect(
    gates: Gates, model: nn.Module, program: Program, analysis: Analysis, groups: list[Group]
) -> None:
    """Close every second gate of each block, and compare on the example inputs.

    Args:
        program: the model as it was captured without gates.
        groups: those that have gates.

    Raises:
        ArgumentError: closed gates are not the removal of their channels; names the groups.

    Warns:
        VerificationWarning: the masked program does not run on the example inputs.
    """

    def fault(closed: list[Group]) -> str | None:
        """How the model differs when gates of these groups are closed."""
        names = {group.name for group in closed}
        gone = [_every_second(group) & (group.name in names) for group in groups]
        masked = masked_program(analysis, gates.decision(gone))
        args, kwargs = program.call()
        with gates.closed(gone):
            found, _ = called(masked, model, args, kwargs)
        return trouble_with(masked, found, args, kwargs)

    try:
        without = largest_passing_subset(groups, fault)[1]
    except tolerable(CalibrationError) as error:
        warn(f"what gates do was not compared with the removal of channels: {error}", VerificationWarning)
        return
    if without:
        names = ", ".join(f"'{group.name}'" for group, _ in without)
        raise ArgumentError(
            f"closed gates of {names} are not the removal of their channels: {without[0][1]}; the model reads"
            " weights past the attributes of their modules, such as from a list of its own. Read them there,"
            f" or leave them whole with exclude=('{without[0][0].consumers[0].name}',)"
        )


def _every_second(group: Group) -> np.ndarray:
    closed = np.zeros(group.size, dtype=bool)
    closed[np.stack(by_block(group.block_of))[:, 1::2]] = True
    return closed


__all__ = ["check_effect"]
