"""Scores by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..errors import ArgumentError
from .obs import OBS
from .scoring import ByColumns, GroupScore, Random, Score, fasp, magnitude


def resolve_score(score: Literal["fasp", "magnitude", "random", "obs"] | Score) -> GroupScore:
    """The score of groups that a name, or a score of columns, stands for (a function is taken to need
    calibration data).

    Raises:
        ArgumentError: an unknown name.
    """
    if isinstance(score, GroupScore):
        if not isinstance(score.statistics, Mapping) or not all(map(callable, score.statistics.values())):
            raise ArgumentError(
                f"{type(score).__name__}.statistics is {score.statistics!r}; give a mapping from names to"
                " what makes a statistic (fasp_fx.statistics.MakeStatistic)"
            )
        return score
    if isinstance(score, type):
        raise ArgumentError(f"score={score.__name__} is a class; make one: score={score.__name__}()")
    if score == "obs":
        return OBS()
    if callable(score):
        return ByColumns(score)
    if score == "fasp":
        return ByColumns(fasp)
    if score == "magnitude":
        return ByColumns(magnitude, needs_data=False)
    if score == "random":
        return ByColumns(Random(), needs_data=False)
    raise ArgumentError(
        f"score={score!r} is not known; use 'fasp', 'obs', 'magnitude', 'random', a callable from"
        " fasp_fx.scoring.Columns to a tensor, or a GroupScore"
    )


__all__ = ["resolve_score"]
