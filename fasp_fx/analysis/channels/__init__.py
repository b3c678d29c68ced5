"""Abstract interpretation of a program on channel numbers (private mechanism; the README in this folder
explains it).
"""

from __future__ import annotations

from ._facts import Facts, Layout, Pairs, Product, Remark, Use
from ._interpreter import Interpreter, Walk
from ._moves import run_on_numbers
from ._numbering import NONE, Axis, Numbering, Slot, Value, laid_by_block, marked
from ._regroup import Repeating, repeating

__all__ = [
    "NONE",
    "Axis",
    "Facts",
    "Interpreter",
    "Layout",
    "Numbering",
    "Pairs",
    "Product",
    "Remark",
    "Repeating",
    "Slot",
    "Use",
    "Value",
    "Walk",
    "laid_by_block",
    "marked",
    "repeating",
    "run_on_numbers",
]
