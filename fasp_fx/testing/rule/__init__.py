"""Hold a rule against the operator it describes, by brute force over small shapes and arguments."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

from torch import Tensor

from fasp_fx import patterns
from fasp_fx.base import OpOverload, schema_of, silent_fake_tensors, tolerable
from fasp_fx.errors import ArgumentError, RuleError
from fasp_fx.patterns import Rule

from .._case import CheckFailed
from ._calls import KINDS, Call, Draw, filled, lettered, moving, repeatable
from ._claims import Lie, Trials, lies
from ._clauses import creates, looked, moves, routed, tallies
from ._reading import Mismatch, Unspoken, read
from ._rewritten import rewritten
from ._samples import FIXED, SAMPLES

RIGHT, TOO_MUCH, TOO_LITTLE = "right", "claims too much", "claims too little"

#: how often a clause must have been tried before it is called needless
_LEAST = 8
#: how many calls are drawn for one that the operator takes
_PATIENCE = 60
#: how many calls are drawn in search of a smaller counter-example
_SEARCH = 120


@dataclass(frozen=True)
class CounterExample:
    """The smallest call found that shows what is wrong with a rule.

    Attributes:
        call: the operator and its arguments; tensors print as their shapes.
        arguments: the arguments themselves, by name.
        claim: what the rule says of this call.
        fact: what is the case, with the positions that show it.
    """

    call: str
    arguments: dict[str, Any]
    claim: str
    fact: str

    def __str__(self) -> str:
        return f"{self.call}\n  claim: {self.claim}\n  fact:  {self.fact}"


@dataclass(frozen=True)
class RuleVerdict:
    """What was found out about one rule.

    Attributes:
        operator: the operator's name.
        rule: the rule as one line.
        kind: ``"right"``, ``"claims too much"`` (it would prune wrongly) or ``"claims too little"`` (it
            freezes what could be pruned).
        examples: how many calls the rule was held against.
        pruned: in how many of them something was prunable, and was pruned and compared.
        counter: the smallest call that shows that it claims too much.
        needless: clauses that the operator does not need, if it claims too little.
        seed: what the calls were drawn with.
        refused: calls around which the library's verifier refused a pruned program that was right. That is no
            fault of the rule.

    Examples:
        >>> verdict = fasp_fx.testing.check_rule(torch.ops.aten.relu.default, examples=5)
        >>> print(verdict.kind)
        right
    """

    operator: str
    rule: str
    kind: str
    examples: int
    pruned: int
    counter: CounterExample | None = None
    needless: tuple[str, ...] = ()
    seed: int = 0
    refused: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the rule is right."""
        return self.kind == RIGHT

    def __str__(self) -> str:
        head = (
            f"{self.operator}: '{self.rule}' {'is' if self.ok else ''}{' ' if self.ok else ''}{self.kind}"
            f" ({self.examples} calls, seed {self.seed})"
        )
        if self.counter is not None:
            return f"{head}\n{self.counter}"
        needless = f": the operator does not need '{'; '.join(self.needless)}'" if self.needless else ""
        return f"{head}{needless}"


def check_rule(
    operator: OpOverload,
    rule: str | Rule | None = None,
    *,
    examples: int = 100,
    seed: int = 0,
    samples: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None = None,
    programs: float = 1.0,
) -> RuleVerdict:
    """Hold a rule against the real operator.

    Three things are done with every call that is made up: the claims of the letters are tested (positions
    taken out of the operands go out of the result, contracted positions may be zeros instead), data movement
    is compared with where unique numbers went, and a program of the one operator is pruned and compared with
    the masked one.

    Args:
        operator: an exact overload, such as ``torch.ops.aten.linear.default``.
        rule: the rule to check; ``None`` checks the one in force.
        examples: how many calls to make up.
        seed: what they are drawn with.
        samples: calls ``(args, kwargs)`` to use instead, for operators with arguments of their own kind.
        programs: around which share of the calls to prune a program; the rest of a check takes a tenth of the
            time.

    Returns:
        The verdict; it is not raised (see :func:`assert_rule`).

    Raises:
        RuleError: the rule does not parse (with a caret under the place), names an argument that the operator
            lacks, or there is none.
        ArgumentError: no call could be made up; give some as ``samples``.

    Examples:
        >>> from fasp_fx.testing import check_rule
        >>> check_rule(torch.ops.aten.softmax.int, "self[...] -> [...]", examples=10).kind
        'claims too much'
    """
    if not isinstance(operator, OpOverload):
        raise RuleError(
            f"{operator!r} is not an exact overload; pass for example torch.ops.aten.linear.default"
        )
    if examples < 1:
        raise ArgumentError(f"examples={examples} must be at least 1")
    # Calls that an operator refuses are drawn anew; torch need not speak of them.
    with (
        mock.patch.dict(patterns._registry._USER),
        silent_fake_tensors(),
        warnings.catch_warnings(action="ignore"),
    ):
        known = patterns.lookup(operator) if rule is None else patterns.register(operator, str(rule))
        if known is None:
            raise RuleError(f"there is no rule for {operator}; pass one, or register it first")
        return _Check(operator, known, seed, samples, programs).run(examples)


