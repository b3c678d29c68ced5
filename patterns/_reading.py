"""A rule read for one call: a letter for every dimension of its operands and results, which letters its
clauses speak of, and which products it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ._grammar import ELLIPSIS, Alternative, Clause, Dims, Rule, letters_of


class DoesNotApplyError(ValueError):
    """A rule does not serve for this call of its operator; says why."""


@dataclass(frozen=True)
class Reading:
    """A rule, read for one call.

    Attributes:
        arguments: of the call, by name.
        operands: of each operand that is given, the letter or the pair of letters of each dimension: runs and
            the ellipsis written out (``.1 .0`` for the last two dimensions that broadcast).
        results: the same of each result.
        runs: how many dimensions each run has.
        placed: letters along which other operands' positions come to places of the first that are known only
            at run time; those of the others are called ``x of index``.
    """

    rule: Rule
    arguments: Mapping[str, Any]
    operands: Mapping[str, Dims]
    results: tuple[Dims, ...]
    runs: Mapping[str, int]
    placed: frozenset[str]
    _along: dict[str, frozenset[str]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def kept(self) -> frozenset[str]:
        """The letters of the results."""
        return frozenset(letter for dims in self.results for letter in letters_of(dims))

    def along(self, keyword: str) -> frozenset[str]:
        """The letters that the clauses of this keyword speak of, by their first word."""
        if keyword not in self._along:
            stated = [clause for clause in self.rule.all(keyword) if clause.holds(self.arguments)]
            self._along[keyword] = frozenset(letter for clause in stated for letter in self._where(clause))
        return self._along[keyword]

    def _where(self, clause: Clause) -> Iterable[str]:
        word = clause.words[0]
        if clause.argument:
            letters = letters_of(next(iter(self.operands.values())))
            dims = self.arguments.get(word)
            several = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
            return [letters[int(dim)] for dim in several] or letters
        if word == ELLIPSIS:
            dims = (dim for each in self.operands.values() for dim in each)
            return [dim for dim in dims if isinstance(dim, str) and dim.startswith(".")]
        return [f"{word}{index}" for index in range(self.runs[word])] if word in self.runs else [word]

    @cached_property
    def sliding(self) -> frozenset[str]:
        """The letters of a weight's windows that slide over positions."""
        return frozenset(clause.words[1] for clause in self.rule.all("slide"))

    @cached_property
    def crossing(self) -> frozenset[str]:
        """Letters along which positions are combined."""
        return self.along("mix") | self.along("reduce")

    @cached_property
    def windowed(self) -> frozenset[str]:
        """Letters along which the positions of results are others than those of operands."""
        return self.along("window") | self.along("slide")

    @cached_property
    def crossed(self) -> frozenset[str]:
        """Letters along which positions are combined, ordered or shifted: what lies behind one another there
        are the same channels.
        """
        return self.crossing | self.windowed | self.along("freeze") | self.placed

    @cached_property
    def inside(self) -> frozenset[str]:
        """Letters of a weight's window, or of its gates: part of its columns where a window slides, of its
        rows where it is laid out.
        """
        return self.sliding | (self.windowed - self.kept) | self.along("gates")

    @cached_property
    def routed(self) -> frozenset[str]:
        """Letters of which each position of another one uses one, chosen at run time."""
        return frozenset(clause.words[1] for clause in self.rule.all("route"))

    def summed(self, operands: Iterable[Collection[str]]) -> frozenset[str]:
        """The letters over which products of operands with these letters are summed."""
        letters = [letter for operand in operands for letter in operand]
        several = frozenset(letter for letter in letters if letters.count(letter) > 1)
        return several - self.kept - self.routed - self.along("gates")

    def products(self) -> Iterator[tuple[frozenset[str], list[str]]]:
        """The products that are taken: the letters whose sizes are multiplied, and the operands that have
        them.

        What is summed over and mixed as well (the keys of attention, in a softmax) is summed over last: these
        are two products.
        """
        repeated = {clause.words[0]: clause.words[1] for clause in self.rule.all("repeat")}
        letters = {
            name: frozenset(repeated.get(letter, letter) for letter in letters_of(dims))
            for name, dims in self.operands.items()
        }
        summed, result = self.summed(letters.values()), frozenset[str]()
        used: list[str] = []
        for over in (summed - self.along("mix"), summed & self.along("mix")):
            factors = [name for name in letters if name not in used and over & letters[name]]
            used += factors
            result = result.union(*(letters[name] for name in factors))
            if over:
                yield result - self.routed, list(used)
            result -= over


