"""What operators do to channels, one line each.

``contractions``, ``movement``, ``mixing`` and ``pointwise`` hold the rules as data; ``composites`` holds graph patterns that name
compositions of operators. The grammar is described in ``_grammar`` and in the documentation's *Writing a rule*.
"""

from __future__ import annotations

from ._grammar import ORDINALS, Alternative, Clause, Dims, Operand, Rule, parse
from ._registry import builtin, lookup, register, unregister
from .composites import COMPOSITES, find_composites
from .pointwise import VANISHING

__all__ = [
    "COMPOSITES",
    "ORDINALS",
    "VANISHING",
    "Alternative",
    "Clause",
    "Dims",
    "Operand",
    "Rule",
    "builtin",
    "find_composites",
    "lookup",
    "parse",
    "register",
    "unregister",
]
