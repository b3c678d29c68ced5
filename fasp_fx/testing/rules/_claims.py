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
from ._deleting import without, without_positions, zeroed
from ._draw import Draw
from ._reading import Reading, Spelled
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
    found = _smaller(reading, letter, gone, claim)
    if isinstance(found, Lie):
        return found
    for index, (spelled, before, after) in enumerate(zip(reading.results, results, found, strict=True)):
        if spelled is None:
            continue
        expected = without_positions(reading, spelled, before, letter, gone)
        if after.shape == expected.shape and same(after, expected):
            continue
        fact = f"shape {tuple(after.shape)} instead of {tuple(expected.shape)}"
        if after.shape == expected.shape:
            where = tuple((~close(after, expected)).nonzero()[0].tolist())
            fact = f"{_at(after, where)} at {where} instead of {_at(expected, where)}"
            fact += _influence(reading, results, letter, draw)
        return Lie(reading.call, claim, f"without positions {gone} result {index} has {fact}")
    return None


def _smaller(reading: Reading, letter: str, gone: list[int], claim: str) -> list[Tensor] | Lie:
    """The results without positions of a letter."""
    call = without(reading, letter, gone)
    try:
        return call.run()
    except tolerable(Exception) as problem:
        fact = f"without positions {gone} the operator refuses {call}: {first_line(problem)}"
        return Lie(reading.call, claim, fact)


def _contracted(reading: Reading, letter: str, gone: list[int]) -> Iterator[Lie]:
    holders = reading.holders(letter)
    claim = (
        f"letter {letter!r} is contracted: to take positions out of {' and '.join(holders)} is to put zeros"
        " there in either"
    )
    found = _smaller(reading, letter, gone, claim)
    if isinstance(found, Lie):
        yield found
        return
    for operand in holders:
        masked = zeroed(reading, operand, letter, gone).run()
        for index, (after, expected) in enumerate(zip(found, masked, strict=True)):
            if reading.results[index] is not None and not same(after, expected):
                what = f"zeros at positions {gone} of '{operand}' give another result {index}"
                yield Lie(reading.call, claim, f"{what} than taking them out")
                return


def _needed(reading: Reading, results: list[Tensor], letter: str, gone: list[int], draw: Draw) -> bool:
    """Whether the operator would break the claim that a clause does not make."""
    if letter in reading.reduced:
        return _reaches_further(reading, results, letter, draw)
    found = _smaller(reading, letter, gone, "")
    if isinstance(found, Lie):
        return True
    if letter in reading.kept():
        return any(
            spelled is not None and not same(after, _cut_or_whole(reading, spelled, before, letter, gone))
            for spelled, before, after in zip(reading.results, results, found, strict=True)
        )
    masked = [zeroed(reading, operand, letter, gone).run() for operand in reading.holders(letter)]
    return any(not same(a, b) for expected in masked for a, b in zip(found, expected, strict=True))


def _cut_or_whole(reading: Reading, spelled: Spelled, before: Tensor, letter: str, gone: list[int]) -> Tensor:
    try:
        return without_positions(reading, spelled, before, letter, gone)
    except tolerable(Exception):
        return before  # the result has other positions there than the operand


def _reaches_further(reading: Reading, results: list[Tensor], letter: str, draw: Draw) -> bool:
    """Whether the result depends on two positions of a letter at least."""
    nudged = [_nudged(reading, letter, position, draw) for position in range(reading.sizes[letter])]
    reached = (any(not same(a, b) for a, b in zip(results, other, strict=True)) for other in nudged)
    return sum(reached) > 1


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


def creates(call: Call, results: list[Tensor]) -> Lie | None:
    """Hold a creating rule against the operator on one call: the elements of the result are all alike, so
    that any of them can go. What memory happens to hold (``empty``) says nothing.
    """
    for index, result in enumerate(() if "empty" in str(call.operator) else results):
        flat = result.reshape(-1)
        if flat.numel() and not same(flat, flat[:1].expand_as(flat)):
            fact = f"result {index} holds {flat[0].item()} and {flat[flat != flat[0]][0].item()}"
            return Lie(call, "the elements of the result are all alike", fact)
    return None


def _name(letter: str) -> str:
    return f"dimension {-1 - int(letter[1:])} of '...'" if letter.startswith(".") else f"letter {letter!r}"


def _at(tensor: Tensor, where: tuple[int, ...]) -> str:
    value = tensor[where]
    return f"{float(value):.6g}" if tensor.is_floating_point() else str(value.item())
