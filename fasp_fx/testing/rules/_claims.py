"""What a lettered rule claims of one call, held against the operator.

A letter that operands share with the result is *kept*: to take positions of it out of the operands is to take
them out of the result. A letter that stands in two operands and in no result is *contracted*: to take
positions of it out of both is to put zeros in either. Of a letter under ``mix``, ``reduce``, ``freeze`` or
``window`` nothing is claimed, which is too little if the operator would have kept the claim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import first_line

from ._calls import Call, close, same
from ._deleting import cut_result, without, zeroed
from ._draw import Draw
from ._reading import Reading
from ._samples import STEPS


@dataclass(frozen=True)
class Lie:
    """One claim that the operator does not keep: the call, what the rule says of it, and what is the case."""

    call: Call
    claim: str
    fact: str
    direct: bool = True

    @property
    def weight(self) -> tuple[Any, ...]:
        """How much there is to read: of two calls of one size, a claim of the rule itself says more than a
        pruned program.
        """
        return (*self.call.size, not self.direct)


@dataclass
class Modesty:
    """For each clause that makes no claim: how often it was tried, and how often the operator would not have
    kept the claim.
    """

    tried: dict[str, int] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)

    def note(self, clause: str, needed: bool) -> None:
        """One more trial."""
        self.tried[clause] = self.tried.get(clause, 0) + 1
        self.needed[clause] = self.needed.get(clause, 0) + needed

    def needless(self, least: int) -> list[str]:
        """The clauses that were tried often and never needed."""
        return [clause for clause, count in self.tried.items() if count >= least and not self.needed[clause]]


def lies(reading: Reading, results: list[Tensor], draw: Draw, modesty: Modesty) -> Iterator[Lie]:
    """Hold every claim of a rule on one call against the operator."""
    kept = reading.kept()
    for letter, size in reading.sizes.items():
        if size < 2 or letter in reading.repeats:
            continue
        gone = _positions(reading, letter, draw)
        if not gone:
            continue
        if letter in reading.special:
            clause = reading.special[letter]
            if not clause.startswith("!"):
                modesty.note(clause, _needed(reading, results, letter, gone, draw))
        elif letter in kept:
            lie = _kept(reading, results, letter, gone, draw)
            if lie is not None:
                yield lie
        elif len([name for name in reading.operands if letter in reading.operands[name].letters]) > 1:
            yield from _contracted(reading, letter, gone)


def _positions(reading: Reading, letter: str, draw: Draw) -> list[int]:
    """Some positions of a letter, not all; whole blocks where another letter is repeated to its size."""
    block, step = reading.blocks(letter), STEPS.get(str(reading.call.operator), 1)
    count = reading.sizes[letter] // block
    if count < 2 * step:
        return []
    chosen = draw.order(range(count))[: step * draw.integer(1, count // step - 1)]
    return [position * block + offset for position in sorted(chosen) for offset in range(block)]


def _kept(reading: Reading, results: list[Tensor], letter: str, gone: list[int], draw: Draw) -> Lie | None:
    claim = (
        f"positions along {_name(letter)} go from the result as they go from"
        f" {', '.join(reading.holders(letter))}"
    )
    if letter in reading.recurs:
        columns = reading.recurs[letter]
        claim = f"{claim} once zeros are in the columns {_name(columns)}"
        for operand in reading.holders(columns):
            results = zeroed(reading, operand, columns, gone).run()
    call = without(reading, letter, gone)
    try:
        found = call.run()
    except tolerable(Exception) as problem:
        return Lie(
            reading.call,
            claim,
            f"without positions {gone} the operator refuses {call}: {first_line(problem)}",
        )
    for index, (spelled, before, after) in enumerate(zip(reading.results, results, found, strict=True)):
        if spelled is None:
            continue
        expected = cut_result(reading, spelled, before, letter, gone)
        if after.shape != expected.shape:
            return Lie(
                reading.call,
                claim,
                f"without positions {gone} result {index} has shape {tuple(after.shape)} instead of"
                f" {tuple(expected.shape)}",
            )
        if not same(after, expected):
            where = tuple((~close(after, expected)).nonzero()[0].tolist())
            fact = (
                f"without positions {gone} result {index} has {_at(after, where)} at {where} instead of"
                f" {_at(expected, where)}"
            )
            return Lie(reading.call, claim, fact + _influence(reading, results, letter, draw))
    return None


def _contracted(reading: Reading, letter: str, gone: list[int]) -> Iterator[Lie]:
    call = without(reading, letter, gone)
    holders = reading.holders(letter)
    claim = (
        f"letter {letter!r} is contracted: to take positions out of {' and '.join(holders)} is to put zeros"
        " there in either"
    )
    try:
        found = call.run()
    except tolerable(Exception) as problem:
        yield Lie(
            reading.call,
            claim,
            f"without positions {gone} the operator refuses {call}: {first_line(problem)}",
        )
        return
    for operand in holders:
        masked = zeroed(reading, operand, letter, gone).run()
        for index, (after, expected) in enumerate(zip(found, masked, strict=True)):
            if reading.results[index] is not None and not same(after, expected):
                yield Lie(
                    reading.call,
                    claim,
                    f"zeros at positions {gone} of '{operand}' give another result {index} than taking"
                    " them out",
                )
                return


def _needed(reading: Reading, results: list[Tensor], letter: str, gone: list[int], draw: Draw) -> bool:
    """Whether the operator would break the claim that a clause does not make."""
    if letter in reading.reduced:
        return _reaches_further(reading, results, letter, draw)
    call = without(reading, letter, gone)
    try:
        found = call.run()
    except tolerable(Exception):
        return True
    if letter in reading.kept():
        for spelled, before, after in zip(reading.results, results, found, strict=True):
            if spelled is not None and not same(
                after, _cut_or_nothing(reading, spelled, before, letter, gone)
            ):
                return True
        return False
    masked = [zeroed(reading, operand, letter, gone).run() for operand in reading.holders(letter)]
    return any(not same(a, b) for expected in masked for a, b in zip(found, expected, strict=True))


def _cut_or_nothing(
    reading: Reading, spelled: object, before: Tensor, letter: str, gone: list[int]
) -> Tensor:
    try:
        return cut_result(reading, spelled, before, letter, gone)  # type: ignore[arg-type]
    except tolerable(Exception):
        return before  # the result has other positions there than the operand


def _reaches_further(reading: Reading, results: list[Tensor], letter: str, draw: Draw) -> bool:
    """Whether the result depends on two positions of a letter at least."""
    reached = 0
    for position in range(reading.sizes[letter]):
        reached += any(
            not same(a, b) for a, b in zip(results, _nudged(reading, letter, position, draw), strict=True)
        )
    return reached > 1


def _nudged(reading: Reading, letter: str, position: int, draw: Draw) -> list[Tensor]:
    """The results once the operands hold other numbers at one position of a letter."""
    changed: dict[str, Tensor] = {}
    given = reading.call.tensors()
    for name in reading.holders(letter):
        spelled = reading.operands[name]
        unfolded = spelled.unfold(given[name], reading.sizes).clone()
        dim = spelled.letters.index(letter)
        own = unfolded.narrow(dim, position, 1)
        own.copy_(draw.like(own))
        changed[name] = spelled.fold(unfolded)
    return reading.call.with_(**changed).run()


def _influence(reading: Reading, results: list[Tensor], letter: str, draw: Draw) -> str:
    """A position of the result that depends on another position along the letter than its own, as
    evidence.
    """
    for position in range(reading.sizes[letter]):
        for index, (spelled, before, after) in enumerate(
            zip(reading.results, results, _nudged(reading, letter, position, draw), strict=True)
        ):
            if spelled is None or letter not in spelled.letters or before.shape != after.shape:
                continue
            differ = spelled.unfold(~close(after, before), reading.sizes)
            differ.narrow(spelled.letters.index(letter), position, 1).fill_(False)
            if bool(differ.any()):
                where = tuple(differ.nonzero()[0].tolist())
                return f"; result {index} at {where} depends on position {position} of {_name(letter)}"
    return ""


def _name(letter: str) -> str:
    return f"dimension {-1 - int(letter[1:])} of '...'" if letter.startswith(".") else f"letter {letter!r}"


def _at(tensor: Tensor, where: tuple[int, ...]) -> str:
    value = tensor[where]
    return f"{float(value):.6g}" if tensor.is_floating_point() else str(value.item())
