"""What goes of one program, without taking it out, which takes longest."""

from __future__ import annotations

from typing import Any

from fasp_fx.analysis import Analysis
from fasp_fx.calibration import Decision
from fasp_fx.capturing import Program
from fasp_fx.pruning import Whole, _prune


def decide(program: Program, config: Any, calibration: Any, **how: Any) -> tuple[Analysis, Decision]:
    subject = Whole(program)
    ((_, decision),) = _prune.decide(subject, config, calibration, _prune.Job(**how))
    return subject.analyses[""], decision