def read(rule: Rule, arguments: Mapping[str, Any], ranks: Mapping[str, int]) -> Reading:
    """Read a rule for a call.

    Args:
        arguments: of the call, by name.
        ranks: how many dimensions each tensor among them has, those in lists by name and place.

    Raises:
        DoesNotApplyError: an operand has other dimensions than the rule says.
    """
    form = _form(rule, arguments, ranks)
    runs = _runs(form, rule, arguments, ranks)
    places = (clause.words for clause in rule.all("place"))
    placed = frozenset(f"{run}{int(arguments[dim]) % runs[run]}" for run, dim in places if runs[run])
    operands: dict[str, Dims] = {}
    for operand in form.operands:
        name, rank = operand.name, ranks.get(operand.name)
        if rank is None:
            continue
        dims = _spelled(operand.dims, rank, runs)
        if len(dims) != rank:
            raise DoesNotApplyError(f"'{name}' has {rank} dimensions")
        if operands:  # the positions of others that are placed are none of the first one's
            dims = tuple(f"{dim} of {name}" if dim in placed else dim for dim in dims)
        operands[name] = dims
    letters = {letter for dims in operands.values() for letter in letters_of(dims)}
    dots = sum(letter.startswith(".") for letter in letters)
    results = [
        _spelled(dims, (dots if ELLIPSIS in dims else 0) + _fixed(dims, runs), runs) for dims in form.results
    ]
    placed |= {letter for letter in letters if " of " in letter}
    return Reading(rule, arguments, operands, tuple(results), runs, placed)


def _form(rule: Rule, arguments: Mapping[str, Any], ranks: Mapping[str, int]) -> Alternative:
    """The first alternative whose condition holds and whose operands have enough dimensions; else the
    last.
    """
    for form in rule.alternatives[:-1]:
        stated = not form.condition or arguments.get(form.condition)
        if stated and all(_fits(each.dims, ranks.get(each.name)) for each in form.operands):
            return form
    return rule.alternatives[-1]


def _fits(dims: Dims, rank: int | None) -> bool:
    flexible = any(str(token).endswith("*") for token in dims) or dims[:1] == (ELLIPSIS,)
    return rank is None or rank == len(dims) or (flexible and rank >= len(dims) - 1)


def _runs(
    form: Alternative, rule: Rule, arguments: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, int]:
    """The length of every run, from the operands that leave it no choice, or from an argument that holds its
    sizes.
    """
    runs = {
        clause.words[1]: len(arguments[clause.words[0]])
        for clause in rule.all("shape")
        if len(clause.words) == 2
    }
    names = {str(token) for operand in form.operands for token in operand.dims if str(token).endswith("*")}
    for operand in form.operands:
        if operand.name in ranks and ELLIPSIS not in operand.dims:
            for run in names.intersection(map(str, operand.dims)):
                runs.setdefault(run, ranks[operand.name] - len(operand.dims) + 1)
    return {run: runs.get(run, 1) for run in names}


def _spelled(dims: Dims, rank: int, runs: Mapping[str, int]) -> Dims:
    """One letter (or pair) per dimension: runs and the ellipsis written out, the ellipsis numbered from the
    right.
    """
    letters: list[str | tuple[str, str]] = []
    for token in dims:
        if token == ELLIPSIS:
            letters += [f".{index}" for index in reversed(range(rank - _fixed(dims, runs)))]
        elif isinstance(token, str) and token in runs:
            letters += [f"{token}{index}" for index in range(runs[token])]
        else:
            letters.append(token)
    return tuple(letters[max(len(letters) - rank, 0) :])


def _fixed(dims: Dims, runs: Mapping[str, int]) -> int:
    """The number of dimensions without the ellipsis."""
    return sum(runs.get(str(token), 1) for token in dims if token != ELLIPSIS)
