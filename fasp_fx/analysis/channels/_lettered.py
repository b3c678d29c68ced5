"""Read a rule with letters for one call: a letter for every dimension of its operands, and what becomes of
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fasp_fx.patterns import ORDINALS, Alternative, Clause, Dims, Rule

from ._facts import Facts, Recurrence
from ._numbering import Axis, DoesNotApplyError, Numbering, Value, collapse, smallest_step

# --- Dimensions that are products of two letters: an operand is divided before a rule is applied, a result
# put together after.


#: a dimension's letter, or the two letters of its factors
Spelled = tuple[str | tuple[str, str], ...]


def divide(
    value: Value, letters: Spelled, sizes: dict[str, int]
) -> tuple[Value, tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Give every letter a dimension of its own.

    Args:
        sizes: the size of at least one factor of each pair.

    Returns:
        The value, its letters, and the splits made, each (dimension, size of the first factor), to be applied
        in order.
    """
    flat: list[str] = []
    splits: list[tuple[int, int]] = []
    for letter in letters:
        if isinstance(letter, str):
            flat.append(letter)
            continue
        dim, whole = len(flat), value.shape[len(flat)]
        first, second = letter
        known = sizes[first] if first in sizes else sizes[second]
        if not known or whole % known:
            raise DoesNotApplyError(f"a dimension of {whole} is not a multiple of {known}")
        leading = known if first in sizes else whole // known
        value = _split(value, dim, leading)
        splits.append((dim, leading))
        flat += [first, second]
    return value, tuple(flat), tuple(splits)


