"""Which rule belongs to which operator, by exact overload; and the names of compositions of operators."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from fasp_fx.base import HigherOrderOperator, OpOverload, schema_of, tolerable
from fasp_fx.errors import RuleError

from ._grammar import ELLIPSIS, Rule, letters_of, parse
from ._rules import RULES, UNTAGGED, pointwise_rule

#: what a rule can speak of
Operator = OpOverload | HigherOrderOperator

_USER: dict[Operator, Rule] = {}


@cache
def argument_names(operator: object) -> Mapping[str, Any]:
    """The names of an operator's arguments in order, with their defaults (``inspect.Parameter.empty`` where
    there is none).

    They are those of its schema. A higher-order operator has no schema; its names are those of its own
    ``__call__``, if that names each.

    Returns:
        Nothing for what has neither.
    """
    if isinstance(operator, OpOverload):
        return {
            argument.name: argument.default_value if argument.has_default_value() else inspect.Parameter.empty
            for argument in schema_of(operator).arguments
        }
    if not isinstance(operator, HigherOrderOperator):
        return {}
    _, *declared = inspect.signature(type(operator).__call__).parameters.values()
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    is_open = any(parameter.kind in several for parameter in declared)
    return {} if is_open else {parameter.name: parameter.default for parameter in declared}


def name_of(operator: Operator) -> str:
    """The name that the table of rules knows an operator by: ``aten.linear.default``,
    ``higher_order.flex_attention``.
    """
    return str(operator) if isinstance(operator, OpOverload) else f"higher_order.{operator.name()}"


def register(operator: Operator, text: str) -> Rule:
    """Teach the analysis what ``operator`` does to channels, in one line (see :mod:`fasp_fx.patterns`).

    Args:
        operator: an exact overload, for example ``torch.ops.mylib.scale.default``, or a higher-order
            operator.
        text: the rule, for example ``"x[... c], weight[c] -> [... c]"``; names are those of the operator's
            schema, or those that a higher-order operator's ``__call__`` declares.

    Returns:
        The parsed rule, whose ``str`` is the line.

    Raises:
        RuleError: the text does not parse, names an argument that the schema lacks, or ``operator`` is not an
            overload.

    Examples:
        >>> @torch.library.custom_op("docs::scaled", mutates_args=())
        ... def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ...     return x * scale
        >>> print(fasp_fx.patterns.register(torch.ops.docs.scaled.default, "x[... c], scale[c] -> [... c]"))
        x[... c], scale[c] -> [... c]
        >>> fasp_fx.patterns.unregister(torch.ops.docs.scaled.default)
    """
    if not isinstance(operator, Operator):
        raise RuleError(
            f"{operator!r} is not an exact overload; pass for example torch.ops.aten.linear.default"
        )
    rule, known = parse(text), argument_names(operator)
    if unknown := sorted(rule.names() - known.keys()):
        raise RuleError(
            f"rule '{rule}' for {operator} names {unknown}, but the operator's arguments are {sorted(known)}"
        )
    _USER[operator] = rule
    return rule


def unregister(operator: Operator) -> None:
    """Forget a rule given to :func:`register`; a built-in rule that it had replaced is in force again.

    Examples:
        >>> operator = torch.ops.aten.softmax.int
        >>> rule = fasp_fx.patterns.register(operator, "self[...] -> [...]; freeze @dim")
        >>> fasp_fx.patterns.unregister(operator)
        >>> str(fasp_fx.patterns.lookup(operator)) == fasp_fx.patterns.builtin()["aten.softmax.int"]
        True
    """
    _USER.pop(operator, None)


def lookup(operator: object) -> Rule | None:
    """The rule of an operator: the user's, the built-in one, or one derived from ``torch.Tag.pointwise``;
    else ``None``.

    Examples:
        >>> print(fasp_fx.patterns.lookup(torch.ops.aten.linear.default))
        input[... i], weight[o i], bias[o] -> [... o]
    """
    if not isinstance(operator, Operator):
        return None
    if operator in _USER:
        return _USER[operator]
    name = name_of(operator)
    text = RULES.get(name)
    if (
        text is None
        and isinstance(operator, OpOverload)
        and (torch.Tag.pointwise in operator.tags or name in UNTAGGED)
    ):
        text = pointwise_rule(operator)
    return parse(text) if text is not None else None


@dataclass(frozen=True)
class Affine:
    """An operator that sums products of its operands over letters of its rule, and at most adds a bias."""

    bias: str | None


def affine(operator: object) -> Affine | None:
    """What an operator is if it is linear in each of its operands but for a bias; else ``None``.

    The rule says which operand may be the bias: the one that has no letter that is summed over. Whether it is
    added is seen by running the operator: of zeros it gives zeros, and ones where the bias is ones.
    """
    rule = lookup(operator)
    if rule is None or not rule.alternatives or not all(form.summed for form in rule.alternatives):
        return None
    stated = {clause.keyword for clause in rule.clauses}
    return _affine(operator, rule) if stated <= {"factor", "slide", "align"} else None


@cache
def _affine(operator: Any, rule: Rule) -> Affine | None:
    form = rule.alternatives[0]
    biases = [each.name for each in form.operands if not form.summed & {*letters_of(each.dims)}]
    factors = {clause.words[0] for clause in rule.all("factor")}
    tensors = {
        each.name: torch.full(
            [
                math.prod(1 if letter in factors else 2 for letter in letters_of((dim,)))
                for dim in each.dims
                if dim != ELLIPSIS
            ],
            float(each.name in biases),
            device="cpu",
        )
        for each in form.operands
    }
    try:
        result = operator(**tensors)
    except tolerable(Exception):  # it wants other arguments than tensors of this kind
        return None
    seen = isinstance(result, Tensor) and len(biases) < 2 and bool((result == len(biases)).all())
    return Affine(next(iter(biases), None)) if seen else None


def builtin() -> dict[str, str]:
    """Every built-in rule that is written out (not derived), by operator name.

    Examples:
        >>> fasp_fx.patterns.builtin()["aten.linear.default"]
        'input[... i], weight[o i], bias[o] -> [... o]'
    """
    return dict(RULES)


# --- Graph patterns that name compositions of operators, so that reasons speak of norms and attention rather
# than of a mean and a product.


#: expressions over operator names, such as ``mul(x, rsqrt(add(mean(pow(x)))))``: ``NAME(…)`` matches a call
#: of an operator of that name (``(a | b)(…)`` of either), whose inputs match the arguments, in any order,
#: each by an input of its own; a bare letter matches any node, the same one wherever it stands; ``~`` before
#: an argument lets it be reached through pointwise operators, casts and views
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
