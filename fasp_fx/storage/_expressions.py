"""Expressions of sizes and guards on them, as text that torch would hand to sympy and to Python: checked
here, in time that grows with their length alone.

Evaluated as it stands, ``2**2**2**2**2**2`` fills the memory. What save() writes is short: a size is a sum of
few products of few symbols, and below 2^63.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from ..errors import StoreError

#: characters of one expression, and how deep it is nested
LENGTH, DEPTH = 8000, 40
#: its nodes: sympy is slower than in proportion, and Python, which evaluates guards, is not
NODES, GUARD_NODES = 400, LENGTH
#: what can be meant by a size has 64 bits; on the way to it, products of some
BITS = 2048
#: the largest exponent
EXPONENT = 8
_POWERS = {"Pow", "PowByNatural", "FloatPow"}
_SHIFTS = {"LShift", "RShift"}
_SUMS = {"Add", "Max", "Min", "Piecewise", "ExprCondPair", "Tuple", "Where"}
#: constructors that sympy.srepr writes for sizes, with torch's own
_CALLS = {
    *(
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "Max",
        "Min",
        "floor",
        "ceiling",
        "Abs",
        "Piecewise",
        "ExprCondPair",
        "Tuple",
    ),
    *(
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "And",
        "Or",
        "Not",
        "FloorDiv",
        "ModularIndexing",
        "Where",
    ),
    *(
        "PythonMod",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "LShift",
        "RShift",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
    ),
    *(
        "IsNonOverlappingAndDenseIndicator",
        "TruncToFloat",
        "TruncToInt",
        "RoundToInt",
        "RoundDecimal",
        "ToFloat",
        "Identity",
    ),
}
_CONSTANTS = {"true", "false"}
#: what a symbol is assumed to be
_ASSUMPTIONS = {
    "positive",
    "integer",
    "nonnegative",
    "real",
    "zero",
    "finite",
    "rational",
    "precision",
    "commutative",
    "evaluate",
    "negative",
    "extended_real",
}
#: names of symbols and digits of numbers
_WORD = re.compile(r"-?\w{1,80}(\.\d{1,80})?([eE][+-]?\d{1,3})?")
_GUARD_CALLS = {
    "max",
    "min",
    "abs",
    "int",
    "float",
    "bool",
    "IsNonOverlappingAndDenseIndicator",
    "cast_symbool_to_symint_guardless",
}
_GUARD_MODULES = {
    "math": {"floor", "ceil", "trunc", "sqrt", "pow"},
    "torch": {"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "_sym_sqrt"},
}
_GUARD_METHODS = {"size", "stride", "storage_offset", "numel"}
_OPERATIONS = (
    ast.BoolOp,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.Load,
)


def refuse(kind: str, text: Any) -> StoreError:
    """The error for a forged piece of text."""
    return StoreError(
        f"graph.json holds the {kind} {text!r:.300}, which save() never writes; the file is damaged or"
        " forged: save the result again"
    )


def check_expression(text: Any) -> None:
    """Refuse a size expression that is more than constructors of symbols, numbers and arithmetic, or that
    grows beyond measure.

    Raises:
        StoreError: quotes the expression.
    """
    tree = _parsed("expression", text)
    try:
        _bits(tree)
    except ValueError as error:
        raise refuse("expression", text) from error


def _parsed(kind: str, text: Any) -> ast.expr:
    """The tree of a text that is short enough.

    Raises:
        StoreError: quotes the text.
    """
    if not isinstance(text, str):
        raise refuse(kind, text)
    most = GUARD_NODES if kind == "guard" else NODES
    if len(text) > LENGTH or _nesting(text) > DEPTH:
        raise _too_long(kind, text, most)
    try:
        tree = ast.parse(text.strip() if kind == "guard" else text, mode="eval").body
        count = sum(1 for _ in ast.walk(tree))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise refuse(kind, text) from error
    if count > most:
        raise _too_long(kind, text, most)
    return tree


def _too_long(kind: str, text: str, most: int) -> StoreError:
    """The error for a text that would take long, whoever wrote it."""
    return StoreError(
        f"the graph holds the {kind} {text!r:.300}, which is too long to be stored: at most {LENGTH:,}"
        f" characters of {most:,} parts, {DEPTH} levels deep, are read; capture the model with fewer sizes"
        " that vary (dynamic_shapes=)"
    )


def _nesting(text: str) -> int:
    """A bound on how deep a text is nested: Python's parser can exhaust the stack of the process."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return max(
        deepest,
        text.count("**") + text.count("~"),
        text.count("not ") // 2,
        max(map(len, re.findall(r"[+-]+", text)), default=0),
    )


def _bits(node: ast.expr) -> float:
    """An upper bound on the binary digits of what an expression evaluates to, symbols taken as sizes.

    Raises:
        ValueError: it holds something else, or grows beyond measure.
    """
    bits = _bits_of(node)
    if bits > BITS:
        raise ValueError("it is too large")
    return bits


