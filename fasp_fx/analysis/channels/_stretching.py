"""Where an expansion repeats what a weight's channels meet: what is repeated can be repeated less often."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from fasp_fx.patterns import CASTS, lookup

from ...capturing._fx import arguments

#: operators that repeat a dimension of one, and the argument that says how often
_REPEATS = {torch.ops.aten.expand.default: "size", torch.ops.aten.repeat.default: "repeats"}


def stretched(node: fx.Node, dim: int) -> Iterator[tuple[str, int]]:
    """The expansions, each with its dimension, that give a result its size along one dimension: itself, or
    those that it is computed from, element by element or summed up along others.

    Args:
        dim: counted from the end, so that it is the same in whatever is broadcast.
    """
    seen: set[fx.Node] = set()
    reached = [(node, dim)]
    while reached:
        node, dim = reached.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _REPEATS:
            sizes = arguments(node)[_REPEATS[node.target]]
            if isinstance(sizes[dim], int) and sizes[dim] > 1 and _is_one(node.all_input_nodes[0], dim):
                yield node.name, len(sizes) + dim
        else:
            dim = _before(node, dim)
            reached += [(given, dim) for given in node.all_input_nodes if dim and not _is_one(given, dim)]


def _before(node: fx.Node, dim: int) -> int:
    """Which dimension of an operator's operands one of its result's is, both from the end; zero where that is
    not known. Operators are looked at that compute elements from those at the same place, or sum some up.
    """
    rule = lookup(node.target) if node.op == "call_function" else None
    if rule is None:
        return 0
    if str(node.target) in CASTS:
        return dim
    forms = [
        (*alternative.results, *(operand.dims for operand in alternative.operands))
        for alternative in rule.alternatives
    ]
    if not forms or any(dims != ("...",) for form in forms for dims in form):
        return 0
    if not rule.clauses:
        return dim
    if [clause.keyword for clause in rule.clauses] not in (["reduce"], ["reduce", "add"]):
        return 0
    given = arguments(node)
    rank, reduced = _rank(node.all_input_nodes[0]), given[rule.clauses[0].words[0]]
    gone = {at % rank for at in ([reduced] if isinstance(reduced, int) else reduced or range(rank))}
    if given.get("keepdim"):
        return dim if (dim % rank) not in gone else 0
    return [at for at in range(rank) if at not in gone][dim] - rank


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _is_one(node: fx.Node, dim: int) -> bool:
    """Whether a dimension from the end has one position, or is not there. Sizes that vary are not asked: it
    would settle them.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < -dim:
        return True
    size = value.shape[dim]
    return isinstance(size, int) and size == 1


__all__ = ["stretched"]
