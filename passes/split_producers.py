"""The pass that splits fused producers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fasp_fx.capturing._program import Program

from ._base import Pass
from ._split import NAME, split

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis


class SplitFusedProducers(Pass):
    """Precondition: the analysis is that of the program: no pass has run before.

    Postcondition: the split weights are gone; their parts, named ``<weight>_0``, ``<weight>_1`` … where these
    names are free, are recorded in ``program.parts``. A product whose parts cannot be told apart is left
    alone, and its groups stay frozen.
    """

    name = NAME
    renumbers = True

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        return split(program, analysis)


__all__ = ["SplitFusedProducers"]