def _split(value: Value, dim: int, leading: int) -> Value:
    shape = (*value.shape[:dim], leading, value.shape[dim] // leading, *value.shape[dim + 1 :])
    axes = []
    for axis in value.axes:
        single = axis.numbers.shape[dim] == 1
        numbers = collapse(axis.numbers.unflatten(dim, (1, 1) if single else (leading, -1)))
        at = axis.dim + (axis.dim > dim)
        if axis.dim == dim:
            varying = [d for d in (dim, dim + 1) if numbers.shape[d] > 1]
            at = min(varying or [dim], key=lambda d: (smallest_step(numbers.numpy(), d), -d))
        axes.append(Axis(numbers, at, axis.slot))
    return Value(shape, tuple(axes), value.constant, value.origin, created=value.created)


def join(numbers: Tensor, letters: Spelled, sizes: dict[str, int]) -> Tensor:
    """Numbers with one dimension per letter, put together to one dimension per pair."""
    for dim, letter in enumerate(letters):
        if not isinstance(letter, str):
            if numbers.shape[dim] > 1 or numbers.shape[dim + 1] > 1:
                full = list(numbers.shape)
                full[dim : dim + 2] = [sizes[letter[0]], sizes[letter[1]]]
                numbers = numbers.expand(full)
            numbers = numbers.flatten(dim, dim + 1)
    return numbers


def singles(letters: Spelled) -> tuple[str, ...]:
    """All letters in order."""
    return tuple(
        single for letter in letters for single in ((letter,) if isinstance(letter, str) else letter)
    )


def spell(dims: Dims, rank: int, runs: dict[str, int]) -> Spelled:
    """One letter (or pair) per dimension: runs and the ellipsis written out, the ellipsis numbered from the
    right.
    """
    letters: list[str | tuple[str, str]] = []
    fixed = fixed_rank(dims, runs)
    for token in dims:
        if token == "...":
            letters += [f".{index}" for index in reversed(range(rank - fixed))]
        elif isinstance(token, str) and token in runs:
            letters += [f"{token}{index}" for index in range(runs[token])]
        else:
            letters.append(token)
    return tuple(letters[len(letters) - rank :]) if len(letters) > rank else tuple(letters)


def fixed_rank(dims: Sequence[str | tuple[str, str]], runs: dict[str, int]) -> int:
    """The number of dimensions without the ellipsis."""
    return sum(runs.get(token, 1) if isinstance(token, str) else 1 for token in dims if token != "...")


# --- Operands of a lettered rule: which alternative of the rule a call takes, and a letter for each
# dimension.


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
    held = [clause.words for clause in rule.all("shape") if len(clause.words) == 2]
    runs = {run: len(arguments[name]) for name, run in held}
    for operand in alternative.operands:
        value = arguments.get(operand.name)
        rank = len(value.shape) if isinstance(value, Value) and "..." not in operand.dims else None
        for run in (str(token) for token in operand.dims if str(token).endswith("*")):
            if run not in runs and rank is not None:
                runs[run] = rank - len(operand.dims) + 1
    names = {str(token) for operand in alternative.operands for token in operand.dims}
    return {run: runs.get(run, 1) for run in names if run.endswith("*")}


def align(axis: Axis, letters: tuple[str, ...], order: list[str]) -> Tensor:
    """The axis's numbers with one dimension per letter of ``order``."""
    present = [letter for letter in order if letter in letters]
    numbers = axis.numbers.permute([letters.index(letter) for letter in present])
    return numbers.reshape(
        [numbers.shape[present.index(letter)] if letter in present else 1 for letter in order]
    )


# --- What a rule says of each letter.


@dataclass(frozen=True)
class Slide:
    """A window along letter ``within`` of the weight slides over letter ``over`` of the activation;
    ``padding`` as the operator takes it.
    """

    over: str
    within: str
    stride: int
    padding: int | str
    dilation: int


def slides(clauses: Sequence[Clause], arguments: dict[str, Any]) -> list[Slide]:
    """The slides of a rule; the clauses stand in the order of the dimensions in the operator's arguments."""
    found = []
    for index, clause in enumerate(clauses):
        over, within, *names = clause.words
        stride, padding, dilation = (_entry(arguments[name], index) for name in names)
        found.append(Slide(over, within, int(stride), padding, int(dilation)))
    return found


def _entry(value: Any, index: int) -> Any:
    return value[min(index, len(value) - 1)] if isinstance(value, (list, tuple)) else value


class Lettered:
    """A lettered rule read for one node: the letters of its operands and results, and what the rule says of
    each letter.

    Raises:
        DoesNotApplyError: a dimension in brackets is no multiple of its factor.
    """

    def __init__(
        self,
        node: fx.Node,
        rule: Rule,
        arguments: dict[str, Any],
        nodes: dict[str, fx.Node | None],
        facts: Facts,
        numbering: Numbering,
        experts: bool = False,
    ) -> None:
        self.node, self.rule, self.facts, self.numbering = node, rule, facts, numbering
        alternative = choose(rule, arguments)
        runs = run_lengths(alternative, rule, arguments)
        for _, name in (clause.words for clause in rule.all("factor")):
            if nodes.get(name) is not None:  # the groups of a convolution of all samples at once, say
                raise DoesNotApplyError(f"'{name}' is computed at run time")
        factors = {clause.words[0]: int(arguments[clause.words[1]]) for clause in rule.all("factor")}
        factors |= {clause.words[0]: int(clause.words[1]) for clause in rule.all("gates")}
        #: letters along which other operands' positions come to places of the first that are known only at
        #: run time
        self.placed = {
            f"{run}{int(arguments[dim]) % runs[run]}"
            for run, dim in (clause.words for clause in rule.all("place"))
            if runs[run]
        }
        self.operands: list[Operand] = []
        for declared in alternative.operands:
            value = arguments.get(declared.name)
            if isinstance(value, Value):
                spelled = spell(declared.dims, len(value.shape), runs)
                if len(spelled) != len(value.shape):
                    raise DoesNotApplyError(f"'{declared.name}' has {len(value.shape)} dimensions")
                value, letters, splits = divide(value, spelled, factors)
                if self.operands:  # the positions of others that are placed are none of the first one's
                    here = declared.name
                    letters = tuple(f"{one} of {here}" if one in self.placed else one for one in letters)
                self.operands.append(Operand(declared.name, value, letters, nodes.get(declared.name), splits))
                if splits:
                    facts.boxes_of(value, node)
        self.placed |= {own for o in self.operands[1:] for own in o.letters if " of " in own}
        self._repeat()
        self.size: dict[str, int] = {}
        for operand in self.operands:
            for letter, size in zip(operand.letters, operand.value.shape, strict=True):
                self.size[letter] = max(self.size.get(letter, 1), size)
        if self.placed and any(o.size(own) != self.size[own] for o in self.operands for own in o.letters):
            raise DoesNotApplyError(f"the operands of {node.target} differ in size")  # some positions stay
        dots = len({letter for letter in self.size if letter.startswith(".")})
        self.results = [
            spell(dims, (dots if "..." in dims else 0) + fixed_rank(dims, runs), runs)
            for dims in alternative.results
        ]
        self.kept = {letter for letters in self.results for letter in singles(letters)}
        #: what the operator takes from its own step before, by the operand that stands for it
        self.recurrences: dict[str, Recurrence] = {}
        for clause in rule.all("recur"):
            self._recur(clause, arguments, nodes)
        self.mixed = self._where("mix", arguments, runs)
        self.reduced = self._where("reduce", arguments, runs)
        #: letters along which graphs that the operator is given tell positions apart, with the reason
        self.index_dependent = index_dependent_letters(rule, arguments, node.target)
        fixed_positions = self._where("freeze", arguments, runs) | self.placed
        self.frozen = fixed_positions | self.index_dependent.keys()
        self.windowed = self._where("window", arguments, runs)
        self.slides = slides(rule.all("slide"), arguments)
        self.windowed |= {slide.over for slide in self.slides}
        #: letters along which positions are combined, ordered or shifted: what lies behind one another there
        #: are the same channels
        self.crossed = self.mixed | self.reduced | self.windowed | fixed_positions
        #: letters of a weight's window: part of its columns where the window slides, of its rows where it is
        #: laid out
        self.inside = {slide.within for slide in self.slides} | {
            letter for letter in self.windowed if letter not in self.kept
        }
        #: letters along which rows do other things: the same channels in each
        self.gates = {clause.words[0] for clause in rule.all("gates")}
        self.inside |= self.gates
        #: letters along which as many positions stay as a multiple of a number
        self.aligned = {clause.words[0]: int(clause.words[1]) for clause in rule.all("align")}
        self.routes = {clause.words[1] for clause in rule.all("route")}
        fixed = isinstance(arguments.get("k", 1), int) and nodes.get("k") is None
        fixed &= arguments.get("largest") is not False
        #: letters along which positions compete, of which so many are needed at once
        self.chosen = self._where("choose", arguments, runs) if fixed else set()
        self.needed = int(arguments.get("k", 1)) if self.chosen else 1
        self.added = self._where("add", arguments, runs)
        self.looks = [
            (int(arguments[dim]), arguments[index])
            for dim, index in (clause.words for clause in rule.all("look"))
        ]
        self.experts = experts
        self.keepdim = bool(arguments.get("keepdim", False))
        self._activate()

    def _activate(self) -> None:
        """What no weight had a part in (a state of zeros before the first step) meets a weight as an
        activation does.
        """
        for index, operand in enumerate(self.operands):
            if operand.value.created and any(self.contracted(letter) for letter in operand.letters):
                self.operands[index] = replace(operand, value=replace(operand.value, constant=False))

    def _recur(self, clause: Clause, arguments: dict[str, Any], nodes: dict[str, fx.Node | None]) -> None:
        """Let the first result, as it was one step before, be one more operand, of which a weight contracts a
        letter under another name.
        """
        letter, of, start, second = clause.words
        letters = tuple(letter if own == of else str(own) for own in self.results[0])
        shape = tuple(self.size[of] if own == letter else 1 for own in letters)
        channels = [
            axis.numbers.movedim(operand.letters.index(of), 0).reshape(self.size[of], -1)[:, 0]
            for operand in self.operands
            for axis in (operand.at(of) if of in operand.letters else ())
        ]
        axes = tuple(Axis(numbers.reshape(shape), letters.index(letter)) for numbers in channels[:1])
        name, first = f"{letter} of the step before", nodes[start]
        assert first is not None
        self.operands.append(Operand(name, Value(shape, axes), letters, self.node))
        self.recurrences[name] = Recurrence(first, int(bool(arguments[second])))

    def _repeat(self) -> None:
        for few, many in (clause.words for clause in self.rule.all("repeat")):
            sizes = [operand.size(many) for operand in self.operands if many in operand.letters]
            for index, operand in enumerate(self.operands):
                if few in operand.letters:
                    self.operands[index] = _repeated(operand, few, many, sizes[0])

    def _where(self, keyword: str, arguments: dict[str, Any], runs: dict[str, int]) -> set[str]:
        found: set[str] = set()
        for clause in self.rule.all(keyword):
            if not clause.holds(arguments):
                continue
            word = clause.words[0]
            if clause.argument:
                letters = self.operands[0].letters
                found |= {letters[dim] for dim in _dims_argument(arguments.get(word), len(letters))}
            elif word == "...":
                found |= {
                    letter
                    for operand in self.operands
                    for letter in operand.letters
                    if letter.startswith(".")
                }
            elif word in runs:
                found |= {f"{word}{index}" for index in range(runs[word])}
            else:
                found.add(word)
        return found

    def holders(self, letter: str) -> list[Operand]:
        """The operands that have positions along a letter, not one for all."""
        return [
            o for o in self.operands if letter in o.letters and (o.size(letter) > 1 or self.size[letter] == 1)
        ]

    def contracted(self, letter: str) -> bool:
        """Whether operands meet in a letter that is summed over."""
        return (
            letter not in self.kept | self.routes | self.gates
            and sum(letter in operand.letters for operand in self.operands) > 1
        )


def _repeated(operand: Operand, few: str, many: str, size: int) -> Operand:
    """An operand of which each position along one letter is repeated, up to the size of another."""
    dim, value = operand.letters.index(few), operand.value
    times = size // value.shape[dim]
    axes = tuple(
        Axis(axis.numbers.repeat_interleave(times if axis.numbers.shape[dim] > 1 else 1, dim), axis.dim)
        for axis in value.axes
    )
    shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
    letters = tuple(many if letter == few else letter for letter in operand.letters)
    return replace(operand, value=Value(shape, axes, value.constant), letters=letters)


def _dims_argument(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]


# --- Operators that are given graphs: which positions the graphs are told, and whether anything depends on
# that.


def index_dependent_letters(rule: Rule, given: dict[str, Any], target: object) -> dict[str, str]:
    """The letters along which a call may tell positions apart, each with the reason why none of them can go.

    A graph is told the number of a position; with another position gone it would be told another number. Only
    where it does not read that number, and no table beside it has an entry for each position, are all
    positions alike.
    """
    return {
        letter: f"'{name}' of {target} tells positions along this dimension apart"
        for letter, name, ordinal in (clause.words for clause in rule.all("told"))
        if not _are_alike(given.get(name), ORDINALS[ordinal])
    }


def _are_alike(given: Any, place: int) -> bool:
    parts = given if isinstance(given, (list, tuple)) else [given]
    tables = [part for part in parts if isinstance(part, Value) and len(part.shape) > place]
    graphs = [part.graph for part in parts if isinstance(part, fx.GraphModule)]
    read = any(graph.find_nodes(op="placeholder")[place].users for graph in graphs)
    return bool(graphs) and not read and all(table.shape[place] == 1 for table in tables)
