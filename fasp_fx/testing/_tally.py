"""How much was tried, for the last lines of a test run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts of this process."""

    programs: int = 0
    rules: int = 0
    examples: int = 0

    def __str__(self) -> str:
        return (
            f"fasp_fx.testing: {self.programs:,} programs and {self.examples:,} examples of {self.rules:,}"
            " rules were tried"
        )


TALLY = Tally()
