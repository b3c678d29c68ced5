"""What ``choose``, ``add``, ``pass`` and ``tally`` claim of a router's operators: one that is never chosen
may as well not be there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasp_fx.patterns import ORDINALS, Clause, Rule

from ...base._tolerable import tolerable
from ._calls import Call, same
from ._claims import Lie
from ._draw import Draw


def routed(rule: Rule, call: Call, draw: Draw) -> Lie | None:
    """Hold these clauses against the operator on one call."""
    for clause in rule.clauses:
        lie = None
        if clause.keyword in ("choose", "add"):
            lie = _without_one(rule, clause, call, draw)
        elif clause.keyword == "pass":
            lie = _passed(clause, call)
        if lie is not None:
            return lie
    return None


def _without_one(rule: Rule, clause: Clause, call: Call, draw: Draw) -> Lie | None:
    """Positions at -inf (``choose``) or zero (``add``) against positions taken out."""
    name = rule.alternatives[0].operands[0].name
    shape, dim = call.arguments[name].shape, call.arguments.get(clause.words[0])
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if not isinstance(dim, int) or not shape or shape[dim] < 2 or call.arguments.get("largest") is False:
        return None
    plain = {key: None if key == "dtype" else value for key, value in call.arguments.items()}
    if "sorted" in plain:  # unsorted, the order of what is chosen is nobody's promise
        plain["sorted"] = True
    distinct = (
        torch.randperm(shape.numel(), generator=draw.generator).reshape(shape).to(torch.float64)
        / shape.numel()
        + 0.5
    )
    gone = draw.integer(0, shape[dim] - 1)
    left = torch.tensor([at for at in range(shape[dim]) if at != gone])
    silent = distinct.index_fill(
        dim, torch.tensor([gone]), float("-inf") if clause.keyword == "choose" else 0.0
    )
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
    if counted < 2 or results[0].shape[-1] != counted:
        return (
            None
            if counted < 2
            else Lie(
                call, "the last dimension has a position for each number", f"it has {results[0].shape[-1]}"
            )
        )
    gone = draw.integer(0, counted - 1)
    others = torch.where(numbers == gone, (gone + 1) % counted, numbers)
    fewer: dict[str, Any] = {str(rule.tallies): others - (others > gone).to(others.dtype)}
    for keyword, amount in (("count", counted - 1), ("last", counted - 2)):
        fewer |= {clause.words[0]: amount for clause in rule.all(keyword)}
    if fewer.get("max") == fewer.get("min", call.arguments.get("min", 0)):
        return None  # one number alone: the operator would look for the range itself
    whole, part = call.with_(**{str(rule.tallies): others}).run()[0], call.with_(**fewer).run()[0]
    left = torch.tensor([at for at in range(counted) if at != gone])
    return (
        None
        if same(whole.index_select(-1, left), part)
        else Lie(call, f"tally {rule.tallies}", f"without number {gone} the result is another one")
    )
