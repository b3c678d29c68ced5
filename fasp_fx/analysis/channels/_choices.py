"""Integers that name positions: a router's choice of experts, and what becomes of it.

Top-k gives the numbers of the positions chosen. Wherever these go, the channels at those positions are known
to be meant: tallied, looked up in a weight, or met by an operator that makes something else of them, which
freezes the channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fasp_fx.patterns import CASTS, ORDINALS, VANISHING, Clause, DoesNotApplyError

from ._call import Call
from ._facts import Facts
from ._numbering import Axis, Value


def tallied(call: Call, is_followed: bool) -> list[Value]:
    """The result of a tally of named positions, which has those positions.

    Args:
        is_followed: whether what names positions is followed.

    Raises:
        DoesNotApplyError: it tallies anything else.
    """
    source, shape = call.arguments[str(call.rule.tallies)], call.shapes[0]
    if is_followed and isinstance(source, Value) and source.names is not None and shape:
        count, axis = source.names.numel(), Axis.of(source.names.reshape([1] * (len(shape) - 1) + [-1]))
        stated = [(clause.words[0], sum(map(int, clause.words[1:]))) for clause in call.rule.all("count")]
        is_whole = shape[-1] == count and all(call.arguments[name] == count - less for name, less in stated)
        if is_whole and axis is not None:
            return [Value(shape, (axis,), vanishes=True)]
    raise DoesNotApplyError("no number names a position")


def look_up(node: fx.Node, axis: Axis, index: Any, facts: Facts) -> bool:
    """Couple the positions along an axis with those that ``index`` names; whether it names any."""
    if isinstance(index, Value) and index.names is not None and _fits(axis, index.names):
        facts.couple(axis.numbers.reshape(-1), index.names, node)
        return True
    return False


def _fits(axis: Axis, names: Tensor) -> bool:
    return axis.varying() == [axis.dim] and axis.numbers.shape[axis.dim] == names.numel()


def _source(call: Call) -> Any:
    """The argument whose positions a rule speaks of."""
    rule = call.rule
    first = rule.alternatives[0].operands[0].name if rule.alternatives else ""
    return call.arguments.get(rule.moves or first)


def _axes(source: Value, dim: Any) -> list[Axis]:
    """The axes along one dimension, or along all."""
    return list(source.axes) if dim is None else source.at(int(dim) % len(source.shape))


def _looked_up(call: Call, name: str, names: Tensor) -> bool:
    """Whether an argument only names positions of channels, with which its own are then coupled."""
    source = _source(call)
    if not isinstance(source, Value):
        return False
    dims = [
        int(call.arguments[clause.words[0]]) % len(source.shape)
        for clause in call.rule.all("index")
        if clause.words[1] == name
    ]
    if name == "indices" and call.rule.moves:
        dims = [
            dim
            for dim, index in enumerate(call.arguments[name])
            if isinstance(index, Value) and index.names is not None
        ]
    axes = [source.at(dim) for dim in dims]
    return bool(axes) and all(axes) and all(_fits(axis, names) for along in axes for axis in along)


def name_results(
    node: fx.Node, arguments: dict[str, Any], call: Call | None, values: list[Value], facts: Facts
) -> list[Value]:
    """Say which results name positions, and freeze positions that are named to an operator that makes
    something else of them.

    Args:
        call: of an operator that has a rule.
    """
    if call is not None:
        values = vanish(call, values)
        for clause in call.rule.all("choose"):
            _choose(call, clause, values, facts)
    recorded = node.meta.get("val")
    # Of a number as truth nothing is left.
    truth = isinstance(recorded, Tensor) and recorded.dtype == torch.bool
    for name, value in arguments.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            names = item.names if isinstance(item, Value) else None
            if names is not None and (truth or call is None or not _passed(call, name, names, values)):
                facts.say(facts.remarks.frozen, names, f"named by number to {node.target}", node)
    return values


def keep_numbered(call: Call, clauses: list[Clause], facts: Facts) -> None:
    """Positions that a result numbers stay: with one gone, others would have other numbers."""
    source = _source(call)
    for clause in clauses:
        if clause.words[-1] in ORDINALS and isinstance(source, Value) and source.shape:
            why = f"{call.node.target} numbers positions along this dimension"
            facts.freeze(_axes(source, call.arguments[clause.words[0]]), why, call.node)


def vanish(call: Call, values: list[Value]) -> list[Value]:
    """Say which results are zero wherever a router never chooses: its softmax, what is moved from there,
    products with it, and sums of it over something else.
    """
    rule, arguments = call.rule, call.arguments
    zero = {
        name
        for name, value in arguments.items()
        if isinstance(value, Value) and value.vanishes and name != "pad"
    }
    vanishes = (
        (rule.moves in zero and "pad" not in arguments)
        or any(name in zero for name in VANISHING.get(str(call.node.target), ()))
        or any(len(clause.words) == 1 and _competing(call, clause) for clause in rule.all("choose"))
        or any(_stays_zero(call, clause, zero) for clause in rule.all("add"))
        or any(clause.words[0] in zero for clause in rule.all("pass"))
    )
    return [replace(value, vanishes=value.vanishes or vanishes) for value in values]


def _stays_zero(call: Call, clause: Clause, zero: set[str]) -> bool:
    """Whether zeros are added up along dimensions without channels: all of a channel's are zero."""
    source, along = _source(call), call.arguments.get(clause.words[0])
    if call.rule.alternatives[0].operands[0].name not in zero or not clause.argument:
        return False
    rank = len(source.shape)
    summed = {dim % rank for dim in ([along] if isinstance(along, int) else along or range(rank))}
    return bool(source.axes) and not any(summed & set(axis.varying()) for axis in source.axes)


def _competing(call: Call, clause: Clause) -> bool:
    """Whether channels compete: they alone, along the dimension that an argument names."""
    source, dim = _source(call), call.arguments[clause.words[0]]
    return (
        isinstance(source, Value)
        and len(source.axes) == 1
        and isinstance(dim, int)
        and bool(source.at(dim % len(source.shape)))
    )


def _choose(call: Call, clause: Clause, values: list[Value], facts: Facts) -> None:
    source = _source(call)
    if not isinstance(source, Value) or len(clause.words) < 2:
        return
    dim, result = call.arguments[clause.words[0]], ORDINALS[clause.words[1]]
    axes = _axes(source, dim if source.shape else None)
    if dim is not None and len(axes) == 1 and axes[0].varying() == [axes[0].dim]:
        values[result] = replace(values[result], names=axes[0].numbers.reshape(-1))
    else:
        facts.freeze(axes, f"chosen by {call.node.target} in several ways", call.node)


def _passed(call: Call, name: str, names: Tensor, values: list[Value]) -> bool:
    """Whether the rule says what becomes of integers given as argument ``name``; marks the results that hold
    them.
    """
    rule, single = call.rule, not isinstance(call.arguments[name], (list, tuple))
    passed = [ORDINALS[clause.words[1]] for clause in rule.all("pass") if clause.words[0] == name][:1]
    if rule.moves == name and single and "pad" not in call.arguments:
        passed = [*range(len(values))]
    for result in passed:
        values[result] = replace(values[result], names=names)
    counted = rule.tallies == name and any(value.axes for value in values)
    checked = not (rule.moves or rule.alternatives or rule.tallies or rule.creates)
    # Of its other arguments a cast reads type and place alone.
    cast = str(call.node.target) in CASTS and name != "self"
    return bool(passed) or counted or checked or cast or _looked_up(call, name, names)
