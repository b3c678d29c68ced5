"""What a lettered rule claims of one call, held against the operator.

A letter that operands share with the result is *kept*: to take positions of it out of the operands is to take
them out of the result. A letter that stands in two operands and in no result is *contracted*: to take
positions of it out of both is to put zeros in either. Of a letter under ``mix``, ``reduce``, ``freeze`` or
``window`` nothing is claimed, which is too little if the operator would have kept the claim.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasp_fx.base import tolerable
from fasp_fx.errors import first_line

from ._calls import Call, Draw, close, same
from ._reading import Reading, Spelled


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


#: for each clause that makes no claim: of every trial, whether the operator would not have kept the claim
Trials = defaultdict[str, list[bool]]


def lies(reading: Reading, results: list[Tensor], draw: Draw, trials: Trials) -> Iterator[Lie | None]:
    """Hold every claim of a rule on one call against the operator; ``None`` for each that it keeps."""
    kept = reading.kept()
    for letter in reading.sizes:
        gone = [] if letter in reading.repeats else _positions(reading, letter, draw)
        if not gone:
            continue
        if letter in reading.special:
            clause = reading.special[letter]
            if not clause.startswith("!"):
                trials[clause].append(_needed(reading, results, letter, gone, draw))
        elif letter in kept:
            yield _kept(reading, results, letter, gone, draw)
        elif len([name for name in reading.operands if letter in reading.operands[name].letters]) > 1:
            yield _contracted(reading, letter, gone)


def _positions(reading: Reading, letter: str, draw: Draw) -> list[int]:
    """Some positions of a letter, not all; whole blocks where another letter is repeated to its size."""
    block = reading.blocks(letter)
    count = reading.sizes[letter] // block
    if count < 2:
        return []
    chosen = draw.order(range(count))[: draw.integer(1, count - 1)]
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
    smaller = _smaller(reading, letter, gone, claim)
    if isinstance(smaller, Lie):
        return smaller
    for index, (spelled, before, after) in enumerate(zip(reading.results, results, smaller, strict=True)):
        expected = after if spelled is None else without_positions(reading, spelled, before, letter, gone)
        if same(after, expected):
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


def _contracted(reading: Reading, letter: str, gone: list[int]) -> Lie | None:
    holders = reading.holders(letter)
    claim = (
        f"letter {letter!r} is contracted: to take positions out of {' and '.join(holders)} is to put zeros"
        " there in either"
    )
    smaller = _smaller(reading, letter, gone, claim)
    if isinstance(smaller, Lie):
        return smaller
    for operand in holders:
        masked = zeroed(reading, operand, letter, gone).run()
        for index, (after, expected) in enumerate(zip(smaller, masked, strict=True)):
            if reading.results[index] is not None and not same(after, expected):
                what = f"zeros at positions {gone} of '{operand}' give another result {index}"
                return Lie(reading.call, claim, f"{what} than taking them out")
    return None


def _needed(reading: Reading, results: list[Tensor], letter: str, gone: list[int], draw: Draw) -> bool:
    """Whether the operator would break the claim that a clause does not make."""
    if letter in reading.reduced:
        return _reaches_further(reading, results, letter, draw)
    smaller = _smaller(reading, letter, gone, "")
    if isinstance(smaller, Lie):
        return True
    if letter in reading.kept():
        return any(
            spelled is not None and not same(after, _cut_or_whole(reading, spelled, before, letter, gone))
            for spelled, before, after in zip(reading.results, results, smaller, strict=True)
        )
    masked = [zeroed(reading, operand, letter, gone).run() for operand in reading.holders(letter)]
    return any(not same(a, b) for expected in masked for a, b in zip(smaller, expected, strict=True))


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
    operands = reading.call.tensors()
    for name in reading.holders(letter):
        spelled = reading.operands[name]
        unfolded = spelled.unfold(operands[name], reading.sizes).clone()
        entry = unfolded.narrow(spelled.letters.index(letter), position, 1)
        entry.copy_(draw.like(entry))
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


# --- positions out of a call: of operands that have them, and of arguments that speak of their number


def without(reading: Reading, letter: str, gone: list[int]) -> Call:
    """The call after these positions of a letter went."""
    operands = reading.call.tensors()
    changed: dict[str, object] = {}
    for name, spelled in reading.operands.items():
        cut = without_positions(reading, spelled, operands[name], letter, gone)
        columns = (reading.recurs[letter],) if letter in reading.recurs else ()
        for dim, letters in enumerate(spelled.dims):
            cut = cut.index_select(dim, left(cut.shape[dim], gone)) if letters == columns else cut
        changed[name] = cut
    rest = reading.sizes[letter] - len(gone)
    changed |= {argument: rest for factor, argument in reading.factors.items() if factor == letter}
    for argument, run in reading.runs.items():
        if letter in run:
            changed[argument] = [rest if other == letter else reading.sizes[other] for other in run]
    return reading.call.with_(**changed)


def zeroed(reading: Reading, operand: str, letter: str, gone: list[int]) -> Call:
    """The call with these positions of one operand multiplied by zero."""
    tensor, spelled = reading.call.tensors()[operand], reading.operands[operand]
    unfolded = spelled.unfold(tensor, reading.sizes).clone()
    positions = torch.tensor(_own(reading, spelled, letter, gone)[1])
    unfolded.index_fill_(spelled.letters.index(letter), positions, 0)
    return reading.call.with_(**{operand: spelled.fold(unfolded)})


def without_positions(
    reading: Reading, spelled: Spelled, tensor: Tensor, letter: str, gone: list[int]
) -> Tensor:
    """An operand or a result without these positions."""
    letter, gone = _own(reading, spelled, letter, gone)
    if letter not in spelled.letters or not gone:
        return tensor
    unfolded = spelled.unfold(tensor, reading.sizes)
    dim = spelled.letters.index(letter)
    if unfolded.shape[dim] != reading.sizes[letter]:
        return tensor  # one position for all
    return spelled.fold(unfolded.index_select(dim, left(unfolded.shape[dim], gone)))


def left(size: int, gone: list[int]) -> Tensor:
    """The positions that are left."""
    return torch.tensor([index for index in range(size) if index not in set(gone)], dtype=torch.long)


def _own(reading: Reading, spelled: Spelled, letter: str, gone: list[int]) -> tuple[str, list[int]]:
    """The letter under which a tensor has these positions, and the positions: a letter that is repeated has
    one for each block.
    """
    if letter in spelled.letters:
        return letter, gone
    for few, many in reading.repeats.items():
        if many == letter and few in spelled.letters:
            times = reading.sizes[letter] // reading.sizes[few]
            return few, sorted({position // times for position in gone})
    return letter, []
