"""What a rule says of one call: which letter each dimension has, and what it claims of each letter.

This reads the grammar on its own, without the interpreter that the analysis uses.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fasp_fx.patterns import Alternative, Rule

from ._calls import Call


class Mismatch(Exception):
    """The rule does not fit what the operator takes or returns."""


class Unspoken(Mismatch):
    """The rule says of itself that it does not speak of such a call."""


@dataclass(frozen=True)
class Spelled:
    """A tensor by the letters that each of its dimensions is made of."""

    dims: tuple[tuple[str, ...], ...]

    @property
    def letters(self) -> tuple[str, ...]:
        """All letters in order."""
        return tuple(itertools.chain(*self.dims))

    def unfold(self, tensor: Tensor, sizes: dict[str, int]) -> Tensor:
        """The tensor with one dimension for each letter."""
        shape: list[int] = []
        for size, letters in zip(tensor.shape, self.dims):
            shape += [size] if len(letters) == 1 else [sizes[letter] for letter in letters]
        return tensor.reshape(shape)

    def fold(self, tensor: Tensor) -> Tensor:
        """Back to the real dimensions."""
        sizes = iter(tensor.shape)
        return tensor.reshape([math.prod(itertools.islice(sizes, len(letters))) for letters in self.dims])


@dataclass
class Reading:
    """A rule applied to one call.

    Attributes:
        operands: how each tensor argument that the rule names is spelled.
        results: how each result is spelled; ``None`` for one of which the rule says nothing.
        sizes: the size of each letter.
        special: letters of which the rule makes no claim, and the clause that says so.
        reduced: letters that the operator reduces.
        factors: arguments that hold the size of a letter.
        runs: arguments that hold the sizes of a run of letters.
        repeats: a letter that is repeated in blocks to the size of another.
        aligned: letters of which multiples of a number of positions stay.
        recurs: a letter of the result, and the letter of a weight's columns that meet it one step later.
    """

    call: Call
    operands: dict[str, Spelled] = field(default_factory=dict)
    results: list[Spelled | None] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)
    reduced: set[str] = field(default_factory=set)
    factors: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[str]] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)
    aligned: dict[str, int] = field(default_factory=dict)
    recurs: dict[str, str] = field(default_factory=dict)

    def kept(self) -> set[str]:
        """Letters that a result has."""
        return {letter for result in self.results if result is not None for letter in result.letters}

    def holders(self, letter: str) -> list[str]:
        """Operands that have more than one position along a letter (or the only one there is)."""
        operands = self.call.tensors()
        return [
            name
            for name, spelled in self.operands.items()
            if letter in spelled.letters
            and spelled.unfold(operands[name], self.sizes).shape[spelled.letters.index(letter)]
            == self.sizes[letter]
        ]

    def blocks(self, letter: str) -> int:
        """How many positions of a letter have to go together, because another letter is repeated
        to its size, or multiples of them stay.
        """
        if letter in self.aligned:
            return self.aligned[letter]
        few = next((few for few, many in self.repeats.items() if many == letter), None)
        return self.sizes[letter] // self.sizes[few] if few is not None and few in self.sizes else 1


def read(rule: Rule, call: Call, results: list[Tensor]) -> Reading:
    """Read a lettered rule for one call.

    Raises:
        Mismatch: an operand or a result has other dimensions than the rule says.
    """
    alternative = _choose(rule, call)
    operands = call.tensors()
    reading = Reading(call)
    spelled_out = {dim for operand in alternative.operands for dim in operand.dims if isinstance(dim, str)}
    runs = {
        letter: _run_length(rule, alternative, call, letter) for letter in spelled_out if letter.endswith("*")
    }
    for operand in alternative.operands:
        if operand.name in operands:
            reading.operands[operand.name] = _spell(
                operand.dims, operands[operand.name].dim(), runs, right=True
            )
    dots = max(
        (sum(letter.startswith(".") for letter in spelled.letters) for spelled in reading.operands.values()),
        default=0,
    )
    _read_clauses(rule, call, reading, runs, next(iter(reading.operands.values()), Spelled(())))
    _solve_sizes(reading, operands)
    if len(alternative.results) != len(results):
        raise Mismatch(
            f"the operator returns {len(results)} tensors, the rule speaks of {len(alternative.results)}"
        )
    for index, (dims, result) in enumerate(zip(alternative.results, results, strict=True)):
        rank = _fixed(dims, runs) + (dots if "..." in dims else 0)
        spelled = _spell(dims, rank, runs)
        if not call.arguments.get("keepdim", False):
            left = (
                letters for letters in spelled.dims if len(letters) > 1 or letters[0] not in reading.reduced
            )
            spelled = Spelled(tuple(left))
        _note_added(reading, spelled, result)
        # Of such a result the rule says nothing.
        silent = all(_free(reading, letter) for letter in spelled.letters)
        reading.results.append(None if silent else spelled)
        if not silent:
            _fits(reading, spelled, result, index)
    return reading


def _choose(rule: Rule, call: Call) -> Alternative:
    operands = call.tensors()
    for alternative in rule.alternatives[:-1]:
        condition = alternative.condition
        if (not condition or condition in operands or call.arguments.get(condition)) and all(
            operand.name not in operands or _takes(operand.dims, operands[operand.name].dim())
            for operand in alternative.operands
        ):
            return alternative
    return rule.alternatives[-1]


def _takes(dims: tuple[Any, ...], rank: int) -> bool:
    fixed = sum(dim != "..." for dim in dims)
    flexible = any(dim == "..." or (isinstance(dim, str) and dim.endswith("*")) for dim in dims)
    return rank >= fixed if flexible else rank == fixed


def _run_length(rule: Rule, alternative: Alternative, call: Call, letter: str) -> int:
    operands = call.tensors()
    for operand in alternative.operands:
        if letter in operand.dims and operand.name in operands and "..." not in operand.dims:
            return operands[operand.name].dim() - sum(dim != letter for dim in operand.dims)
    for clause in rule.all("shape"):
        if len(clause.words) == 2 and clause.words[1] == letter:
            return len(call.arguments[clause.words[0]])
    return 1


def _fixed(dims: tuple[Any, ...], runs: dict[str, int]) -> int:
    return sum(runs.get(dim, 1) if isinstance(dim, str) else 1 for dim in dims if dim != "...")


def _spell(dims: tuple[Any, ...], rank: int, runs: dict[str, int], right: bool = False) -> Spelled:
    """One entry per real dimension; an operand with fewer dimensions than letters has the last of them."""
    real: list[tuple[str, ...]] = []
    for dim in dims:
        if dim == "...":
            real += [(f".{index}",) for index in reversed(range(max(rank - _fixed(dims, runs), 0)))]
        elif dim in runs:
            real += [(f"{dim}{index}",) for index in range(runs[dim])]
        else:
            real.append((dim,) if isinstance(dim, str) else tuple(dim))
    if right and len(real) > rank:
        real = real[len(real) - rank :]
    if len(real) != rank:
        raise Mismatch(f"[{' '.join(map(str, dims))}] does not spell {rank} dimensions")
    return Spelled(tuple(real))


def _read_clauses(rule: Rule, call: Call, reading: Reading, runs: dict[str, int], first: Spelled) -> None:
    for clause in rule.clauses:
        words = clause.words
        if not clause.holds(call.arguments):
            continue
        if clause.keyword in ("mix", "freeze", "window", "reduce"):
            for letter in _where(clause.words[0], clause.argument, call, runs, reading, first):
                reading.special[letter] = str(clause)
                if clause.keyword == "reduce":
                    reading.reduced.add(letter)
        elif clause.keyword in ("slide", "route"):
            # never too little: what slides or is chosen moves with other arguments
            reading.special |= {letter: f"!{clause}" for word in words[:2] for letter in _run(word, runs)}
        elif clause.keyword == "place" and runs[words[0]]:
            _place(reading, str(clause), f"{words[0]}{int(call.arguments[words[1]]) % runs[words[0]]}")
        elif clause.keyword == "gates":
            reading.sizes[words[0]] = int(words[1])
            reading.special[words[0]] = f"!{clause}"
        elif clause.keyword == "recur":
            reading.recurs[words[1]] = words[0]
            reading.special[words[0]] = f"!{clause}"  # said of the letter that it meets
        elif clause.keyword == "only" and call.arguments[words[0]] != int(words[1]):
            raise Unspoken(f"argument '{words[0]}' is {call.arguments[words[0]]}")
        elif clause.keyword == "factor":
            reading.factors[words[0]] = words[1]
        elif clause.keyword == "repeat":
            reading.repeats[words[0]] = words[1]
        elif clause.keyword == "align":
            reading.aligned[words[0]] = int(words[1])
        elif clause.keyword == "shape" and len(words) == 2:
            reading.runs[words[0]] = [f"{words[1]}{index}" for index in range(runs.get(words[1], 0))]


def _place(reading: Reading, clause: str, letter: str) -> None:
    """What is placed among the positions of the first operand has others than that."""
    reading.special[letter] = clause
    for name in list(reading.operands)[1:]:
        position = f"{letter} of {name}"
        reading.operands[name] = Spelled(
            tuple(
                tuple(position if other == letter else other for other in letters)
                for letters in reading.operands[name].dims
            )
        )
        reading.special[position] = clause
    operands = reading.call.tensors()
    others = [
        [
            (item, size)
            for item, size in zip(spelled.letters, operands[name].shape, strict=True)
            if item not in reading.special
        ]
        for name, spelled in reading.operands.items()
    ]
    if any(sizes != others[0] for sizes in others):
        raise Mismatch("operands differ in size along dimensions where nothing is placed")


def _where(
    word: str, argument: bool, call: Call, runs: dict[str, int], reading: Reading, first: Spelled
) -> list[str]:
    if word == "...":
        letters = {letter for spelled in reading.operands.values() for letter in spelled.letters}
        return sorted(letter for letter in letters if letter.startswith("."))
    if not argument:
        return _run(word, runs)
    value = call.arguments.get(word)
    if value is None or value == [] or not first.letters:
        return list(first.letters)
    dims = value if isinstance(value, (list, tuple)) else [value]
    return [first.letters[int(dim) % len(first.letters)] for dim in dims]


def _run(word: str, runs: dict[str, int]) -> list[str]:
    """The letters that a word stands for."""
    return [f"{word}{index}" for index in range(runs[word])] if word in runs else [word]


def _solve_sizes(reading: Reading, operands: dict[str, Tensor]) -> None:
    """Sizes of single letters first, then those that divide a dimension with another."""
    for letter, argument in reading.factors.items():
        reading.sizes[letter] = int(reading.call.arguments[argument])
    pending: list[tuple[tuple[str, ...], int]] = []
    for name, spelled in reading.operands.items():
        for letters, size in zip(spelled.dims, operands[name].shape, strict=True):
            if len(letters) > 1:
                pending.append((letters, size))
                continue
            known = reading.sizes.get(letters[0], 1)
            if size != 1 and known != 1 and size != known:
                raise Mismatch(
                    f"letter {letters[0]!r} has {known} positions in one tensor and {size} in '{name}'"
                )
            reading.sizes[letters[0]] = max(known, size)
    for letters, size in pending:
        unknown = [letter for letter in letters if letter not in reading.sizes]
        rest = math.prod(reading.sizes.get(letter, 1) for letter in letters)
        if len(unknown) > 1 or rest == 0 or size % rest or (not unknown and rest != size):
            raise Mismatch(f"a dimension of {size} does not divide into ({' '.join(letters)})")
        reading.sizes |= dict.fromkeys(unknown, size // rest)


def _note_added(reading: Reading, spelled: Spelled, result: Tensor) -> None:
    """Letters of a result that no operand has are dimensions which the operator adds; nothing is claimed of
    them.
    """
    for letters, size in zip(spelled.dims, result.shape):
        if len(letters) == 1 and letters[0] not in reading.sizes:
            reading.special[letters[0]] = "!added"
            reading.sizes[letters[0]] = size


def _free(reading: Reading, letter: str) -> bool:
    """Whether a result may have other positions along a letter than the operands."""
    return reading.special.get(letter, "-").startswith(("window", "!"))


def _fits(reading: Reading, spelled: Spelled, result: Tensor, index: int) -> None:
    if len(spelled.dims) != result.dim():
        raise Mismatch(f"result {index} has {result.dim()} dimensions, the rule spells {len(spelled.dims)}")
    for dim, letters in enumerate(spelled.dims):
        expected = math.prod(1 if letter in reading.reduced else reading.sizes[letter] for letter in letters)
        if expected != result.shape[dim] and not any(_free(reading, letter) for letter in letters):
            raise Mismatch(
                f"result {index} has shape {tuple(result.shape)}; by the rule dimension {dim}"
                f" ({' '.join(letters)}) has {expected} positions"
            )
