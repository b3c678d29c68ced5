"""What operators do to channels, one line each.

``contractions``, ``movement``, ``mixing`` and ``pointwise`` hold the rules as data; ``composites`` holds
graph patterns that name compositions of operators. The grammar is described in ``_grammar`` and in the
documentation's *Writing a rule*.
"""

from __future__ import annotations

from ._grammar import ORDINALS, Alternative, Clause, Dims, Operand, Rule, letters_of, parse
from ._reading import DoesNotApplyError, Reading, read
from ._registry import (
    Affine,
    Operator,
    affine,
    argument_names,
    builtin,
    lookup,
    name_of,
    register,
    unregister,
)
from .composites import COMPOSITES, find_composites
from .contractions import ONE_WIDTH, TOLD
from .movement import REARRANGEMENTS, RESHAPES
from .pointwise import CASTS, CHECKS, VANISHING, pointwise_rule

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
    "Operand",
    "Operator",
    "Reading",
    "Rule",
    "affine",
    "argument_names",
    "builtin",
    "find_composites",
    "letters_of",
    "lookup",
    "name_of",
    "parse",
    "pointwise_rule",
    "read",
    "register",
    "unregister",
]
