"""Operands of a lettered rule: which alternative of the rule a call takes, and a letter for each
dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fasp_fx.patterns import Alternative, Dims, Rule

from ._factors import fixed_rank
from ._value import Axis, Value


@dataclass(frozen=True)
class Operand:
    """An operand with a letter for every dimension; ``splits`` made them so (see :mod:`._factors`)."""

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


def choose(rule: Rule, arguments: dict[str, Any]) -> Alternative:
    """The first alternative whose condition holds and whose operands have enough dimensions; else
    the last.
    """
    for alternative in rule.alternatives[:-1]:
        if alternative.condition and not arguments.get(alternative.condition):
            continue
        given = [(operand, arguments.get(operand.name)) for operand in alternative.operands]
        if all(value is None or _fits(operand.dims, len(value.shape)) for operand, value in given):
            return alternative
    return rule.alternatives[-1]


def _fits(dims: Dims, rank: int) -> bool:
    if any(isinstance(token, str) and token.endswith("*") for token in dims):
        return rank >= len(dims) - 1
    return rank == len(dims) or (dims[:1] == ("...",) and rank >= len(dims) - 1)


def run_lengths(alternative: Alternative, rule: Rule, arguments: dict[str, Any]) -> dict[str, int]:
    """The length of every run, from the operands that leave it no choice, or from an argument that holds its
    sizes.
    """
    names = {
        token
        for operand in alternative.operands
        for token in operand.dims
        if isinstance(token, str) and token.endswith("*")
    }
    runs: dict[str, int] = {}
    for clause in rule.all("shape"):
        if len(clause.words) == 2:
            runs[clause.words[1]] = len(arguments[clause.words[0]])
    for _ in names:
        for operand in alternative.operands:
            value = arguments.get(operand.name)
            open_runs = [token for token in operand.dims if token in names and token not in runs]
            if isinstance(value, Value) and len(open_runs) == 1 and "..." not in operand.dims:
                runs[str(open_runs[0])] = len(value.shape) - fixed_rank(
                    operand.dims, {**runs, str(open_runs[0]): 0}
                )
    return {name: runs.get(name, 1) for name in names}


def align(axis: Axis, letters: tuple[str, ...], order: list[str]) -> Tensor:
    """The axis's numbers with one dimension per letter of ``order``."""
    present = [letter for letter in order if letter in letters]
    numbers = axis.numbers.permute([letters.index(letter) for letter in present])
    return numbers.reshape(
        [numbers.shape[present.index(letter)] if letter in present else 1 for letter in order]
    )
