"""The grammar of operator rules: parse once, use many times.

::

    rule        :=  body (";" clause)*
    body        :=  "move" NAME                      the operator only moves elements of NAME
                 |  "check"                          the operator reads shapes or types alone; nothing it
                                                     returns carries channels
                 |  "create"                         the operator makes a tensor whose elements are all alike
                 |  "tally" NAME                     one position, in a new last dimension, for each number
                                                     that the integers of NAME may hold
                 |  alternative ("|" alternative)*   dimensions by letter, first alternative that fits
    alternative :=  operand ("," operand)* "->" result ("," result)* ["if" NAME]
    operand     :=  NAME "[" dims "]"                NAME is an argument of the operator's schema; NAME.0 the
                                                     first tensor of a list
    result      :=  "[" dims "]"
    dims        :=  (DIM | "(" LETTER LETTER ")" | "...")*
                                                     in brackets: one dimension that is the product of two
                                                     letters
    DIM         :=  LETTER | LETTER "*"              LETTER "*" is a run of dimensions
    clause      :=  said ["if" NAME]                 "if", after "mix", "freeze" and "window" alone: in calls
                                                     in which argument NAME is truthy
    said        :=  "mix" WHERE                      positions along WHERE influence one another
                 |  "reduce" "@" NAME                the dimensions named by argument NAME are reduced
                 |  "freeze" WHERE                   positions along WHERE cannot be removed
                 |  "window" WHERE                   the same, and positions of the result there are others
                                                     than those of the operand
                 |  "slide" DIM DIM NAME NAME NAME   a window of the second letter's size slides over the
                                                     first; arguments: stride, padding, dilation
                 |  "place" DIM NAME                 positions of all operands but the first come to places of
                                                     the first that are known only at run time, along that
                                                     dimension of a run that the argument names
                 |  "route" LETTER LETTER            each position of the first letter uses one position of
                                                     the second, chosen at run time
                 |  "choose" WHERE NAME*             positions along WHERE compete by their values, and one
                                                     whose value is lowest takes no part; number NAME (first,
                                                     second) of the results names those chosen
                 |  "index" WHERE NAME               the integers of argument NAME, or of result number NAME
                                                     (first, second), number positions along WHERE
                 |  "add" WHERE                      positions along WHERE are added up: zeros make no
                                                     difference
                 |  "pass" NAME NAME                 the integers of the argument come back, perhaps moved, as
                                                     result number (first, second)
                 |  "count" NAME NUMBER*             argument NAME is how many numbers are tallied, less
                                                     NUMBER
                 |  "factor" LETTER NAME             argument NAME is the size of a letter in brackets
                 |  "gates" LETTER NUMBER            a letter in brackets has NUMBER positions, rows of
                                                     weights of which each does other things
                 |  "recur" LETTER LETTER NAME NAME  the first letter, of a weight, is contracted with the
                                                     second, of the first result one step before; arguments:
                                                     the state before the first step, whether steps lie along
                                                     the second dimension
                 |  "only" NAME NUMBER               the rule speaks of calls with that value of argument
                                                     NAME; in others the operator has no rule
                 |  "align" LETTER NUMBER            positions along LETTER stay in multiples of NUMBER
                 |  "repeat" LETTER LETTER           the first letter is repeated in blocks to the size of the
                                                     second
                 |  "shape" NAME                     argument NAME is the shape of the result
                 |  "shape" NAME "=" LETTER "*"      argument NAME holds the sizes of a run of dimensions
                 |  "part" NAME NAME NAME*           arguments: a dimension, and where along it what is taken
                                                     lies: an index, a size or sizes, a start and an end
    WHERE       :=  LETTER | LETTER "*" | "..." | "@" NAME
                                                     "@" NAME: the dimensions named by an argument

A letter that stands in two operands and in no result is *contracted*. Letters shared by an operand and a
result are the same dimension. ``...`` stands for leading dimensions that broadcast. A letter of a result that
no operand has, where all that operands have are kept, is a dimension that the operator adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NoReturn

from fasp_fx.errors import RuleError

ELLIPSIS = "..."

#: the dimensions of one tensor; two letters in brackets are a tuple
Dims = tuple[str | tuple[str, str], ...]

#: a token, or what is none
_TOKEN = re.compile(r"(\.\.\.|->|[A-Za-z_][A-Za-z_0-9]*(?:\.\d+)?\*?|\d+|[\[\](),;|@=])|(\S)")

#: clause keyword -> what the words after it are; those with "?" may be left out
_CLAUSES = {
    "mix": "where",
    "reduce": "where",
    "freeze": "where",
    "window": "where",
    "slide": "letter letter argument argument argument",
    "place": "letter argument",
    "route": "letter letter",
    "factor": "letter argument",
    "gates": "letter number",
    "recur": "letter letter argument argument",
    "only": "argument number",
    "choose": "where ordinal?",
    "index": "where integers",
    "add": "where",
    "pass": "argument ordinal",
    "count": "argument number?",
    "align": "letter number",
    "repeat": "letter letter",
    "shape": "argument letter?",
    "part": "argument argument argument?",
}
_CONDITIONAL = {"mix", "freeze", "window"}
#: how a clause counts results
ORDINALS = {"first": 0, "second": 1}


def letters_of(dims: Dims) -> tuple[str, ...]:
    """All letters of a tensor, those in brackets included."""
    return tuple(letter for dim in dims for letter in ((dim,) if isinstance(dim, str) else dim))


def _normalised(tokens: list[tuple[str, int]]) -> str:
    text = re.sub(r" (?=[]),;=])|(?<=[\[(@=]) ", "", " ".join(token for token, _ in tokens))
    return re.sub(r"(?<=\w) (?=\[)", "", text)


@dataclass(frozen=True)
class OperandDims:
    """One tensor argument of the operator and the letters of its dimensions."""

    name: str
    dims: Dims


@dataclass(frozen=True)
class Alternative:
    """One reading of the operator: its operands and results by letter, used if ``condition`` is truthy."""

    operands: tuple[OperandDims, ...]
    results: tuple[Dims, ...]
    condition: str | None = None

    @cached_property
    def kept(self) -> frozenset[str]:
        """The letters of the results."""
        return frozenset(letter for dims in self.results for letter in letters_of(dims))

    @cached_property
    def summed(self) -> frozenset[str]:
        """The letters that stand in several operands and in no result."""
        letters = [letter for operand in self.operands for letter in letters_of(operand.dims)]
        return frozenset(letter for letter in letters if letters.count(letter) > 1) - self.kept


@dataclass(frozen=True)
class Clause:
    """A keyword and its words; ``argument`` says that the first word names an argument of the operator, and
    the clause holds in calls in which ``condition`` is truthy.
    """

    keyword: str
    words: tuple[str, ...]
    argument: bool
    condition: str | None
    text: str

    def __str__(self) -> str:
        return self.text

    def holds(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the clause speaks of a call with these arguments."""
        return self.condition is None or bool(arguments.get(self.condition))


