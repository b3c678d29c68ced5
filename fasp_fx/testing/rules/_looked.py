"""What ``look`` claims of integers that name positions: a position that none of them names may as well not be
there.

Integers of which a rule says nothing are held against the same claim. Where the operator always keeps it, the
rule says too little: what a router names would be frozen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import first_line
from fasp_fx.patterns import Clause, Rule

from ._calls import Call, same
from ._claims import Lie, Modesty
from ._draw import Draw


def looked(rule: Rule, call: Call, draw: Draw, missing: Modesty) -> Lie | None:
    """Hold the clauses of a rule against the operator on one call, and note in ``missing`` the clauses that
    it could have had.
    """
    stated = rule.all("look")
    for clause in stated:
        fact = _without_one(rule, clause, call, draw)
        if fact:
            return Lie(call, str(clause), fact)
    for clause in _possible(rule, call):
        if clause not in stated:
            fact = _without_one(rule, clause, call, draw)
            if fact is not None:
                missing.note(str(clause), needed=bool(fact))
    return None


def _possible(rule: Rule, call: Call) -> Iterator[Clause]:
    """Clauses for tensors of integers that the rule does not speak of."""
    dims = [
        argument.name
        for argument in call.operator._schema.arguments
        if str(argument.type) == "int" and argument.name in ("dim", "axis")
    ]
    spoken = {clause.words[0] for clause in rule.clauses if clause.keyword in ("pass", "ignore")}
    spoken |= {operand.name for alternative in rule.alternatives for operand in alternative.operands}
    for name, value in call.arguments.items():
        if name not in spoken and isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64):
            for dim in dims:
                yield Clause("look", (dim, name))


def _without_one(rule: Rule, clause: Clause, call: Call, draw: Draw) -> str | None:
    """What is wrong with the clause on this call: nothing (``""``), or ``None`` if the call does not show."""
    name = rule.alternatives[0].operands[0].name
    (along, index), shape = clause.words, call.arguments[name].shape
    dim, names = call.arguments[along], call.arguments[index]
    if (
        not isinstance(names, Tensor)
        or not names.numel()
        or not shape
        or not -len(shape) <= dim < len(shape)
        or shape[dim] < 2
    ):
        return None
    size = shape[dim]
    if not 0 <= int(names.min()) <= int(names.max()) < size:
        return (
            f"the integers reach from {int(names.min())} to {int(names.max())}, there are {size} positions"
            f" along dimension {dim}"
        )
    gone = draw.integer(0, size - 1)
    names = torch.where(names == gone, (gone + 1) % size, names)
    distinct = (
        torch.randperm(shape.numel(), generator=draw.generator).reshape(shape).to(torch.float64)
        / shape.numel()
        + 0.5
    )
    left = torch.tensor([at for at in range(size) if at != gone])
    whole = call.with_(**{name: distinct, index: names})
    try:
        before = whole.run()
    except tolerable(Exception):  # not on such numbers
        return None
    try:
        after = whole.with_(
            **{name: distinct.index_select(dim, left), index: names - (names > gone).to(names.dtype)}
        ).run()
    except tolerable(Exception) as problem:
        return f"without position {gone}, which no integer names, the operator refuses: {first_line(problem)}"
    if all(same(a, b) for a, b in zip(before, after, strict=True)):
        return ""
    return f"without position {gone}, which no integer names, the result is another one"


__all__ = ["looked"]
