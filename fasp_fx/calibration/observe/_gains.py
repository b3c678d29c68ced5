"""Say, once for a pruning, where the calibration data are too few to repair with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...base._warn import warn
from ...errors import CalibrationWarning
from ..restoration import Restored

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
