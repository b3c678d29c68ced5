"""What ``move x`` claims: every element of the result is one of ``x``, or the same whatever ``x`` holds; and
which one does not depend on the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasp_fx.base._tolerable import tolerable
from fasp_fx.errors import first_line
from fasp_fx.patterns import Rule

from ._calls import Call
from ._claims import Lie, Modesty
from ._draw import Draw

#: elements are numbered from here, so that constants such as padding are told from them
_FIRST = 1000


def moves(rule: Rule, call: Call, draw: Draw, modesty: Modesty) -> Lie | None:
    """Hold a moving rule against the operator on one call."""
    assert rule.moves is not None
    claim = f"the operator only moves elements of '{rule.moves}'"
    source = call.arguments[rule.moves]
    total = _count(source)
    numbers, other = (
        torch.arange(total) + _FIRST,
        torch.randperm(total, generator=draw.generator) + _FIRST + 3 * total,
    )
    try:
        moved = _filled(call, rule.moves, numbers).run()
    except tolerable(Exception) as problem:
        return Lie(
            call, claim, f"it does not take integers, on which it has to be run: {first_line(problem)}"
        )
    again = _filled(call, rule.moves, other).run()
    for index, (first, second) in enumerate(zip(moved, again, strict=True)):
        if first.shape != second.shape:
            return Lie(call, claim, f"the shape of result {index} depends on the values")
        flat, flat_other = first.reshape(-1).long(), second.reshape(-1).long()
        inside = (flat >= _FIRST) & (flat < _FIRST + total)
        expected = (
            torch.where(inside, other[(flat - _FIRST).clamp(0, max(total - 1, 0))], flat) if total else flat
        )
        wrong = (flat_other != expected) & (flat_other != flat)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            return Lie(call, claim, f"element {at} of result {index} is no element of '{rule.moves}'")
    found = call.run()
    for index, (real, first) in enumerate(zip(found, moved, strict=True)):
        values = _flat(source).to(real.dtype)
        flat = first.reshape(-1).long()
        inside = (flat >= _FIRST) & (flat < _FIRST + total)
        if bool((real.reshape(-1)[inside] != values[flat[inside] - _FIRST]).any()):
            return Lie(
                call,
                claim,
                f"result {index} holds other elements of '{rule.moves}' than it does for integers",
            )
    if isinstance(source, Tensor):
        for clause in rule.all("freeze"):
            needed = _needed(call, rule.moves, source, clause.words[0], moved, draw)
            if needed is not None:
                modesty.note(str(clause), needed)
    return None


def _count(source: Any) -> int:
    return source.numel() if isinstance(source, Tensor) else sum(item.numel() for item in source)


def _flat(source: Any) -> Tensor:
    return (
        source.reshape(-1) if isinstance(source, Tensor) else torch.cat([item.reshape(-1) for item in source])
    )


def _filled(call: Call, name: str, numbers: Tensor) -> Call:
    source = call.arguments[name]
    if isinstance(source, Tensor):
        return call.with_(**{name: numbers.reshape(source.shape)})
    filled, at = [], 0
    for item in source:
        filled.append(numbers[at : at + item.numel()].reshape(item.shape))
        at += item.numel()
    return call.with_(**{name: filled})


def _needed(
    call: Call, name: str, source: Tensor, argument: str, moved: list[Tensor], draw: Draw
) -> bool | None:
    """Whether taking positions along a frozen dimension out of the source, arguments unchanged, is not taking
    them out of the result.
    """
    value = call.arguments.get(argument)
    dims = (
        [dim for dim, index in enumerate(value) if index is not None]
        if isinstance(value, (list, tuple))
        else [int(value)]
        if value is not None
        else []
    )
    dims = [dim for dim in dims if source.shape[dim] > 1]
    if not dims:
        return None
    dim = draw.choice(dims)
    left = torch.tensor(draw.some(range(source.shape[dim]), least=1)[: source.shape[dim] - 1])
    numbers = torch.arange(_FIRST, _FIRST + source.numel()).reshape(source.shape)
    kept = numbers.index_select(dim, left)
    try:
        found = call.with_(**{name: kept}).run()
    except tolerable(Exception):
        return True
    for before, after in zip(moved, found, strict=True):
        flat = before.reshape(-1)
        expected = flat[torch.isin(flat, kept)]
        if (
            after.dim() != before.dim()
            or after.numel() != expected.numel()
            or not torch.equal(after.reshape(-1), expected)
        ):
            return True
    return False
