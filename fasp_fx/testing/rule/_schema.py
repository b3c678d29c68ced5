"""Make up calls of an operator from its schema and its rule.

A rule says what shapes go together, the schema what else is asked for. What does not fit is refused by the
operator itself; such calls are drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fasp_fx.base import OpOverload, schema_of
from fasp_fx.patterns import Alternative, Rule

from ._calls import Call, Draw

#: arguments that hold positions rather than values
_INDICES = {"index", "indices"}
_MASKS = {"mask", "condition", "attn_mask"}
_VARIANCES = {"running_var"}
_DIMS = {
    *("dim", "dims", "dim0", "dim1", "axis", "axis0", "axis1", "start_dim", "end_dim", "source"),
    "destination",
}


#: arguments that are numbers, or say yes or no, by type
_NUMBERS: dict[str, Callable[[Draw], Any]] = {
    "bool": Draw.flag,
    "float": Draw.float,
    **dict.fromkeys(("number", "Scalar"), lambda draw: draw.choice([draw.float(), 2, -1, 3])),
}
#: types of arguments that say how, rather than what, is computed
_SETTINGS = ("ScalarType", "Layout", "Device", "MemoryFormat", "Generator")


def lettered(operator: OpOverload, rule: Rule, draw: Draw) -> Call:
    """A call whose tensors have the shapes that one alternative of a rule names."""
    index = draw.integer(0, len(rule.alternatives) - 1)
    alternative = rule.alternatives[index]
    given: dict[str, Any] = {other.condition: False for other in rule.alternatives[:index] if other.condition}
    if alternative.condition:
        given[alternative.condition] = True
    shapes = _Shapes(rule, alternative, draw)
    schema = {argument.name: argument for argument in schema_of(operator).arguments}
    several = len(alternative.operands) > 1
    for number, operand in enumerate(alternative.operands):
        argument = schema[operand.name]
        if number and "Optional" in str(argument.type) and draw.flag(0.3):
            given[operand.name] = None
            continue
        shape = shapes.of(operand.dims, broadcast=several and draw.flag(0.4))
        given[operand.name] = _tensor(operand.name, shape, draw)
    for clause in rule.clauses:
        if clause.keyword == "factor":
            given[clause.words[1]] = shapes.size(clause.words[0])
        elif clause.keyword == "shape" and len(clause.words) == 2:
            given[clause.words[0]] = shapes.run(clause.words[1])
    first = given[alternative.operands[0].name]
    return Call(operator, _complete(operator, given, list(first.shape), draw))


def moving(operator: OpOverload, rule: Rule, draw: Draw) -> Call:
    """A call of a moving operator on a tensor of any shape."""
    assert rule.moves is not None
    argument = next(a for a in schema_of(operator).arguments if a.name == rule.moves)
    shape = draw.shape()
    count = draw.integer(1, 3) if "List" in str(argument.type) else 1
    tensors = [draw.tensor(shape, "real") for _ in range(count)]
    source: Any = tensors if "List" in str(argument.type) else tensors[0]
    return Call(operator, _complete(operator, {rule.moves: source}, shape, draw))


#: how often an argument that says yes or no is not left at its default where others are
_OTHERWISE = 0.15


def filled(operator: OpOverload, given: dict[str, Any], draw: Draw) -> Call:
    """A call with these arguments, the others at their defaults or made up; now and then one that says yes or
    no says the other.
    """
    first = next((value for value in given.values() if isinstance(value, torch.Tensor)), torch.zeros(()))
    return Call(operator, _complete(operator, given, list(first.shape), draw, made_up=False))


def _complete(
    operator: OpOverload, given: dict[str, Any], shape: list[int], draw: Draw, made_up: bool = True
) -> dict[str, Any]:
    arguments = dict(given)
    for argument in schema_of(operator).arguments:
        if argument.name in arguments:
            continue
        value = argument.default_value
        if not argument.has_default_value() or (made_up and not draw.flag(0.4)):
            value = _value(argument, shape, draw)
        elif not made_up and isinstance(value, bool) and draw.flag(_OTHERWISE):
            value = not value
        arguments[argument.name] = value
    return {argument.name: arguments[argument.name] for argument in schema_of(operator).arguments}


def _value(argument: Any, shape: list[int], draw: Draw) -> Any:
    kind, name = str(argument.type).removeprefix("Optional[").removesuffix("]"), argument.name
    real = str(argument.real_type)
    if "Tensor" in kind:
        if "Optional" in str(argument.type) and draw.flag(0.3):
            return None
        return [draw.tensor(shape)] if "List" in kind else _tensor(name, shape, draw)
    default: Any = torch.float64 if "ScalarType" in real else None
    default = argument.default_value if argument.has_default_value() else default
    if any(word in real for word in _SETTINGS) or kind in ("Device", "Generator"):
        return default
    if "Optional" in str(argument.type) and draw.flag(0.4):
        return None
    if kind == "str":
        return default or ""
    if kind in _NUMBERS:
        return _NUMBERS[kind](draw)
    if "List" in kind:
        return _list(argument, kind, name, shape, draw)
    return draw.dim(len(shape)) if name in _DIMS else draw.integer(0, 3)


def _list(argument: Any, kind: str, name: str, shape: list[int], draw: Draw) -> list[Any]:
    if (one := kind.removeprefix("List[").removesuffix("]")) in ("float", "bool"):
        return [_NUMBERS[one](draw) for _ in range(argument.N or 1)]
    if name in _DIMS:
        dims = draw.some(range(len(shape)), least=1)
        return [dim - len(shape) if draw.flag() else dim for dim in dims]
    return [
        draw.integer(0 if "pad" in name else 1, 3 if "size" in name else 2)
        for _ in range(argument.N or draw.integer(1, max(len(shape), 1)))
    ]


def _tensor(name: str, shape: list[int], draw: Draw) -> torch.Tensor:
    if name in _INDICES:
        return draw.tensor(shape, "index")
    if name in _MASKS and (name != "attn_mask" or draw.flag()):
        return draw.tensor(shape, "bool")
    return draw.tensor(shape, "unit" if name in _VARIANCES else None)


class _Shapes:
    """The sizes of an alternative's letters, drawn as they are asked for."""

    def __init__(self, rule: Rule, alternative: Alternative, draw: Draw) -> None:
        self.rule, self.draw = rule, draw
        self.sizes: dict[str, int] = {}
        self.runs: dict[str, list[int]] = {}
        self.leading = [draw.size() for _ in range(draw.choice([0, 1, 1, 2]))]
        for clause in rule.all("repeat"):
            few, many = clause.words
            self.sizes[few] = draw.integer(1, 2)
            self.sizes[many] = self.sizes[few] * draw.integer(1, 2)

    def size(self, letter: str) -> int:
        """The size of one letter."""
        return self.sizes.setdefault(letter, self.draw.size())

    def run(self, letter: str) -> list[int]:
        """The sizes of a run."""
        return self.runs.setdefault(letter, [self.draw.size() for _ in range(self.draw.integer(1, 2))])

    def of(self, dims: tuple[Any, ...], broadcast: bool) -> list[int]:
        """The shape that dimensions spell; with ``broadcast``, leading ones may be missing or 1."""
        shape: list[int] = []
        for dim in dims:
            if dim == "...":
                lead = self.leading[self.draw.integer(0, len(self.leading)) :] if broadcast else self.leading
                shape += [1 if broadcast and self.draw.flag(0.3) else size for size in lead]
            elif not isinstance(dim, str):
                shape.append(self.size(dim[0]) * self.size(dim[1]))
            elif dim.endswith("*"):
                shape += self.run(dim)
            else:
                shape.append(self.size(dim))
        return shape
