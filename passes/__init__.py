"""The only code that takes channels out of a program, in small steps with the verifier after each.

``Prune(plan)`` is a function ``ExportedProgram -> ExportedProgram``; ``Pipeline`` runs it among the passes of
others.
"""

from __future__ import annotations

from fasp_fx.base._stamps import WRITTEN_BY

from ._run import Pipeline, Prune, remove, split_fused
from ._verify import verify

__all__ = ["WRITTEN_BY", "Pipeline", "Prune", "remove", "split_fused", "verify"]
