"""What operators do to channels, one line each.

``contractions``, ``movement``, ``mixing`` and ``pointwise`` hold the rules as data; ``composites`` holds
graph patterns that name compositions of operators. The grammar is described in ``_grammar`` and in the
documentation's *Writing a rule*.
"""

from __future__ import annotations

from ._composites import COMPOSITES, find_composites
from ._contractions import ONE_WIDTH, TOLD
from ._grammar import ORDINALS, Alternative, Clause, Dims, OperandDims, Rule, letters_of, parse
from ._movement import REARRANGEMENTS, RESHAPES
from ._pointwise import CASTS, CHECKS, VANISHING, pointwise_rule
from ._reading import DoesNotApplyError, Reading, read
from ._registry import (
    Affine,
    Operator,
    affine,
    argument_names,
    builtin,
    lookup,
    register,
    unregister,
)

__all__ = [
    "CASTS",
    "CHECKS",
    "COMPOSITES",
    "ONE_WIDTH",
    "ORDINALS",
    "REARRANGEMENTS",
    "RESHAPES",
    "TOLD",
    "VANISHING",
    "Affine",
    "Alternative",
    "Clause",
    "Dims",
    "DoesNotApplyError",
    "OperandDims",
    "Operator",
    "Reading",
    "Rule",
    "affine",
    "argument_names",
    "builtin",
    "find_composites",
    "letters_of",
    "lookup",
    "parse",
    "pointwise_rule",
    "read",
    "register",
    "unregister",
]