def _bits_of(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _digits(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _bits(node.operand)
    if isinstance(node, ast.Tuple):
        return max(map(_bits, node.elts), default=1)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _CALLS:
        raise ValueError("it is no arithmetic")
    for keyword in node.keywords:
        if (
            keyword.arg not in _ASSUMPTIONS
            or not isinstance(keyword.value, ast.Constant)
            or type(keyword.value.value) not in (bool, int)
        ):
            raise ValueError(f"{keyword.arg} is no assumption")
    return _bits_of_call(node.func.id, node.args, node)


def _bits_of_call(name: str, arguments: list[ast.expr], node: ast.Call) -> float:
    if name in ("Symbol", "Float", "Integer"):
        if len(arguments) != 1 or not isinstance(arguments[0], (ast.Constant, ast.UnaryOp)):
            raise ValueError("it is no symbol or number")
        for keyword in node.keywords:
            if keyword.arg == "precision" and not 0 < keyword.value.value <= 1024:  # type: ignore[attr-defined]
                raise ValueError("no number has that precision")
        value = arguments[0].value if isinstance(arguments[0], ast.Constant) else None
        if isinstance(value, str):
            if _WORD.fullmatch(value) is None:
                raise ValueError("it is no word")
            return 64 if name == "Symbol" else max(64, 4 * len(value))
        if name == "Symbol":
            raise ValueError("a symbol has a name")
        return _bits(arguments[0])
    if not arguments:
        raise ValueError("it has no arguments")
    held = list(map(_bits, arguments))
    if name in _POWERS:
        return max(held[0], 1) * _exponent(arguments)
    if name in _SHIFTS:
        return held[0] + _exponent(arguments)
    if name == "Mul":
        return sum(held)
    return max(held) + (len(held).bit_length() if name in _SUMS else 0)


def _exponent(arguments: list[ast.expr]) -> int:
    """The size of an exponent, which is a number: no model's sizes are powers of each other."""
    if len(arguments) != 2:
        raise ValueError("a power takes two")
    found: Any = arguments[1]
    while isinstance(found, (ast.Call, ast.UnaryOp)):
        if isinstance(found, ast.UnaryOp):
            found = found.operand
            continue
        if (
            not isinstance(found.func, ast.Name)
            or found.func.id not in ("Integer", "Rational", "Float")
            or not found.args
        ):
            raise ValueError("an exponent is a number")
        found = found.args[0]
    value = found.value if isinstance(found, ast.Constant) else None
    number = float(value) if isinstance(value, (int, float, str)) and len(str(value)) < 40 else float("inf")
    if not abs(number) <= EXPONENT:
        raise ValueError("an exponent is small")
    return max(1, int(abs(number)) + 1)


def _digits(value: float) -> float:
    return max(1, value.bit_length()) if isinstance(value, int) else 64


def check_guard(text: Any) -> None:
    """Refuse a guard that is more than arithmetic on the sizes of inputs, or that grows beyond measure.

    Raises:
        StoreError: quotes the guard.
    """
    tree = _parsed("guard", text)
    if not _is_guard(tree) or not _is_small(tree):
        raise refuse("guard", text)


def _is_guard(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, bool)
    if isinstance(node, ast.Subscript):
        called = node.value
        if isinstance(called, ast.Call):
            return (
                isinstance(node.slice, ast.Constant) and type(node.slice.value) is int and _is_guard(called)
            )
        return _is_input(node)
    if isinstance(node, ast.Call):
        if node.keywords:
            return False
        function = node.func
        if isinstance(function, ast.Name):
            return function.id in _GUARD_CALLS and all(map(_is_guard, node.args))
        if not isinstance(function, ast.Attribute):
            return False
        if isinstance(function.value, ast.Name):
            return function.attr in _GUARD_MODULES.get(function.value.id, set()) and all(
                map(_is_guard, node.args)
            )
        return (
            function.attr in _GUARD_METHODS
            and _is_input(function.value)
            and all(isinstance(a, ast.Constant) and type(a.value) is int for a in node.args)
        )
    return isinstance(node, _OPERATIONS) and all(map(_is_guard, ast.iter_child_nodes(node)))


def _is_small(tree: ast.expr) -> bool:
    """Whether a guard raises to small powers only, at most twice, and names no number of more
    than 64 digits.
    """
    powers = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value.bit_length() > 256:
            return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
            powers += 1
            exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
            if (
                powers > 2
                or not isinstance(exponent, ast.Constant)
                or not isinstance(exponent.value, (int, float))
                or not abs(exponent.value) <= 64
            ):
                return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return False
    return True


def _is_input(node: ast.AST) -> bool:
    """Whether the node is ``L[...]...[...]`` with constant keys."""
    if isinstance(node, ast.Name):
        return node.id == "L"
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    key = node.slice.value
    return _is_input(node.value) and (type(key) is int or (isinstance(key, str) and is_key(key)))


def is_key(key: Any) -> bool:
    """Whether this is the key of a dict that can stand between quotes."""
    return isinstance(key, str) and not set(key) & set("\"'\\\n\r{}")


__all__ = ["check_expression", "check_guard", "is_key", "refuse"]
