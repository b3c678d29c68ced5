"""Put restored weights in the place of the captured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fasp_fx.errors import VerificationError

from ._base import Pass

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis
    from fasp_fx.capturing._program import Program


class RestoreWeights(Pass):
    """Precondition: the restored weights have the captured shapes; columns to be removed may hold anything.

    Postcondition: the graph is unchanged; the named weights hold the given values, under all their names.

    Args:
        restored: new values by canonical name.
    """

    name = "restore_weights"

    def __init__(self, restored: dict[str, Tensor]) -> None:
        self.restored = restored

    def rewrite(self, program: Program, analysis: Analysis) -> Program:
        if not self.restored:
            return program
        program = program.with_own_weights()
        aliases, weights = program.aliases(), program.weights()
        for name, value in self.restored.items():
            if name not in aliases or value.shape != weights[name].shape:
                found = (
                    f"has shape {tuple(weights[name].shape)} there"
                    if name in weights
                    else "is not a weight of the program"
                )
                raise VerificationError(
                    f"the restored weight '{name}' of shape {tuple(value.shape)} {found}; restored weights"
                    " have the dense shapes"
                )
            program.replace_weight(aliases[name], value)
        return program
