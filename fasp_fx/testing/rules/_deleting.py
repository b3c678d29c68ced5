"""Take positions along a letter out of a call: from every operand that has them, and from every argument that
speaks of their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._calls import Call
from ._reading import Reading, Spelled


def without(reading: Reading, letter: str, gone: list[int]) -> Call:
    """The call after these positions of a letter went."""
    given = reading.call.tensors()
    changed: dict[str, object] = {}
    for name, spelled in reading.operands.items():
        cut = without_positions(reading, spelled, given[name], letter, gone)
        columns = (reading.recurs[letter],) if letter in reading.recurs else ()
        for dim, letters in enumerate(spelled.dims()):
            cut = cut.index_select(dim, _left(cut.shape[dim], gone)) if letters == columns else cut
        changed[name] = cut
    left = reading.sizes[letter] - len(gone)
    changed |= {argument: left for factor, argument in reading.factors.items() if factor == letter}
    for argument, run in reading.runs.items():
        if letter in run:
            changed[argument] = [left if other == letter else reading.sizes[other] for other in run]
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
    return spelled.fold(unfolded.index_select(dim, _left(unfolded.shape[dim], gone)))


def _left(size: int, gone: list[int]) -> Tensor:
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
