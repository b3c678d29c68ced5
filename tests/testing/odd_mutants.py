"""What the analysis once did not see, put back: faults that show on odd programs alone
(:mod:`fasp_fx.testing._odd`).

There is at least one for each class of them. To each belong a net on which it shows and the kinds of blocks
among which drawing has to find another. Weights that are read in two ways, or one by one from a stack, have
no fault of their own: what makes them right is that a weight has its channels once, whoever reads them ("a
missed tie").
"""

from __future__ import annotations

from typing import Any

from mutants import Mutant, attribute

import fasp_fx.analysis.channels._interpreter
import fasp_fx.analysis.channels._moves
import fasp_fx.passes._split
import fasp_fx.patterns._reading
from fasp_fx.testing.specs import (
    Across,
    Activation,
    Foreign,
    Fused,
    Linear,
    Net,
    Odd,
    Regroup,
    Remember,
    Sequences,
    Sized,
)

_CHANNELS, _SPLIT = fasp_fx.analysis.channels, fasp_fx.passes._split
_MOVES, _INTERPRETER = _CHANNELS._moves, _CHANNELS._interpreter


def _around(block: Odd, width: int = 6, tokens: int = 3) -> Net:
    return Net((Linear(width), Activation("tanh"), block, Linear(3)), (Sequences(4, tokens),))


def _only_what_mixes(_: Any) -> Any:
    return property(lambda self: self.crossing | self.windowed | self.placed)


def _at_this_size(_: Any) -> Any:
    return lambda self, shape: lambda numbers: self._run(numbers.expand(shape))


ACROSS = Mutant(
    "positions that an operator orders need not be the same",
    attribute(fasp_fx.patterns._reading.Reading, "crossed", _only_what_mixes),
    _around(Across("roll")),
)
REGROUP = Mutant(
    "a reshape holds at one size",
    attribute(_MOVES.Move, "_shift", _at_this_size),
    _around(Regroup("turned"), 12, 4),
)
REMEMBER = Mutant(
    "what calls write is constant",
    attribute(_INTERPRETER, "written_names", lambda _: lambda graph: set()),
    _around(Remember("blocks")),
)
FOREIGN = Mutant(
    "what returns no tensor reads none",
    attribute(_INTERPRETER.Interpreter, "_read", lambda _: lambda self, node, walk: None),
    _around(Foreign("number")),
)
SIZED = Mutant(
    "a cut by a size is the same at every size",
    attribute(_MOVES.Move, "_unsettled", lambda _: lambda *_: {}),
    _around(Sized("pad")),
    seed=1,
)
FUSED = Mutant(
    "tokens of a fused weight stay where they are at every size",
    attribute(_SPLIT, "_lies_along", lambda _: lambda label, recorded, size: label is not None),
    _around(Fused(2, "cut"), tokens=4),
)
SHIFTED = Mutant(
    "tokens of a fused weight are shifted by the same number at every size",
    attribute(_SPLIT, "_moves_alike", lambda _: lambda node, rule: True),
    _around(Fused(2, "shifted"), tokens=4),
)

#: each fault with the class of blocks on which it shows and, where it is not all, their kinds
SHOWING_ON: dict[Mutant, tuple[type[Odd], tuple[str, ...]]] = {
    ACROSS: (Across, ()),
    REGROUP: (Regroup, ()),
    REMEMBER: (Remember, ("blocks",)),
    FOREIGN: (Foreign, ("number",)),
    SIZED: (Sized, ()),
    FUSED: (Fused, ("batch", "cut")),  # in others the small sizes of the analysis show it
    SHIFTED: (Fused, ("shifted",)),
}
ODD = tuple(SHOWING_ON)
