"""Invariant 8: the rules of the operators that occur in a model's graph are right."""

from __future__ import annotations

from functools import cache

from fasp_fx import patterns
from fasp_fx.errors import ArgumentError

from ..base.compat import OpOverload
from ._case import Case
from ._verdict import Skipped, hold
from .rule import RuleVerdict, check_rule

#: calls per rule; rules are held against more in the tests of the library itself
_EXAMPLES = 12


def rules_held(case: Case) -> None:
    """No rule of an operator in the graph claims more than the operator keeps."""
    operators = {
        node.target for node in case.captured.module.graph.nodes if isinstance(node.target, OpOverload)
    }
    checked = 0
    for operator in sorted(operators, key=str):
        rule = patterns.lookup(operator)
        if rule is None:
            continue
        verdict = _verdict(operator, str(rule))
        if verdict is not None:
            checked += 1
            hold(verdict.kind != "claims too much", str(verdict))
    if not checked:
        raise Skipped("no operator of the graph has a rule that can be sampled")


@cache
def _verdict(operator: OpOverload, rule: str) -> RuleVerdict | None:
    """The verdict on a rule, once per process; ``None`` for operators of which no call can be made up."""
    try:
        return check_rule(operator, examples=_EXAMPLES)
    except ArgumentError:
        return None
