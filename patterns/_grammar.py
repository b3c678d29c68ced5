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
                 |  "index" WHERE NAME               the integers of result number NAME (first, second) number
                                                     positions along WHERE
                 |  "add" WHERE                      positions along WHERE are added up: zeros make no
                                                     difference
                 |  "look" NAME NAME                 arguments: dimension, integers that name positions along
                                                     it
                 |  "pass" NAME NAME                 the integers of the argument come back, perhaps moved, as
                                                     result number (first, second)
                 |  "last" NAME                      argument NAME is the highest of the numbers that are
                                                     tallied
                 |  "count" NAME                     argument NAME is how many numbers are tallied
                 |  "ignore" NAME                    of argument NAME nothing but type and device are read
                 |  "factor" LETTER NAME             argument NAME is the size of a letter in brackets
                 |  "gates" LETTER NUMBER            a letter in brackets has NUMBER positions, rows of
                                                     weights of which each does other things
                 |  "recur" LETTER LETTER NAME NAME  the first letter, of a weight, is contracted with the
                                                     second, of the first result one step before; arguments:
                                                     the state before the first step, whether steps lie along
                                                     the second dimension
                 |  "told" LETTER NAME NAME          the graph in an argument is told positions along LETTER
                                                     by its input number NAME (second, third), and tables
                                                     beside it in a list have them along that dimension: they
                                                     stay where its result depends on it
                 |  "only" NAME NUMBER               the rule speaks of calls with that value of argument
                                                     NAME; in others the operator has no rule
                 |  "align" LETTER NUMBER            positions along LETTER stay in multiples of NUMBER
                 |  "repeat" LETTER LETTER           the first letter is repeated in blocks to the size of the
                                                     second
                 |  "shape" NAME                     argument NAME is the shape of the result
                 |  "shape" NAME "=" LETTER "*"      argument NAME holds the sizes of a run of dimensions
                 |  "times" NAME                     argument NAME says how often each dimension is repeated
                 |  "span" NAME NAME NAME            arguments: dimension, start, end of a slice
                 |  "pick" NAME NAME                 arguments: dimension, index of a selection
                 |  "sizes" NAME NAME                arguments: sizes of the results along a dimension, that
                                                     dimension
                 |  "chunk" NAME NAME                arguments: size of each result along a dimension, that
                                                     dimension
                 |  "length" NAME NAME               arguments: size of the result along a dimension (if
                                                     given), that dimension (none: the only one)
    WHERE       :=  LETTER | LETTER "*" | "..." | "@" NAME
                                                     "@" NAME: the dimensions named by an argument

A letter that stands in two operands and in no result is *contracted*. Letters shared by an operand and a
result are the same dimension. ``...`` stands for leading dimensions that broadcast. A letter of a result that
no operand has, where all that operands have are kept, is a dimension that the operator adds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from fasp_fx.errors import RuleError

ELLIPSIS = "..."

#: the dimensions of one tensor; two letters in brackets are a tuple
Dims = tuple[str | tuple[str, str], ...]

_TOKEN = re.compile(r"\s*(\.\.\.|->|[A-Za-z_][A-Za-z_0-9]*(?:\.\d+)?\*?|\d+|[\[\](),;|@=])")

#: clause keyword -> how many words follow it
_CLAUSES = {
    "mix": (1,),
    "reduce": (1,),
    "freeze": (1,),
    "window": (1,),
    "slide": (5,),
    "place": (2,),
    "route": (2,),
    "factor": (2,),
    "gates": (2,),
    "recur": (4,),
    "told": (3,),
    "only": (2,),
    "ignore": (1,),
    "choose": (1, 2),
    "index": (2,),
    "add": (1,),
    "look": (2,),
    "pass": (2,),
    "last": (1,),
    "count": (1,),
    "align": (2,),
    "repeat": (2,),
    "shape": (1, 3),
    "times": (1,),
    "span": (3,),
    "pick": (2,),
    "sizes": (2,),
    "chunk": (2,),
    "length": (2,),
}
_WITH_ARGUMENT = {"mix", "reduce", "freeze", "window", "choose", "index", "add"}
_CONDITIONAL = {"mix", "freeze", "window"}
#: how a clause counts results, or the inputs of a graph
ORDINALS = {"first": 0, "second": 1, "third": 2}


