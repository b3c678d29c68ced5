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
        cut = _cut(reading, spelled, given[name], letter, gone)
        changed[name] = (
            _cut_columns(spelled, cut, reading.recurs[letter], gone) if letter in reading.recurs else cut
        )
    left = reading.sizes[letter] - len(gone)
    for factor, argument in reading.factors.items():
        if factor == letter:
            changed[argument] = left
    for argument, letters in reading.runs.items():
        if letter in letters:
            changed[argument] = [left if other == letter else reading.sizes[other] for other in letters]
    return reading.call.with_(**changed)


def zeroed(reading: Reading, operand: str, letter: str, gone: list[int]) -> Call:
    """The call with these positions of one operand multiplied by zero."""
    tensor, spelled = reading.call.tensors()[operand], reading.operands[operand]
    unfolded = spelled.unfold(tensor, reading.sizes).clone()
    unfolded.index_fill_(
        spelled.letters.index(letter), torch.tensor(_own(reading, spelled, letter, gone)[1]), 0
    )
    return reading.call.with_(**{operand: spelled.fold(unfolded)})


def cut_result(reading: Reading, spelled: Spelled, result: Tensor, letter: str, gone: list[int]) -> Tensor:
    """A result without these positions."""
    return _cut(reading, spelled, result, letter, gone)


def _cut_columns(spelled: Spelled, tensor: Tensor, letter: str, gone: list[int]) -> Tensor:
    """A tensor without positions of a letter that has a dimension to itself."""
    if letter not in spelled.letters:
        return tensor
    at = spelled.letters.index(letter)
    dim = next(dim for dim in range(len(spelled.merged)) if sum(spelled.merged[:dim]) == at)
    return tensor.index_select(
        dim,
        torch.tensor(
            [index for index in range(tensor.shape[dim]) if index not in set(gone)], dtype=torch.long
        ),
    )


def _own(reading: Reading, spelled: Spelled, letter: str, gone: list[int]) -> tuple[str, list[int]]:
    """The letter under which a tensor has these positions, and the positions: a letter that is repeated has
    one for each block.
    """
    if letter in spelled.letters:
        return letter, gone
    few = next(
        (few for few, many in reading.repeats.items() if many == letter and few in spelled.letters), None
    )
    if few is None:
        return letter, []
    times = reading.sizes[letter] // reading.sizes[few]
    return few, sorted({position // times for position in gone})


def _cut(reading: Reading, spelled: Spelled, tensor: Tensor, letter: str, gone: list[int]) -> Tensor:
    letter, gone = _own(reading, spelled, letter, gone)
    if letter not in spelled.letters or not gone:
        return tensor
    unfolded = spelled.unfold(tensor, reading.sizes)
    dim = spelled.letters.index(letter)
    if unfolded.shape[dim] != reading.sizes[letter]:
        return tensor  # one position for all
    left = torch.tensor(
        [index for index in range(unfolded.shape[dim]) if index not in set(gone)], dtype=torch.long
    )
    return spelled.fold(unfolded.index_select(dim, left))
