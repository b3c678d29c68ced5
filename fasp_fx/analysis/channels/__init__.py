"""Abstract interpretation of a program on channel numbers (private mechanism; the README in this folder
explains it).
"""

from __future__ import annotations

from ._execution import Execution
from ._facts import Facts, Layout, Product, Remark, Use
from ._interpreter import Interpreter, Walk
from ._moves import run_on_numbers
from ._numbering import Numbering, Slot, are_among, counted, distinct, laid_by_block, marked, ranked
from ._operands import NONE, Axis, Value
from ._regroup import Repeating, repeating

__all__ = [
    "NONE",
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
    "counted",
    "distinct",
    "laid_by_block",
    "marked",
    "ranked",
    "repeating",
    "run_on_numbers",
]
