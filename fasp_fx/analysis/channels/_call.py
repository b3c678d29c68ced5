"""One call of an operator as the interpretation sees it; its operands with a letter for every dimension."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from fasp_fx.capturing import elements
from fasp_fx.patterns import Dims, DoesNotApplyError, Rule, letters_of, read

from ._facts import Recurrence
from ._numbering import Axis, Value, collapse, smallest_step


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        node: the call.
        rule: of the operator.
        arguments: by the names of the schema, with values in the place of nodes.
        written: the same as they stand in the graph.
        shapes: of the results, at the sizes of the interpretation.
    """

    node: fx.Node
    rule: Rule
    arguments: dict[str, Any]
    written: dict[str, Any]
    shapes: list[tuple[int, ...]]

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The arguments that are nodes, those in lists by name and place."""
        return {name: leaf for name, leaf in elements(self.written).items() if isinstance(leaf, fx.Node)}


@dataclass(frozen=True)
class Operand:
    """An operand with a letter for every dimension; ``splits`` made them so."""

    name: str
    value: Value
    letters: tuple[str, ...]
    node: fx.Node | None
    splits: tuple[tuple[int, int], ...] = ()

    def at(self, letter: str) -> list[Axis]:
        """The axes that shrink this letter."""
        return self.value.at(self.letters.index(letter))

    def size(self, letter: str) -> int:
        """The size of a letter's dimension."""
        return self.value.shape[self.letters.index(letter)]

    def dims(self, letters: Iterable[str]) -> tuple[int, ...]:
        """The dimensions of some letters."""
        return tuple(self.letters.index(letter) for letter in letters)

    def aligned(self, axis: Axis, order: list[str]) -> Tensor:
        """The numbers of one of its axes with one dimension per letter of ``order``."""
        present = [letter for letter in order if letter in self.letters]
        numbers = axis.numbers.permute(self.dims(present))
        sizes = dict(zip(present, numbers.shape, strict=True))
        return numbers.reshape([sizes.get(letter, 1) for letter in order])


class Operands:
    """The operands of one call, read by its rule.

    Attributes:
        reading: the rule read for the call.
        each: the operands that are given, in the order of the rule; behind them what the operator takes from
            its own step before.
        size: of each letter.
        recurrences: what the operator takes from its own step before, by the operand that stands for it.
        order: all letters, in the order in which operands have them.
        summed: the letters that operands meet in and that are summed over.
        constant: whether all is computed from weights alone.

    Raises:
        DoesNotApplyError: the call is none that the rule speaks of.
    """

    def __init__(self, call: Call) -> None:
        arguments = {**call.arguments, **elements(call.arguments)}
        ranks = {name: len(value.shape) for name, value in arguments.items() if isinstance(value, Value)}
        self.reading = reading = read(call.rule, arguments, ranks)
        stated = {clause.words[0]: clause.words[1] for clause in call.rule.all("factor")}
        if computed := call.nodes.keys() & stated.values():  # of a convolution of all samples at once, say
            raise DoesNotApplyError(f"'{computed.pop()}' is computed at run time")
        #: the sizes of letters in brackets
        factors = {letter: int(arguments[name]) for letter, name in stated.items()}
        factors |= {clause.words[0]: int(clause.words[1]) for clause in call.rule.all("gates")}
        operands = [
            _divided(Operand(name, arguments[name], (), call.nodes.get(name)), dims, factors)
            for name, dims in reading.operands.items()
        ]
        for few, many in (clause.words for clause in call.rule.all("repeat")):
            size = next((each.size(many) for each in operands if many in each.letters), 1)
            operands = [_repeated(each, few, many, size) for each in operands]
        self.size: dict[str, int] = {}
        for operand in operands:
            for letter, size in zip(operand.letters, operand.value.shape, strict=True):
                self.size[letter] = max(self.size.get(letter, 1), size)
        if reading.placed and any(o.size(one) != self.size[one] for o in operands for one in o.letters):
            # Some positions stay as they are.
            raise DoesNotApplyError(f"the operands of {call.node.target} differ in size")
        self.recurrences: dict[str, Recurrence] = {}
        for letter, of, start, second in (clause.words for clause in call.rule.all("recur")):
            operands.append(self._step_before(call.node, letter, of, operands))
            self.recurrences[operands[-1].name] = Recurrence(call.nodes[start], int(bool(arguments[second])))
        self.order = list(dict.fromkeys(letter for operand in operands for letter in operand.letters))
        self.summed = reading.summed(operand.letters for operand in operands)
        # What no weight had a part in (a state of zeros before the first step) meets a weight as an
        # activation does.
        self.each = [
            replace(each, value=replace(each.value, constant=False))
            if each.value.created and self.summed & {*each.letters}
            else each
            for each in operands
        ]
        self.constant = all(operand.value.constant for operand in self.each)

    def _step_before(self, node: fx.Node, letter: str, of: str, operands: list[Operand]) -> Operand:
        """The first result as it was one step before, of which a weight contracts a letter under another
        name.
        """
        letters = tuple(letter if dim == of else str(dim) for dim in self.reading.results[0])
        shape = tuple(self.size[of] if one == letter else 1 for one in letters)
        channels = [
            axis.numbers.movedim(operand.letters.index(of), 0).reshape(self.size[of], -1)[:, 0]
            for operand in operands
            for axis in (operand.at(of) if of in operand.letters else ())
        ]
        axes = tuple(Axis(numbers.reshape(shape), letters.index(letter)) for numbers in channels[:1])
        return Operand(f"{letter} of the step before", Value(shape, axes), letters, node)

    def holders(self, letter: str) -> list[Operand]:
        """The operands that have positions along a letter, not one for all."""
        return [
            operand
            for operand in self.each
            if letter in operand.letters and (operand.size(letter) > 1 or self.size[letter] == 1)
        ]