@dataclass(frozen=True)
class Rule:
    """What one operator does to channels; ``str(rule)`` is the line it was written as, normalised."""

    moves: str | None
    alternatives: tuple[Alternative, ...]
    clauses: tuple[Clause, ...]
    creates: bool
    tallies: str | None
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def pointwise(self) -> bool:
        """Whether each element of the results is computed from those at the same place of the operands."""
        tensors = [(*form.results, *(each.dims for each in form.operands)) for form in self.alternatives]
        plain = bool(tensors) and all(clause.keyword == "pass" for clause in self.clauses)
        return plain and all(dims == (ELLIPSIS,) for form in tensors for dims in form)

    def all(self, keyword: str) -> list[Clause]:
        """The clauses that start with ``keyword``, in order."""
        assert keyword in _CLAUSES, keyword
        return [clause for clause in self.clauses if clause.keyword == keyword]

    def names(self) -> set[str]:
        """Every argument name the rule mentions; all must be in the operator's schema."""
        names = [self.moves, self.tallies, *(clause.condition for clause in self.clauses)]
        names += [form.condition for form in self.alternatives]
        names += [operand.name for form in self.alternatives for operand in form.operands]
        names += [
            word
            for clause in self.clauses
            for word, kind in zip(clause.words, _CLAUSES[clause.keyword].split(), strict=False)
            if kind.startswith("argument")
            or (kind == "where" and clause.argument)
            or (kind == "integers" and word not in ORDINALS)
        ]
        return {name.partition(".")[0] for name in names if name}


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        self.at = 0
        for match in _TOKEN.finditer(text):
            if match[2]:
                self.fail("unexpected character", match.start(2))
            self.tokens.append((match[1], match.start(1)))

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        if position is None:
            position = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        raise RuleError(f"rule does not parse: {message}\n  {self.text}\n  {' ' * position}^")

    def peek(self) -> str | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self, pattern: str, expected: str) -> str:
        token = self.peek()
        if token is None or not re.fullmatch(pattern, token):
            self.fail(f"expected {expected}")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        taken = self.peek() == token
        self.at += taken
        return taken

    def name(self) -> str:
        return self.take(r"[A-Za-z_]\w*(\.\d+)?", "a name")

    def dims(self) -> Dims:
        self.take(r"\[", "'['")
        dims: list[str | tuple[str, str]] = []
        while not self.accept("]"):
            if self.accept("("):
                first = self.letter(r"[A-Za-z_]\w*", dims)
                dims.append((first, self.letter(r"[A-Za-z_]\w*", [*dims, first])))
                self.take(r"\)", "')'")
            else:
                dims.append(self.letter(r"\.\.\.|[A-Za-z_]\w*\*?", dims))
        return tuple(dims)

    def letter(self, pattern: str, before: list[str | tuple[str, str]]) -> str:
        if self.peek() in letters_of(tuple(before)):
            self.fail(f"{self.peek()!r} stands twice in one tensor")
        return self.take(pattern, "a letter, '(', '...' or ']'")

    def alternative(self) -> Alternative:
        operands = [OperandDims(self.name(), self.dims())]
        while self.accept(","):
            operands.append(OperandDims(self.name(), self.dims()))
        self.take("->", "'->'")
        results = [self.dims()]
        while self.accept(","):
            results.append(self.dims())
        letters = {letter for operand in operands for letter in letters_of(operand.dims)}
        form = Alternative(tuple(operands), tuple(results))
        added = form.kept - letters
        if added and not letters <= form.kept:
            self.fail(f"{min(added)!r} stands in a result but in no operand")
        return replace(form, condition=self.name()) if self.accept("if") else form

    def clause(self) -> Clause:
        keyword, first = str(self.peek()), self.at
        if keyword not in _CLAUSES:
            self.fail(f"expected one of {', '.join(sorted(_CLAUSES))}")
        self.at += 1
        kinds, argument = _CLAUSES[keyword].split(), self.accept("@")
        if argument and kinds[0] != "where":
            self.fail(f"'@' is not allowed after {keyword!r}")
        words: list[str] = []
        while not words or self.peek() not in (None, ";", "if"):
            self.accept("=")
            words.append(self.take(".+", "a word"))
        if self.peek() == "if" and keyword not in _CONDITIONAL:
            self.fail(f"'if' is not allowed after {keyword!r}")
        condition = self.name() if self.accept("if") else None
        for word, kind in zip(words, kinds, strict=False):
            if kind.startswith("ordinal") and word not in ORDINALS:
                self.fail(f"{keyword!r} counts as {' or '.join(ORDINALS)}")
            if kind.startswith("number") and not word.isdecimal():
                self.fail(f"{keyword!r} ends in a number")
        needed = sum(not kind.endswith("?") for kind in kinds)
        if not needed <= len(words) <= len(kinds):
            self.fail(f"{keyword!r} takes {needed} to {len(kinds)} word(s), not {len(words)}")
        return Clause(keyword, tuple(words), argument, condition, _normalised(self.tokens[first : self.at]))

    def rule(self) -> Rule:
        alternatives, clauses = [], []
        creates = self.accept("create")
        moves = self.name() if self.accept("move") else None
        tallies = self.name() if self.accept("tally") else None
        if not (creates or moves or tallies or self.accept("check")):
            alternatives.append(self.alternative())
            while self.accept("|"):
                alternatives.append(self.alternative())
        while self.accept(";"):
            clauses.append(self.clause())
        if self.peek() is not None:
            self.fail("expected ';' or the end")
        if creates and not any(clause.keyword == "shape" for clause in clauses):
            self.fail("'create' needs the clause 'shape', which says what argument holds the sizes")
        return Rule(moves, tuple(alternatives), tuple(clauses), creates, tallies, _normalised(self.tokens))


@cache
def parse(text: str) -> Rule:
    """Parse one rule.

    Raises:
        RuleError: with the rule, a caret under the place, and what was expected there.
    """
    return _Parser(text).rule()
