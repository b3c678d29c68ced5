"""Learned gates: a number for each channel set, trained with any loop of yours, that says what goes.

:func:`attach` puts gates on a model, ``gates.plan()`` is the plan that they stand for, and
``fasp_fx.apply(model, plan, args, calibration=batches)`` carries it out and restores what stays
(docs/recovery.md).
"""

from __future__ import annotations

from ._attach import attach
from ._gates import Gates, HardConcrete, Kind, Projected

__all__ = ["Gates", "HardConcrete", "Kind", "Projected", "attach"]