def _repeated(operand: Operand, few: str, many: str, size: int) -> Operand:
    """An operand of which each position along one letter is repeated, up to the size of another."""
    if few not in operand.letters:
        return operand
    dim, value = operand.letters.index(few), operand.value
    times = size // value.shape[dim]
    axes = tuple(
        Axis(axis.numbers.repeat_interleave(times if axis.numbers.shape[dim] > 1 else 1, dim), axis.dim)
        for axis in value.axes
    )
    value = Value((*value.shape[:dim], size, *value.shape[dim + 1 :]), axes, value.constant)
    letters = tuple(many if letter == few else letter for letter in operand.letters)
    return replace(operand, value=value, letters=letters)


# --- Dimensions that are products of two letters: an operand is divided before a rule is applied, a result
# put together after.


def _divided(operand: Operand, dims: Dims, sizes: dict[str, int]) -> Operand:
    """The operand with a dimension for every letter.

    Args:
        dims: the letter of each of its dimensions, or the two letters of its factors.
        sizes: the size of at least one factor of each pair.
    """
    value, splits = operand.value, list[tuple[int, int]]()
    for place, pair in enumerate(dims):
        if isinstance(pair, str):
            continue
        dim = place + len(splits)
        whole, part = value.shape[dim], sizes[pair[0] if pair[0] in sizes else pair[1]]
        if not part or whole % part:
            raise DoesNotApplyError(f"a dimension of {whole} is not a multiple of {part}")
        splits.append((dim, part if pair[0] in sizes else whole // part))
        value = _split(value, *splits[-1])
    return replace(operand, value=value, letters=letters_of(dims), splits=tuple(splits))


def _split(value: Value, dim: int, leading: int) -> Value:
    shape = (*value.shape[:dim], leading, value.shape[dim] // leading, *value.shape[dim + 1 :])
    axes = []
    for axis in value.axes:
        single = axis.numbers.shape[dim] == 1
        numbers = collapse(axis.numbers.unflatten(dim, (1, 1) if single else (leading, -1)))
        varying = [d for d in (dim, dim + 1) if numbers.shape[d] > 1] if axis.dim == dim else []
        at = min(varying, key=lambda d: (smallest_step(numbers.numpy(), d), -d), default=axis.dim)
        axes.append(Axis(numbers, at + (axis.dim > dim), axis.slot))
    return Value(shape, tuple(axes), value.constant, value.origin, created=value.created)


def joined(numbers: Tensor, dims: Dims, sizes: dict[str, int]) -> Tensor:
    """Numbers with one dimension per letter, put together to one dimension per pair."""
    for dim, letter in enumerate(dims):
        if not isinstance(letter, str):
            varies = max(numbers.shape[dim : dim + 2]) > 1
            pair = [sizes[each] if varies else 1 for each in letter]
            numbers = numbers.expand(*numbers.shape[:dim], *pair, *numbers.shape[dim + 2 :])
            numbers = numbers.flatten(dim, dim + 1)
    return numbers
