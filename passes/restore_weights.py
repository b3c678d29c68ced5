"""Put restored weights in the place of the captured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fasp_fx._program import Program


class RestoreWeights:
    """Precondition: the restored weights have the captured shapes; columns to be removed may hold anything.

    Postcondition: the graph is unchanged; the named weights hold the given values, under all their names.

    Args:
        restored: new values by canonical name.
    """

    name = "restore_weights"

    def __init__(self, restored: dict[str, Tensor]) -> None:
        self.restored = restored

    def __call__(self, program: Program) -> Program:
        if not self.restored:
            return program
        program = program.copy()
        aliases = program.aliases()
        for name, value in self.restored.items():
            program.replace_weight(aliases[name], value)
        return program
