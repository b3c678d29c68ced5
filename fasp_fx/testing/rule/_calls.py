"""One call of an operator: its arguments by name, its results, how it prints, and the small choices that it
is made up of, by the operator's schema and its rule.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Generator, Tensor

from fasp_fx.base import OpOverload, schema_of, tensors_in
from fasp_fx.patterns import Alternative, Rule

from .._case import copied

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by schema name."""

    operator: OpOverload
    arguments: Mapping[str, Any]

    def with_(self, /, **changed: Any) -> Self:
        """The same call with other arguments, or other tensors of a list (``name.index``)."""
        arguments = dict(self.arguments)
        for name, value in changed.items():
            whole, _, index = name.partition(".")
            arguments[whole] = (
                value
                if not index
                else [value if at == int(index) else item for at, item in enumerate(arguments[whole])]
            )
        return type(self)(self.operator, arguments)

    def run(self) -> list[Tensor]:
        """The tensors the operator returns, in order.

        Raises:
            Exception: whatever the operator raises.
        """
        with torch.no_grad():
            result = self.operator(**copied(dict(self.arguments)))
        return tensors_in(result)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments; those of a list are named ``name.index``, as rules name them."""
        operands: dict[str, Any] = {}
        for name, value in self.arguments.items():
            listed = isinstance(value, (list, tuple))
            operands |= {f"{name}.{at}": item for at, item in enumerate(value)} if listed else {name: value}
        return {name: value for name, value in operands.items() if isinstance(value, Tensor)}

    @property
    def size(self) -> tuple[int, int, int]:
        """How large a call is, for finding the smallest: elements, dimensions, arguments that are not at
        their default.
        """
        operands = self.tensors().values()
        return sum(t.numel() for t in operands), sum(t.dim() for t in operands), len(self.shown())

    def shown(self) -> dict[str, Any]:
        """The arguments that are not at their default."""
        defaults = {
            argument.name: argument.default_value
            for argument in schema_of(self.operator).arguments
            if argument.has_default_value()
        }
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) or name not in defaults or defaults[name] != value
        }

    def __str__(self) -> str:
        return (
            f"{self.operator}({', '.join(f'{name}={_spell(value)}' for name, value in self.shown().items())})"
        )


def _spell(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
        return f"<{'x'.join(map(str, value.shape)) or 'scalar'}{kind}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spell, value))}]"
    return repr(value)


def same(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding, where both are numbers; shapes must agree."""
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and bool(close(first, second).all())


def close(first: Tensor, second: Tensor) -> Tensor:
    """Which positions are equal up to rounding: boolean, of their common shape."""
    if not (first.is_floating_point() or first.is_complex()):
        return first == second
    rounding = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}.get(
        first.dtype, 2e-2
    )
    finite = second[torch.isfinite(second)].abs()
    scale = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    return torch.isclose(first, second, rtol=0.0, atol=rounding * scale, equal_nan=True)


def repeatable(call: Call) -> bool:
    """Whether the operator gives the same result twice; what draws random numbers says nothing."""
    first, second = call.run(), call.run()
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


#: what the numbers in tensors can be; an operator is given the kinds it takes
_NUMBERS: dict[str, Callable[[list[int], Generator], Tensor]] = {
    "real": lambda sizes, source: torch.randn(sizes, generator=source, dtype=torch.float64),
    "unit": lambda sizes, source: torch.rand(sizes, generator=source, dtype=torch.float64) * 0.8 + 0.1,
    "above": lambda sizes, source: torch.rand(sizes, generator=source, dtype=torch.float64) * 2 + 1.1,
    "whole": lambda sizes, source: torch.randint(1, 7, sizes, generator=source),
    "bool": lambda sizes, source: torch.randint(0, 2, sizes, generator=source).bool(),
    "complex": lambda sizes, source: torch.randn(sizes, generator=source, dtype=torch.complex128),
}
KINDS = tuple(_NUMBERS)


