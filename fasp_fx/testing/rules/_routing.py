"""What clauses claim of operators around a router: what is never chosen, named or counted may as well not be
there.

``look`` speaks of integers that name positions, ``choose`` and ``add`` of scores, ``pass`` of integers that
come back, ``tally`` of integers that are counted. Integers of which a rule says nothing are held against
``look`` as well: where the operator always keeps it, the rule says too little, and what a router names would
be frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import first_line
from fasp_fx.patterns import ORDINALS, Clause, Rule

from ._calls import Call, same
from ._claims import Lie, Modesty
from ._draw import Draw


def _distinct(shape: torch.Size, draw: Draw) -> Tensor:
    """Numbers of which no two are equal, from 0.5 to 1.5."""
    order = torch.randperm(shape.numel(), generator=draw.generator)
    return order.reshape(shape).to(torch.float64) / shape.numel() + 0.5


def _others(size: int, gone: int) -> Tensor:
    return torch.tensor([at for at in range(size) if at != gone])


def looked(rule: Rule, call: Call, draw: Draw, missing: Modesty) -> Lie | None:
    """Hold the clauses of a rule against the operator on one call, and note in ``missing`` the clauses that
    it could have had.
    """
    stated = rule.all("look")
    for clause in stated:
        fact = _without_unnamed(rule, clause, call, draw)
        if fact:
            return Lie(call, str(clause), fact)
    for clause in _possible(rule, call):
        if clause not in stated:
            fact = _without_unnamed(rule, clause, call, draw)
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


def _without_unnamed(rule: Rule, clause: Clause, call: Call, draw: Draw) -> str | None:
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
    distinct, left = _distinct(shape, draw), _others(size, gone)
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


def routed(rule: Rule, call: Call, draw: Draw) -> Lie | None:
    """Hold these clauses against the operator on one call."""
    for clause in rule.clauses:
        lie = None
        if clause.keyword in ("choose", "add"):
            lie = _without_unchosen(rule, clause, call, draw)
        elif clause.keyword == "pass":
            lie = _passed(clause, call)
        if lie is not None:
            return lie
    return None


def _without_unchosen(rule: Rule, clause: Clause, call: Call, draw: Draw) -> Lie | None:
    """Positions at -inf (``choose``) or zero (``add``) against positions taken out."""
    name = rule.alternatives[0].operands[0].name
    shape, dim = call.arguments[name].shape, call.arguments.get(clause.words[0])
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or not shape or shape[dim] < 2 or call.arguments.get("largest") is False:
        return None
    plain = {key: None if key == "dtype" else value for key, value in call.arguments.items()}
    if "sorted" in plain:  # unsorted, the order of what is chosen is nobody's promise
        plain["sorted"] = True
    distinct, gone = _distinct(shape, draw), draw.integer(0, shape[dim] - 1)
    left, least = _others(shape[dim], gone), float("-inf") if clause.keyword == "choose" else 0.0
    silent = distinct.index_fill(dim, torch.tensor([gone]), least)
    call = Call(call.operator, {**plain, name: silent})
    smaller = call.with_(**{name: distinct.index_select(dim, left)})
    try:
        before, after = call.run(), smaller.run()
    except tolerable(Exception):  # more are asked for than are left
        return None
    named = ORDINALS[clause.words[1]] if len(clause.words) > 1 else None
    for index, (whole, part) in enumerate(zip(before, after, strict=True)):
        expected = whole
        if index == named:
            expected = whole - (whole > gone).to(whole.dtype)
        elif whole.dim() == len(shape) and whole.shape != part.shape:
            expected = whole.index_select(dim, left)
        if not same(expected, part) or (index == named and bool((whole == gone).any())):
            return Lie(call, str(clause), f"result {index} is another one without position {gone}")
    return None


def _passed(clause: Clause, call: Call) -> Lie | None:
    """The integers of an argument come back in one of the results."""
    source = call.arguments[clause.words[0]]
    numbers = torch.arange(source.numel()).reshape(source.shape)
    try:
        found = call.with_(**{clause.words[0]: numbers}).run()[ORDINALS[clause.words[1]]]
    except tolerable(Exception):  # not on integers
        return None
    if found.dtype in (torch.bool, torch.uint8, torch.int8) or torch.equal(
        found.reshape(-1).to(torch.int64).sort().values, numbers.reshape(-1)
    ):
        return None
    return Lie(call, str(clause), "other integers come back")


def tallies(rule: Rule, call: Call, results: list[Tensor], draw: Draw) -> Lie | None:
    """A number that does not occur may as well not be counted: the result lacks one position, and is the same
    otherwise.
    """
    numbers = call.arguments[str(rule.tallies)]
    counted = int(call.arguments[rule.all("count")[0].words[0]])
    if counted < 2:
        return None
    if results[0].shape[-1] != counted:
        claim = "the last dimension has a position for each number"
        return Lie(call, claim, f"it has {results[0].shape[-1]}")
    gone = draw.integer(0, counted - 1)
    others = torch.where(numbers == gone, (gone + 1) % counted, numbers)
    fewer: dict[str, Any] = {str(rule.tallies): others - (others > gone).to(others.dtype)}
    for keyword, amount in (("count", counted - 1), ("last", counted - 2)):
        fewer |= {clause.words[0]: amount for clause in rule.all(keyword)}
    if fewer.get("max") == fewer.get("min", call.arguments.get("min", 0)):
        return None  # one number alone: the operator would look for the range itself
    whole, part = call.with_(**{str(rule.tallies): others}).run()[0], call.with_(**fewer).run()[0]
    if same(whole.index_select(-1, _others(counted, gone)), part):
        return None
    return Lie(call, f"tally {rule.tallies}", f"without number {gone} the result is another one")
