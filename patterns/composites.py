"""Graph patterns that name compositions of operators, so that reasons speak of norms and attention rather
than of a mean and a product.

A pattern is an expression over operator names::

    mul(x, rsqrt(add(mean(pow(x)))))

``NAME(…)`` matches a call of an operator of that name (``a/b`` of either), whose inputs match the arguments,
in any order, each by an input of its own; a bare letter matches any node, the same node wherever it stands;
``~`` before an argument lets it be reached through pointwise operators, type conversions and views.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from torch import fx

from fasp_fx.base.compat import OpOverload
from fasp_fx.errors import RuleError

from ._registry import lookup

COMPOSITES: dict[str, str] = {
    "RMS norm": "mul(x, rsqrt(add(mean(pow(x)))))",
    "layer norm": "div/mul(~sub(x, mean(x)), ~sqrt/rsqrt(~add(~mean/var)))",
    "attention": "matmul/bmm(~softmax(~matmul/bmm/baddbmm(q, k)), v)",
}


@dataclass(frozen=True)
class Expression:
    """A parsed pattern: operator names (empty for a letter), arguments, and whether pointwise operators may
    stand before it.
    """

    names: tuple[str, ...]
    letter: str
    arguments: tuple[Expression, ...]
    through: bool


@cache
def parse_expression(text: str) -> Expression:
    """Parse one pattern.

    Raises:
        RuleError: with the pattern and what was left over.
    """
    tokens = re.findall(r"[\w/]+|[(),~]", text)
    found, rest = _expression(tokens, text)
    if rest:
        raise RuleError(f"pattern does not parse: '{''.join(rest)}' is left over in\n  {text}")
    return found


def _expression(tokens: list[str], text: str) -> tuple[Expression, list[str]]:
    through = tokens[:1] == ["~"]
    tokens = tokens[1:] if through else tokens
    if not tokens or not re.fullmatch(r"[\w/]+", tokens[0]):
        raise RuleError(f"pattern does not parse: expected an operator or a letter in\n  {text}")
    head, tokens = tokens[0], tokens[1:]
    if tokens[:1] != ["("]:
        letter = head if len(head) == 1 else ""
        return Expression(() if letter else tuple(head.split("/")), letter, (), through), tokens
    arguments: list[Expression] = []
    while tokens[:1] in (["("], [","]):
        argument, tokens = _expression(tokens[1:], text)
        arguments.append(argument)
    if tokens[:1] != [")"]:
        raise RuleError(f"pattern does not parse: a bracket stays open in\n  {text}")
    return Expression(tuple(head.split("/")), "", tuple(arguments), through), tokens[1:]


def _name(node: fx.Node) -> str:
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, OpOverload) else ""


def _transparent(node: fx.Node) -> bool:
    rule = lookup(node.target)
    if rule is None:
        return False
    pointwise = all(clause.keyword == "pass" for clause in rule.clauses) and all(
        o.dims == ("...",) for a in rule.alternatives for o in a.operands
    )
    return rule.moves == "self" or (bool(rule.alternatives) and pointwise)


def _match(
    node: fx.Node, pattern: Expression, bound: dict[str, fx.Node]
) -> Iterator[tuple[dict[str, fx.Node], frozenset[fx.Node]]]:
    if pattern.letter:
        if bound.get(pattern.letter, node) is node:
            yield {**bound, pattern.letter: node}, frozenset()
        return
    if _name(node) in pattern.names:
        for inputs in permutations(node.all_input_nodes, len(pattern.arguments)):
            states = [(bound, frozenset({node}))]
            for source, argument in zip(inputs, pattern.arguments, strict=True):
                states = [
                    (b, seen | inner)
                    for before, seen in states
                    for b, inner in _match(source, argument, before)
                ]
            yield from states
    if pattern.through and _transparent(node):
        for source in node.all_input_nodes:
            for b, inner in _match(source, pattern, bound):
                yield b, inner | {node}


def find_composites(graph: fx.Graph) -> dict[fx.Node, str]:
    """For every node that is part of a composite, the composite's name."""
    found: dict[fx.Node, str] = {}
    for name, text in COMPOSITES.items():
        pattern = parse_expression(text)
        for node in graph.nodes:
            if node.op == "call_function" and _name(node) in pattern.names:
                match = next(_match(node, pattern, {}), None)
                if match is not None:
                    found.update(dict.fromkeys(match[1], name))
    return found
