"""What rules and clauses without letters claim of one call, held against the operator: that it only moves
elements, that it creates them all alike, and, around a router, that what is never chosen, named or counted
may as well not be there.

``index`` speaks of integers that name positions, ``choose`` and ``add`` of scores, ``pass`` of integers that
come back, ``tally`` of integers that are counted.
"""

from typing import Any

import torch
from torch import Tensor

from fasp_fx.base import tolerable
from fasp_fx.errors import first_line
from fasp_fx.patterns import ORDINALS, Clause, Rule

from ._calls import Call, Draw, same
from ._claims import Lie, Trials, left

#: elements are numbered from here, so that constants such as padding are told from them
_FIRST = 1000


# --- ``move x``: every element of the result is one of ``x``, or the same whatever ``x`` holds; and which one
# does not depend on the values


def moves(rule: Rule, call: Call, draw: Draw, trials: Trials) -> Lie | None:
    """Hold a moving rule against the operator on one call."""
    assert rule.moves is not None
    claim = f"the operator only moves elements of '{rule.moves}'"
    source = call.arguments[rule.moves]
    values = torch.cat([item.reshape(-1) for item in ([source] if isinstance(source, Tensor) else source)])
    total = values.numel()
    numbers = torch.arange(total) + _FIRST
    other = torch.randperm(total, generator=draw.generator) + _FIRST + 3 * total
    try:
        moved = _filled(call, rule.moves, numbers).run()
    except tolerable(Exception) as problem:
        fact = f"it does not take integers, on which it has to be run: {first_line(problem)}"
        return Lie(call, claim, fact)
    again = _filled(call, rule.moves, other).run()
    for index, (first, second, real) in enumerate(zip(moved, again, call.run(), strict=True)):
        if first.shape != second.shape:
            return Lie(call, claim, f"the shape of result {index} depends on the values")
        flat, flat_other = first.reshape(-1).long(), second.reshape(-1).long()
        inside = (flat >= _FIRST) & (flat < _FIRST + total)
        came_from = flat[inside] - _FIRST
        wrong = flat_other != flat
        wrong[inside] &= flat_other[inside] != other[came_from]
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            return Lie(call, claim, f"element {at} of result {index} is no element of '{rule.moves}'")
        if bool((real.reshape(-1)[inside] != values[came_from].to(real.dtype)).any()):
            fact = f"result {index} holds other elements of '{rule.moves}' than it does for integers"
            return Lie(call, claim, fact)
    if isinstance(source, Tensor):
        for clause in rule.all("freeze"):
            needed = _needed(call, rule.moves, source, clause.words[0], moved, draw)
            if needed is not None:
                trials[str(clause)].append(needed)
    return None


def _filled(call: Call, name: str, numbers: Tensor) -> Call:
    """The call with these numbers, one after another, in an argument."""
    source = call.arguments[name]
    if isinstance(source, Tensor):
        return call.with_(**{name: numbers.reshape(source.shape)})
    parts = zip(numbers.split([item.numel() for item in source]), source, strict=True)
    return call.with_(**{name: [part.reshape(item.shape) for part, item in parts]})


def _needed(
    call: Call, name: str, source: Tensor, argument: str, moved: list[Tensor], draw: Draw
) -> bool | None:
    """Whether taking positions along a frozen dimension out of the source, arguments unchanged, is not taking
    them out of the result.
    """
    value = call.arguments.get(argument)
    if isinstance(value, (list, tuple)):
        dims = [dim for dim, index in enumerate(value) if index is not None]
    else:
        dims = [] if value is None else [int(value)]
    dims = [dim for dim in dims if source.shape[dim] > 1]
    if not dims:
        return None
    dim = draw.choice(dims)
    left = torch.tensor(draw.some(range(source.shape[dim]), least=1)[: source.shape[dim] - 1])
    kept = torch.arange(_FIRST, _FIRST + source.numel()).reshape(source.shape).index_select(dim, left)
    try:
        result = call.with_(**{name: kept}).run()
    except tolerable(Exception):
        return True
    return any(
        after.dim() != before.dim()
        or not torch.equal(after.reshape(-1), before[torch.isin(before, kept)].reshape(-1))
        for before, after in zip(moved, result, strict=True)
    )


