"""Say, once for a pruning, where the calibration data are too few to repair with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._warn import warn
from ..errors import CalibrationWarning
from ..restoration import Restored

#: the least part of the error on tokens held out that is worth calling a gain
_GAIN = 0.02
#: tokens for each column from which it is not the amount of data that limits a repair
_ENOUGH = 10


def warn_of_few(outcomes: Mapping[str, Sequence[Restored]], tokens: Mapping[str, int]) -> None:
    """Warn where at least half of the consumers gained nothing, or next to nothing, and saw few tokens for
    their columns.

    Args:
        outcomes: of each consumer.
        tokens: of those that could be repaired, the fewest calibration tokens that a block saw.
    """
    able = {name: found for name, found in outcomes.items() if name in tokens}
    few = [
        name
        for name, found in able.items()
        if tokens[name] < _ENOUGH * found[0].weight.shape[-1] and not any(map(_gained, found))
    ]
    if not few or 2 * len(few) < len(able):
        return
    first = few[0]
    warn(
        f"too little calibration data to repair {len(few)} of {len(able)} consumers: judged on tokens held"
        " out, a repair gains next to nothing, so that their weights stay as they are, or nearly so;"
        f" '{first}' has {outcomes[first][0].weight.shape[-1]:,} columns and saw {tokens[first]:,} tokens;"
        " calibrate on more",
        CalibrationWarning,
    )


def _gained(outcome: Restored) -> bool:
    if outcome.held_before is None or outcome.held_after is None:
        return False
    return outcome.held_before == 0 or outcome.held_after < (1 - _GAIN) * outcome.held_before


__all__ = ["warn_of_few"]