def letters_of(dims: Dims) -> tuple[str, ...]:
    """All letters of a tensor, those in brackets included."""
    return tuple(letter for dim in dims for letter in ((dim,) if isinstance(dim, str) else dim))


def _spelled(dims: Dims) -> str:
    return " ".join(dim if isinstance(dim, str) else f"({' '.join(dim)})" for dim in dims)


@dataclass(frozen=True)
class Operand:
    """One tensor argument of the operator and the letters of its dimensions."""

    name: str
    dims: Dims

    def __str__(self) -> str:
        return f"{self.name}[{_spelled(self.dims)}]"


@dataclass(frozen=True)
class Alternative:
    """One reading of the operator: its operands and results by letter, used if ``condition`` is truthy."""

    operands: tuple[Operand, ...]
    results: tuple[Dims, ...]
    condition: str | None = None

    def __str__(self) -> str:
        results = ", ".join(f"[{_spelled(dims)}]" for dims in self.results)
        text = f"{', '.join(map(str, self.operands))} -> {results}"
        return f"{text} if {self.condition}" if self.condition else text


@dataclass(frozen=True)
class Clause:
    """A keyword and its words; ``argument`` says that the first word names an argument of the operator, and
    the clause holds in calls in which ``condition`` is truthy.
    """

    keyword: str
    words: tuple[str, ...]
    argument: bool = False
    condition: str | None = None

    def __str__(self) -> str:
        first = ("@" if self.argument else "") + self.words[0]
        rest = self.words[1:]
        if self.keyword == "shape" and rest:
            return f"shape {first}={rest[0]}"
        return " ".join((self.keyword, first, *rest, *(("if", self.condition) if self.condition else ())))

    def holds(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the clause speaks of a call with these arguments."""
        return self.condition is None or bool(arguments.get(self.condition))


@dataclass(frozen=True)
class Rule:
    """What one operator does to channels; ``str(rule)`` is the line it was written as, normalised."""

    moves: str | None
    alternatives: tuple[Alternative, ...]
    clauses: tuple[Clause, ...]
    creates: bool = False
    tallies: str | None = None

    def __str__(self) -> str:
        single = (
            f"move {self.moves}"
            if self.moves
            else f"tally {self.tallies}"
            if self.tallies
            else "create"
            if self.creates
            else "check"
        )
        body = " | ".join(map(str, self.alternatives)) or single
        return "; ".join((body, *map(str, self.clauses)))

    @property
    def pointwise(self) -> bool:
        """Whether each element of the results is computed from those at the same place of the operands."""
        forms = self.alternatives
        dims = [own for form in forms for own in (*form.results, *(o.dims for o in form.operands))]
        plain = all(clause.keyword in ("pass", "ignore") for clause in self.clauses)
        return plain and bool(dims) and all(own == (ELLIPSIS,) for own in dims)

    def all(self, keyword: str) -> list[Clause]:
        """The clauses that start with ``keyword``, in order."""
        assert keyword in _CLAUSES, keyword
        return [clause for clause in self.clauses if clause.keyword == keyword]

    def names(self) -> set[str]:
        """Every argument name the rule mentions; all must be in the operator's schema."""
        found = {name for name in (self.moves, self.tallies) if name}
        for alternative in self.alternatives:
            found |= {operand.name for operand in alternative.operands}
            found |= {alternative.condition} if alternative.condition else set()
        for clause in self.clauses:
            found |= {clause.condition} if clause.condition else set()
            if clause.argument:
                found.add(clause.words[0])
            elif clause.keyword in ("span", "pick", "sizes", "chunk", "length", "look"):
                found |= set(clause.words)
            elif clause.keyword in ("shape", "times", "ignore", "pass", "last", "count", "only"):
                found.add(clause.words[0])
            elif clause.keyword in ("slide", "recur"):
                found |= set(clause.words[2:])
            elif clause.keyword in ("factor", "told", "place"):
                found.add(clause.words[1])
        return {name.partition(".")[0] for name in found}


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                position += len(text[position:]) - len(text[position:].lstrip())
                self.fail("unexpected character", position)
            self.tokens.append((match.group(1), match.start(1)))
            position = match.end()
        self.at = 0

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        if position is None:
            position = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        raise RuleError(f"rule does not parse: {message}\n  {self.text}\n  {' ' * position}^")

    def peek(self) -> str | None:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            self.fail(f"expected {expected!r}" if expected else "unexpected end")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() == token:
            self.at += 1
            return True
        return False

    def name(self) -> str:
        token = self.peek()
        if token is None or not re.fullmatch(r"[A-Za-z_]\w*(\.\d+)?", token):
            self.fail("expected a name")
        return self.take()

    def letter(self, pattern: str, found: list[str | tuple[str, str]]) -> str:
        token = self.peek()
        if token is None or not re.fullmatch(pattern, token):
            self.fail("expected a letter, '(', '...' or ']'")
        if token in letters_of(tuple(found)):
            self.fail(f"{token!r} stands twice in one tensor")
        return self.take()

    def dims(self) -> Dims:
        self.take("[")
        found: list[str | tuple[str, str]] = []
        while not self.accept("]"):
            if self.accept("("):
                first = self.letter(r"[A-Za-z_]\w*", found)
                found.append((first, self.letter(r"[A-Za-z_]\w*", [*found, first])))
                self.take(")")
            else:
                found.append(self.letter(r"\.\.\.|[A-Za-z_]\w*\*?", found))
        return tuple(found)

    def alternative(self) -> Alternative:
        operands = [Operand(self.name(), self.dims())]
        while self.accept(","):
            operands.append(Operand(self.name(), self.dims()))
        self.take("->")
        results = [self.dims()]
        while self.accept(","):
            results.append(self.dims())
        known = {letter for operand in operands for letter in letters_of(operand.dims)}
        kept = {letter for dims in results for letter in letters_of(dims)}
        added = next((letter for letter in kept if letter not in known), None)
        if added is not None and not known <= kept:
            self.fail(f"{added!r} stands in a result but in no operand")
        return Alternative(tuple(operands), tuple(results), self.name() if self.accept("if") else None)

    def clause(self) -> Clause:
        keyword = self.peek()
        if keyword not in _CLAUSES:
            self.fail(f"expected one of {', '.join(sorted(_CLAUSES))}")
        self.at += 1
        argument = self.accept("@")
        if argument and keyword not in _WITH_ARGUMENT:
            self.fail(f"'@' is not allowed after {keyword!r}")
        words, condition = [self.take()], None
        while self.peek() not in (None, ";", "if"):
            words.append(self.take())
        if self.peek() == "if" and keyword not in _CONDITIONAL:
            self.fail(f"'if' is not allowed after {keyword!r}")
        if self.accept("if"):
            condition = self.name()
        numbered = {"choose": words[1:], "pass": words[1:], "told": words[2:]}.get(str(keyword), [])
        if any(word not in ORDINALS for word in numbered):
            self.fail(f"{keyword!r} counts as {' or '.join(ORDINALS)}")
        if keyword in ("gates", "only", "align") and not words[-1].isdecimal():
            self.fail(f"{keyword!r} ends in a number")
        if len(words) not in _CLAUSES[str(keyword)]:
            self.fail(
                f"{keyword!r} takes {' or '.join(map(str, _CLAUSES[str(keyword)]))} word(s), not {len(words)}"
            )
        return Clause(str(keyword), tuple(word for word in words if word != "="), argument, condition)

    def rule(self) -> Rule:
        moves, tallies, alternatives = None, None, []
        creates = self.peek() == "create"
        if self.peek() in ("check", "create"):
            self.take()
        elif self.peek() == "move":
            self.take()
            moves = self.name()
        elif self.peek() == "tally":
            self.take()
            tallies = self.name()
        else:
            alternatives.append(self.alternative())
            while self.accept("|"):
                alternatives.append(self.alternative())
        clauses = []
        while self.accept(";"):
            clauses.append(self.clause())
        if self.peek() is not None:
            self.fail("expected ';' or the end")
        rule = Rule(moves, tuple(alternatives), tuple(clauses), creates, tallies)
        if creates and not rule.all("shape"):
            self.fail("'create' needs the clause 'shape', which says what argument holds the sizes")
        return rule


@cache
def parse(text: str) -> Rule:
    """Parse one rule.

    Raises:
        RuleError: with the rule, a caret under the place, and what was expected there.
    """
    return _Parser(text).rule()