def creates(call: Call, results: list[Tensor]) -> Lie | None:
    """Hold a creating rule against the operator on one call: the elements of the result are all alike, so
    that any of them can go. What memory happens to hold (``empty``) says nothing.
    """
    for index, result in enumerate(() if "empty" in str(call.operator) else results):
        flat = result.reshape(-1)
        if flat.numel() and not same(flat, flat[:1].expand_as(flat)):
            fact = f"result {index} holds {flat[0].item()} and {flat[flat != flat[0]][0].item()}"
            return Lie(call, "the elements of the result are all alike", fact)
    return None


# --- what a router chooses, names and counts


def _distinct(shape: torch.Size, draw: Draw) -> Tensor:
    """Numbers of which no two are equal, from 0.5 to 1.5."""
    order = torch.randperm(shape.numel(), generator=draw.generator)
    return order.reshape(shape).to(torch.float64) / shape.numel() + 0.5


def looked(rule: Rule, call: Call, draw: Draw) -> Lie | None:
    """Hold what a rule says of integers that an argument holds against the operator on one call."""
    for clause in (clause for clause in rule.all("index") if clause.words[1] not in ORDINALS):
        fact = _without_unnamed(rule, clause, call, draw)
        if fact is not None:
            return Lie(call, str(clause), fact)
    return None


def _without_unnamed(rule: Rule, clause: Clause, call: Call, draw: Draw) -> str | None:
    """What is wrong with the clause on this call; ``None``: nothing, or the call does not show it."""
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
    distinct, others = _distinct(shape, draw), left(size, [gone])
    whole = call.with_(**{name: distinct, index: names})
    try:
        before = whole.run()
    except tolerable(Exception):  # not on such numbers
        return None
    try:
        after = whole.with_(
            **{name: distinct.index_select(dim, others), index: names - (names > gone).to(names.dtype)}
        ).run()
    except tolerable(Exception) as problem:
        return f"without position {gone}, which no integer names, the operator refuses: {first_line(problem)}"
    if all(same(a, b) for a, b in zip(before, after, strict=True)):
        return None
    return f"without position {gone}, which no integer names, the result is another one"


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
    others, least = left(shape[dim], [gone]), float("-inf") if clause.keyword == "choose" else 0.0
    call = Call(call.operator, {**plain, name: distinct.index_fill(dim, torch.tensor([gone]), least)})
    smaller = call.with_(**{name: distinct.index_select(dim, others)})
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
            expected = whole.index_select(dim, others)
        if not same(expected, part) or (index == named and bool((whole == gone).any())):
            return Lie(call, str(clause), f"result {index} is another one without position {gone}")
    return None


def _passed(rule: Rule, clause: Clause, call: Call, draw: Draw) -> Lie | None:
    """The integers of an argument come back in one of the results."""
    source = call.arguments[clause.words[0]]
    numbers = torch.arange(source.numel()).reshape(source.shape)
    try:
        result = call.with_(**{clause.words[0]: numbers}).run()[ORDINALS[clause.words[1]]]
    except tolerable(Exception):  # not on integers
        return None
    if result.dtype in (torch.bool, torch.uint8, torch.int8) or torch.equal(
        result.reshape(-1).to(torch.int64).sort().values, numbers.reshape(-1)
    ):
        return None
    return Lie(call, str(clause), "other integers come back")


_ROUTED = {"choose": _without_unchosen, "add": _without_unchosen, "pass": _passed}


def routed(rule: Rule, call: Call, draw: Draw) -> Lie | None:
    """Hold these clauses against the operator on one call."""
    stated = (clause for clause in rule.clauses if clause.keyword in _ROUTED)
    return next(filter(None, (_ROUTED[clause.keyword](rule, clause, call, draw) for clause in stated)), None)


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
    for name, *less in (clause.words for clause in rule.all("count")):
        fewer[name] = counted - 1 - sum(map(int, less))
    if fewer.get("max") == fewer.get("min", call.arguments.get("min", 0)):
        return None  # one number alone: the operator would look for the range itself
    whole, part = call.with_(**{str(rule.tallies): others}).run()[0], call.with_(**fewer).run()[0]
    if same(whole.index_select(-1, left(counted, [gone])), part):
        return None
    return Lie(call, f"tally {rule.tallies}", f"without number {gone} the result is another one")
