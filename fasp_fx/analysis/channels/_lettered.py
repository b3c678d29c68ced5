"""Read a rule with letters for one call: the operands' letters, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...patterns import ORDINALS, Clause, Rule
from ._facts import Facts
from ._numbering import Numbering
from ._operands import (
    Axis,
    DoesNotApplyError,
    Operand,
    Value,
    choose,
    divide,
    fixed_rank,
    run_lengths,
    singles,
    spell,
)


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
    if isinstance(value, (list, tuple)):
        return value[index] if len(value) > 1 else value[0]
    return value


@dataclass(frozen=True)
class Recurring:
    """A letter of a weight that is contracted with letter ``of`` of the first result, one step before."""

    of: str
    start: fx.Node | None
    steps: int


def recurring(
    rule: Rule, arguments: dict[str, Any], nodes: dict[str, fx.Node | None]
) -> dict[str, Recurring]:
    """The recurring letters of a rule, for one call."""
    return {
        letter: Recurring(of, nodes.get(start), int(bool(arguments[second])))
        for letter, of, start, second in (clause.words for clause in rule.all("recur"))
    }


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
        factors = {clause.words[0]: int(arguments[clause.words[1]]) for clause in rule.all("factor")}
        factors |= {clause.words[0]: int(clause.words[1]) for clause in rule.all("gates")}
        self.operands: list[Operand] = []
        for declared in alternative.operands:
            value = arguments.get(declared.name)
            if isinstance(value, Value):
                spelled = spell(declared.dims, len(value.shape), runs)
                if len(spelled) != len(value.shape):
                    raise DoesNotApplyError(f"'{declared.name}' has {len(value.shape)} dimensions")
                value, letters, splits = divide(value, spelled, factors)
                self.operands.append(Operand(declared.name, value, letters, nodes.get(declared.name), splits))
                if splits:
                    facts.boxes_of(value, node)
                    self._hold_factors(value, letters, nodes)
        #: letters along which other operands' positions come to places of the first that are known only at
        #: run time
        self.placed = self._place(arguments, runs)
        self._repeat()
        self.size: dict[str, int] = {}
        for operand in self.operands:
            for letter, size in zip(operand.letters, operand.value.shape, strict=True):
                self.size[letter] = max(self.size.get(letter, 1), size)
        dots = max(
            (sum(letter.startswith(".") for letter in operand.letters) for operand in self.operands),
            default=0,
        )
        self.results = [
            spell(dims, (dots if "..." in dims else 0) + fixed_rank(dims, runs), runs)
            for dims in alternative.results
        ]
        self.kept = {letter for letters in self.results for letter in singles(letters)}
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
        #: letters of a weight that are contracted with a letter of the first result, one step before
        self.recurs = recurring(rule, arguments, nodes)
        self.routes = {clause.words[1] for clause in rule.all("route")}
        fixed = (
            isinstance(arguments.get("k", 1), int)
            and nodes.get("k") is None
            and arguments.get("largest") is not False
        )
        self.chosen = self._where("choose", arguments, runs) if fixed else set()
        self.added = self._where("add", arguments, runs)
        self.needed = int(arguments.get("k", 1)) if fixed else 1
        self.looks = [
            (int(arguments[dim]), arguments[index])
            for dim, index in (clause.words for clause in rule.all("look"))
        ]
        self.experts = experts
        self.keepdim = bool(arguments.get("keepdim", False))
        self._activate()

    def _hold_factors(self, value: Value, letters: tuple[str, ...], nodes: dict[str, fx.Node | None]) -> None:
        """Leave alone the channels that a factor counts whose number is computed at run time (the groups of a
        convolution of all samples at once, say, where each channel has its own).
        """
        for letter, name in (clause.words for clause in self.rule.all("factor")):
            if nodes.get(name) is None or letter not in letters:
                continue
            axes = [axis for axis in value.axes if letters.index(letter) in axis.varying()]
            reason = f"counted by '{name}' of {self.node.target}, which is computed at run time"
            self.facts.freeze(axes, reason, self.node)

    def _activate(self) -> None:
        """What no weight had a part in (a state of zeros before the first step) meets a weight as an
        activation does.
        """
        for index, operand in enumerate(self.operands):
            if operand.value.created and any(self.contracted(letter) for letter in operand.letters):
                self.operands[index] = replace(operand, value=replace(operand.value, constant=False))

    def _place(self, arguments: dict[str, Any], runs: dict[str, int]) -> set[str]:
        """Give positions that are placed letters of their own: they are others than those of the first
        operand.

        Raises:
            ValueError: operands differ along other dimensions, where the operator leaves some positions
                alone.
        """
        found: set[str] = set()
        for run, dim in (clause.words for clause in self.rule.all("place")):
            if not runs[run]:
                continue
            letter = f"{run}{int(arguments[dim]) % runs[run]}"
            found.add(letter)
            for index, operand in enumerate(self.operands[1:], 1):
                own = f"{letter} of {operand.name}"
                found.add(own)
                self.operands[index] = replace(
                    operand, letters=tuple(own if other == letter else other for other in operand.letters)
                )
            if (
                len(
                    {
                        tuple(
                            (item, size)
                            for item, size in zip(o.letters, o.value.shape, strict=True)
                            if item not in found
                        )
                        for o in self.operands
                    }
                )
                > 1
            ):
                raise DoesNotApplyError(f"the operands of {self.node.target} differ in size")
        return found

    def _repeat(self) -> None:
        for clause in self.rule.all("repeat"):
            few, many = clause.words
            target = next(
                (o.value.shape[o.letters.index(many)] for o in self.operands if many in o.letters), None
            )
            if target is None:
                continue
            for index, operand in enumerate(self.operands):
                if few not in operand.letters:
                    continue
                dim = operand.letters.index(few)
                times = target // operand.value.shape[dim]
                shape = tuple(target if d == dim else s for d, s in enumerate(operand.value.shape))
                axes = tuple(
                    Axis(
                        (
                            axis.numbers.repeat_interleave(times, dim)
                            if axis.numbers.shape[dim] > 1
                            else axis.numbers
                        ),
                        axis.dim,
                    )
                    for axis in operand.value.axes
                )
                value = Value(shape, axes, operand.value.constant)
                letters = tuple(many if letter == few else letter for letter in operand.letters)
                self.operands[index] = replace(operand, value=value, letters=letters)

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

    def before(self, letter: str) -> Operand | None:
        """The first result one step before, as a weight's recurring letter meets it; ``None`` if nothing is
        known of the first step.
        """
        of, start = self.recurs[letter].of, self.recurs[letter].start
        return (
            None
            if start is None
            else Operand(
                "state",
                Value(()),
                tuple(letter if own == of else str(own) for own in self.results[0]),
                self.node,
            )
        )

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


def _dims_argument(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    return [int(dim) % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]


# --- Operators that are given graphs: which positions the graphs are told, and whether anything depends on
# that.


def index_dependent_letters(rule: Rule, given: dict[str, Any], target: object) -> dict[str, str]:
    """The letters along which a call tells positions apart, each with the reason why none of them can go.

    A graph is told the number of a position; with another position gone it would be told another number. Only
    where it does not read that number, and no table beside it has an entry for each position, are all
    positions alike.
    """
    found: dict[str, str] = {}
    for letter, name, ordinal in (clause.words for clause in rule.all("told")):
        why = _tells_apart(given.get(name), ORDINALS[ordinal])
        if why is not None:
            found.setdefault(letter, f"'{name}' of {target} {why}")
    return found


def _tells_apart(given: Any, place: int) -> str | None:
    parts = given if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(part, Value) and len(part.shape) > place and part.shape[place] > 1 for part in parts):
        return "has an entry for each position along this dimension"
    graphs = [part for part in parts if isinstance(part, fx.GraphModule)]
    if not graphs:
        return "is no graph that could be read, so that it may tell positions along this dimension apart"
    if any(graph.graph.find_nodes(op="placeholder")[place].users for graph in graphs):
        return "tells positions along this dimension apart"
    return None