def assert_rule(operator: OpOverload, rule: str | Rule | None = None, **options: Any) -> RuleVerdict:
    """:func:`check_rule`, but a rule that is not right is an error.

    Raises:
        CheckFailed: the rule claims too much or too little; carries the verdict.

    Examples:
        >>> verdict = fasp_fx.testing.assert_rule(torch.ops.aten.relu.default, examples=5)
    """
    verdict = check_rule(operator, rule, **options)
    if not verdict.ok:
        raise CheckFailed(verdict)
    return verdict


class _Check:
    """One rule held against one operator."""

    def __init__(
        self,
        operator: OpOverload,
        rule: Rule,
        seed: int,
        samples: Sequence[tuple[Sequence[Any], dict[str, Any]]] | None,
        programs: float,
    ) -> None:
        self.operator, self.rule, self.seed, self.programs = operator, rule, seed, programs
        self.given = [self._named(args, kwargs) for args, kwargs in samples] if samples is not None else None
        self.trials = Trials(list)
        self.misfit: Lie | None = None
        self.refused: list[str] = []
        self.tried = self.pruned = 0

    def _named(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        names = [argument.name for argument in schema_of(self.operator).arguments]
        if len(args) > len(names) or any(name not in names for name in kwargs):
            raise ArgumentError(
                f"the sample {tuple(args)!r}, {kwargs!r} does not fit {schema_of(self.operator)}"
            )
        return filled(self.operator, {**dict(zip(names, args, strict=False)), **kwargs}, Draw(self.seed))

    def run(self, examples: int) -> RuleVerdict:
        """Try calls, smaller ones first; of what shows a fault, look for the smallest."""
        if not (self.rule.moves or self.rule.alternatives or self.rule.creates or self.rule.tallies):
            return self._silent()
        for index in range(len(self.given) if self.given is not None else examples):
            worst = self._try(index, most=2 + (3 * index) // max(examples, 1))
            if worst is not None:
                return self._verdict(TOO_MUCH, self._smaller(worst))
        needless = _needless(self.trials)
        return self._verdict(TOO_LITTLE if needless or self.misfit else RIGHT, self.misfit, needless)

    def _silent(self) -> RuleVerdict:
        """``check`` says that nothing comes back that could carry channels."""
        kinds = [str(result.type) for result in schema_of(self.operator).returns]
        returned = ", ".join(kind for kind in kinds if "Tensor" in kind)
        self.tried, claim = 1, "the operator returns nothing that carries channels"
        lie = Lie(Call(self.operator, {}), claim, f"it returns {returned}") if returned else None
        return self._verdict(RIGHT if lie is None else TOO_MUCH, lie)

    def _verdict(self, kind: str, lie: Lie | None, needless: tuple[str, ...] = ()) -> RuleVerdict:
        return RuleVerdict(
            str(self.operator),
            str(self.rule),
            kind,
            self.tried,
            self.pruned,
            None
            if lie is None
            else CounterExample(str(lie.call), dict(lie.call.arguments), lie.claim, lie.fact),
            needless,
            self.seed,
            tuple(self.refused),
        )

    def _smaller(self, worst: Lie) -> Lie:
        """Look for a smaller call with a fault."""
        if self.given is not None:
            lies = [lie for index in range(len(self.given)) if (lie := self._try(index, 2)) is not None]
            return min(lies, key=lambda lie: lie.weight, default=worst)
        found = 0
        for attempt in range(_SEARCH):
            if attempt - found > _SEARCH // 3:
                break
            lie = self._try(
                1_000_000 + attempt, most=2 + (2 * attempt) // _SEARCH, no_larger_than=worst.call.size
            )
            if lie is not None and lie.weight < worst.weight:
                worst, found = lie, attempt
        return worst

    def _try(self, index: int, most: int, no_larger_than: tuple[int, int, int] | None = None) -> Lie | None:
        """One call: what the rule says of it, and a program around it."""
        draw = Draw((self.seed * 7_919 + index) % 2**31, min(most, 4))
        call = (
            self.given[index]
            if self.given is not None
            else self._draw(draw, index, _PATIENCE if no_larger_than is None else 3)
        )
        if call is None or (no_larger_than is not None and call.size > no_larger_than):
            return None
        try:
            results = call.run()
        except tolerable(Exception) as problem:
            raise ArgumentError(f"the operator refuses {call}: {problem}") from problem
        self.tried += 1
        lie = self._claims(call, results, draw)
        if lie is not None or not draw.flag(self.programs):
            return lie
        outcome = rewritten(self.rule, call, results, draw)
        self.pruned += outcome.pruned
        if outcome.refusal is not None:
            self.refused.append(outcome.refusal)
        return outcome.lie

    def _claims(self, call: Call, results: list[Tensor], draw: Draw) -> Lie | None:
        if self.rule.moves:
            return moves(self.rule, call, draw, self.trials)
        if self.rule.creates:
            return creates(call, results)
        if self.rule.tallies:
            return tallies(self.rule, call, results, draw)
        try:
            reading = read(self.rule, call, results)
        except Unspoken:
            return None  # such a call freezes what the operator touches, as the rule's ``only`` asks
        except Mismatch as problem:
            # The analysis does not use such a rule for this call and freezes what the operator touches: too
            # little, not too much.
            if self.misfit is None or call.size < self.misfit.call.size:
                claim = "the letters spell the dimensions of operands and results"
                self.misfit = Lie(call, claim, f"{problem}; the rule is not used for such a call")
            return None
        return (
            next(filter(None, lies(reading, results, draw, self.trials)), None)
            or routed(self.rule, call, draw)
            or looked(self.rule, call, draw)
        )

    def _draw(self, draw: Draw, index: int, patience: int) -> Call | None:
        """A call that the operator takes, and to which it gives the same result twice."""
        draw.kind = self.kinds[index % len(self.kinds)]
        return next(filter(None, (self._made_up(draw) for _ in range(patience))), None)

    def _made_up(self, draw: Draw) -> Call | None:
        name = str(self.operator)
        fixed = FIXED.get(name, {})
        try:
            if name in SAMPLES:
                call = filled(self.operator, {**SAMPLES[name](draw), **fixed}, draw)
            else:
                calls = moving if self.rule.moves else lettered
                call = calls(self.operator, self.rule, draw).with_(**fixed)
            numbers = [result for result in call.run() if result.numel()]
            if self.rule.creates:
                # What memory happens to hold (``empty``) may differ, and be no number.
                return call if numbers else None
            some = numbers and not all(bool(result.isnan().all()) for result in numbers)
            return call if some and repeatable(call) else None
        except tolerable(Exception):
            return None

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of numbers that the operator takes."""
        kinds = []
        for number, kind in enumerate(KINDS):
            draw = Draw(self.seed + number, 3, kind)
            if any(self._made_up(draw) is not None for _ in range(_PATIENCE)):
                kinds.append(kind)
            if kind == "above" and kinds:
                break  # real numbers will do
        if not kinds:
            raise ArgumentError(
                f"no call of {self.operator} could be made up from its schema {schema_of(self.operator)};"
                " give some as samples=[(args, kwargs), …]"
            )
        return kinds


def _needless(trials: Trials) -> tuple[str, ...]:
    """The clauses that were tried often and never needed."""
    return tuple(
        clause for clause, outcomes in trials.items() if len(outcomes) >= _LEAST and not any(outcomes)
    )
