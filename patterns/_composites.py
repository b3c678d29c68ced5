"""Graph patterns that name compositions of operators, so that reasons speak of norms and attention rather
than of a mean and a product.

A pattern is an expression over operator names::

    mul(x, rsqrt(add(mean(pow(x)))))

``NAME(…)`` matches a call of an operator of that name (``(a | b)(…)`` of either), whose inputs match the
arguments, in any order, each by an input of its own; a bare letter matches any node, the same one wherever
it stands; ``~`` before an argument lets it be reached through pointwise operators, casts and views.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import permutations

from torch import fx

from fasp_fx.base import OpOverload, schema_of

from ._registry import lookup

COMPOSITES: dict[str, str] = {
    "RMS norm": "mul(x, rsqrt(add(mean(pow(x)))))",
    "layer norm": "(div | mul)(~sub(x, mean(x)), ~(sqrt | rsqrt)(~add(~(mean | var))))",
    "attention": "(matmul | bmm)(~softmax(~(matmul | bmm | baddbmm)(q, k)), v)",
}


def _name(node: fx.Node) -> str:
    return schema_of(node.target).name.rpartition("::")[2] if isinstance(node.target, OpOverload) else ""


def _operators(pattern: ast.expr) -> set[str]:
    """The operators that a pattern, or what it calls, names."""
    return {part.id for part in ast.walk(pattern) if isinstance(part, ast.Name)}


def _match(
    node: fx.Node, pattern: ast.expr, bound: dict[str, fx.Node]
) -> Iterator[tuple[dict[str, fx.Node], frozenset[fx.Node]]]:
    """The ways in which a pattern matches: the nodes that letters stand for, and those that have a name."""
    through = isinstance(pattern, ast.UnaryOp)
    called = pattern.operand if isinstance(pattern, ast.UnaryOp) else pattern
    if isinstance(called, ast.Name) and len(called.id) == 1:
        if bound.get(called.id, node) is node:
            yield {**bound, called.id: node}, frozenset()
        return
    called, arguments = (called.func, called.args) if isinstance(called, ast.Call) else (called, [])
    if _name(node) in _operators(called):
        for inputs in permutations(node.all_input_nodes, len(arguments)):
            states = [(bound, frozenset({node}))]
            for source, argument in zip(inputs, arguments, strict=True):
                states = [
                    (b, seen | inner)
                    for before, seen in states
                    for b, inner in _match(source, argument, before)
                ]
            yield from states
    rule = lookup(node.target) if through else None
    if rule is not None and (rule.moves == "self" or rule.pointwise):
        for source in node.all_input_nodes:
            for b, inner in _match(source, pattern, bound):
                yield b, inner | {node}


def find_composites(graph: fx.Graph) -> dict[fx.Node, str]:
    """For every node that is part of a composite, the composite's name."""
    composites: dict[fx.Node, str] = {}
    for name, text in COMPOSITES.items():
        pattern = ast.parse(text, mode="eval").body
        assert isinstance(pattern, ast.Call)
        for node in graph.nodes:
            if node.op == "call_function" and _name(node) in _operators(pattern.func):
                match = next(_match(node, pattern, {}), None)
                if match is not None:
                    composites.update(dict.fromkeys(match[1], name))
    return composites