class Draw:
    """Random small sizes, flags and tensors.

    Args:
        seed: equal seeds draw equal calls.
        most: no size is larger than this.
        kind: what tensors hold where nothing else is asked for, one of :data:`KINDS`.
    """

    def __init__(self, seed: int, most: int = 4, kind: str = "real") -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.most, self.kind = most, kind

    def integer(self, low: int, high: int) -> int:
        """An integer between both, inclusive."""
        return self.random.randint(low, high)

    def flag(self, likely: float = 0.5) -> bool:
        """Whether something happens."""
        return self.random.random() < likely

    def choice(self, items: Sequence[T]) -> T:
        """One of these."""
        return self.random.choice(items)

    def some(self, items: Sequence[T], least: int = 0) -> list[T]:
        """Some of these, in their order."""
        count = self.integer(min(least, len(items)), len(items))
        return [items[index] for index in sorted(self.random.sample(range(len(items)), count))]

    def order(self, items: Sequence[T]) -> list[T]:
        """All of these in another order."""
        return self.random.sample(list(items), len(items))

    def size(self) -> int:
        """The size of a dimension, rarely 1."""
        return 1 if self.flag(0.08) else self.integer(min(2, self.most), self.most)

    def shape(self, least: int = 1, most: int = 4) -> list[int]:
        """The sizes of a tensor of some rank."""
        return [self.size() for _ in range(self.integer(least, max(least, min(most, self.most))))]

    def dim(self, rank: int) -> int:
        """A dimension, counted from either end."""
        return self.integer(-rank, rank - 1) if rank else 0

    def float(self) -> float:
        """A number away from 0 and 1."""
        return round(self.random.uniform(0.15, 0.85), 3)

    def tensor(self, shape: Sequence[int], kind: str | None = None, below: int = 2) -> Tensor:
        """A tensor of these sizes; ``below`` bounds the numbers of kind ``index``."""
        if kind == "index":
            return torch.randint(0, max(below, 1), list(shape), generator=self.generator)
        return _NUMBERS[kind or self.kind](list(shape), self.generator)

    def like(self, tensor: Tensor) -> Tensor:
        """Other numbers of the same kind as those of a tensor."""
        if tensor.dtype == torch.bool:
            return ~tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor  # indices name positions; they are not perturbed
        noise = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64)
        return (tensor * (0.5 + noise if tensor.is_complex() else 0.6 + 0.8 * noise)).to(tensor.dtype)


# --- make up calls of an operator from its schema and its rule


#: arguments that hold positions rather than values
_INDICES = {"index", "indices"}
_MASKS = {"mask", "condition", "attn_mask"}
_VARIANCES = {"running_var"}
_DIMS = {
    *("dim", "dims", "dim0", "dim1", "axis", "axis0", "axis1", "start_dim", "end_dim", "source"),
    "destination",
}


#: arguments that are numbers, or say yes or no, by type
_BY_TYPE: dict[str, Callable[[Draw], Any]] = {
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
    arguments: dict[str, Any] = {
        other.condition: False for other in rule.alternatives[:index] if other.condition
    }
    if alternative.condition:
        arguments[alternative.condition] = True
    shapes = _Shapes(rule, alternative, draw)
    schema = {argument.name: argument for argument in schema_of(operator).arguments}
    several = len(alternative.operands) > 1
    for number, operand in enumerate(alternative.operands):
        argument = schema[operand.name]
        if number and "Optional" in str(argument.type) and draw.flag(0.3):
            arguments[operand.name] = None
            continue
        shape = shapes.of(operand.dims, broadcast=several and draw.flag(0.4))
        arguments[operand.name] = _tensor(operand.name, shape, draw)
    for clause in rule.clauses:
        if clause.keyword == "factor":
            arguments[clause.words[1]] = shapes.size(clause.words[0])
        elif clause.keyword == "shape" and len(clause.words) == 2:
            arguments[clause.words[0]] = shapes.run(clause.words[1])
    first = arguments[alternative.operands[0].name]
    return Call(operator, _complete(operator, arguments, list(first.shape), draw))


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


def filled(operator: OpOverload, arguments: dict[str, Any], draw: Draw) -> Call:
    """A call with these arguments, the others at their defaults or made up; now and then one that says yes or
    no says the other.
    """
    first = next((value for value in arguments.values() if isinstance(value, torch.Tensor)), torch.zeros(()))
    return Call(operator, _complete(operator, arguments, list(first.shape), draw, made_up=False))


def _complete(
    operator: OpOverload, arguments: dict[str, Any], shape: list[int], draw: Draw, made_up: bool = True
) -> dict[str, Any]:
    arguments = dict(arguments)
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
    if kind in _BY_TYPE:
        return _BY_TYPE[kind](draw)
    if "List" in kind:
        return _list(argument, kind, name, shape, draw)
    return draw.dim(len(shape)) if name in _DIMS else draw.integer(0, 3)


def _list(argument: Any, kind: str, name: str, shape: list[int], draw: Draw) -> list[Any]:
    if (one := kind.removeprefix("List[").removesuffix("]")) in ("float", "bool"):
        return [_BY_TYPE[one](draw) for _ in range(argument.N or 1)]
    if name in _DIMS:
        return [dim - len(shape) if draw.flag() else dim for dim in draw.some(range(len(shape)), least=1)]
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
