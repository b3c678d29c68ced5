"""Abstract interpretation of a program on channel numbers (private mechanism; the README in this folder
explains it).
"""

from __future__ import annotations

from ._consume import WHY_NOT_FOLDED
from ._distinct import are_among, counted, distinct, marked, ranked
from ._execution import Execution
from ._facts import Facts, Layout, Product, Remark, Use
from ._foreseen import TRACED, foreseen
from ._fx import (
    arguments,
    attribute,
    results,
    set_argument,
    target_name,
    viewed,
    way_from_weight,
    written_by,
    written_inputs,
    written_names,
)
from ._interpreter import Interpreter, Walk
from ._moves import run_on_numbers
from ._numbering import Numbering, Slot, laid_by_block
from ._repeating import Repeating, repeating
from ._sizes import is_dynamic, same_sizes
from ._value import NONE, Axis, Value

__all__ = [
    "NONE",
    "TRACED",
    "WHY_NOT_FOLDED",
    "Axis",
    "Execution",
    "Facts",
    "Interpreter",
    "Layout",
    "Numbering",
    "Product",
    "Remark",
    "Repeating",
    "Slot",
    "Use",
    "Value",
    "Walk",
    "are_among",
    "arguments",
    "attribute",
    "counted",
    "distinct",
    "foreseen",
    "is_dynamic",
    "laid_by_block",
    "marked",
    "ranked",
    "repeating",
    "results",
    "run_on_numbers",
    "same_sizes",
    "set_argument",
    "target_name",
    "viewed",
    "way_from_weight",
    "written_by",
    "written_inputs",
    "written_names",
]
