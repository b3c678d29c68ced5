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

from fasp_fx.patterns import ORDINALS, VANISHING, Clause, Rule

from ._facts import Facts
from ._numbering import Axis, Value


def tallied(rule: Rule, arguments: dict[str, Any], shape: tuple[int, ...]) -> list[Value] | None:
    """The result of a tally of named positions, which has those positions; ``None`` if it tallies anything
    else.
    """
    source = arguments[str(rule.tallies)]
    if not isinstance(source, Value) or source.names is None:
        return None
    count = source.names.numel()
    if any(arguments[clause.words[0]] != count for clause in rule.all("count")) or any(
        arguments[clause.words[0]] != count - 1 for clause in rule.all("last")
    ):
        return None
    axis = (
        Axis.of(source.names.reshape([1] * (len(shape) - 1) + [-1])) if shape and shape[-1] == count else None
    )
    return None if axis is None else [Value(shape, (axis,), vanishes=True)]


def look_up(node: fx.Node, axis: Axis, index: Any, facts: Facts) -> bool:
    """Couple the positions along an axis with those that ``index`` names; whether it names any."""
    if not isinstance(index, Value) or index.names is None or not _fits(axis, index.names):
        return False
    facts.couple(axis.numbers.reshape(-1), index.names, node)
    return True


def _fits(axis: Axis, names: Tensor) -> bool:
    return axis.varying() == [axis.dim] and axis.numbers.shape[axis.dim] == names.numel()


def _looked_up(rule: Rule, name: str, arguments: dict[str, Any], names: Tensor) -> bool:
    """Whether an argument only names positions of channels, with which its own are then coupled."""
    source = arguments.get(rule.moves or (rule.alternatives[0].operands[0].name if rule.alternatives else ""))
    if not isinstance(source, Value):
        return False
    dims = [
        int(arguments[clause.words[0]]) % len(source.shape)
        for clause in rule.all("look")
        if clause.words[1] == name
    ]
    if name == "indices" and rule.moves:
        dims = [
            dim
            for dim, index in enumerate(arguments[name])
            if isinstance(index, Value) and index.names is not None
        ]
    return bool(dims) and all(
        bool(source.at(dim)) and all(_fits(axis, names) for axis in source.at(dim)) for dim in dims
    )


def name_results(
    node: fx.Node, rule: Rule | None, arguments: dict[str, Any], values: list[Value], facts: Facts
) -> list[Value]:
    """Say which results name positions, and freeze positions that are named to an operator of which nothing
    is known.
    """
    values = list(values) if rule is None else list(vanish(node, rule, arguments, values))
    for clause in rule.all("choose") if rule is not None else ():
        source = arguments[rule.alternatives[0].operands[0].name] if rule is not None else None
        if len(clause.words) == 2 and isinstance(source, Value):
            _choose(node, source, arguments[clause.words[0]], ORDINALS[clause.words[1]], values, facts)
    for name, value in arguments.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(item, Value) or item.names is None:
                continue
            recorded = node.meta.get("val")
            # Of a number as truth nothing is left.
            truth = isinstance(recorded, Tensor) and recorded.dtype == torch.bool
            if rule is None or truth or not _passed(rule, name, item.names, arguments, values):
                facts.say(facts.frozen, item.names, f"named by number to {node.target}", node)
    return values


def keep_numbered(node: fx.Node, rule: Rule, arguments: dict[str, Any], facts: Facts, followed: bool) -> None:
    """Positions that a result numbers stay: with one gone, others would have other numbers.

    Args:
        followed: whether the numbers of those chosen are followed to where they are used
            (:func:`name_results`).
    """
    named = [
        *rule.all("index"),
        *(clause for clause in rule.all("choose") if len(clause.words) == 2 and not followed),
    ]
    for clause in named:
        source = arguments[rule.alternatives[0].operands[0].name]
        if not isinstance(source, Value) or not source.shape:
            continue
        given = arguments[clause.words[0]]
        axes = source.axes if given is None else source.at(int(given) % len(source.shape))
        facts.freeze(axes, f"{node.target} numbers positions along this dimension", node)


def vanish(node: fx.Node, rule: Rule, arguments: dict[str, Any], values: list[Value]) -> list[Value]:
    """Say which results are zero wherever a router never chooses: its softmax, what is moved from there,
    products with it, and sums of it over something else.
    """
    zero = {
        name
        for name, value in arguments.items()
        if isinstance(value, Value) and value.vanishes and name != "pad"
    }
    moved = rule.moves in zero and "pad" not in arguments
    product = any(name in zero for name in VANISHING.get(str(node.target), ()))
    weighed = any(
        len(clause.words) == 1 and _competing(arguments, rule, clause.words[0])
        for clause in rule.all("choose")
    )
    if (
        moved
        or product
        or weighed
        or any(_stays_zero(arguments, rule, clause, zero) for clause in rule.all("add"))
        or (rule.all("pass") and any(clause.words[0] in zero for clause in rule.all("pass")))
    ):
        return [replace(value, vanishes=True) for value in values]
    return values


def _stays_zero(arguments: dict[str, Any], rule: Rule, clause: Clause, zero: set[str]) -> bool:
    """Whether zeros are added up along dimensions without channels: all of a channel's are zero."""
    name = rule.alternatives[0].operands[0].name
    if name not in zero or not clause.argument:
        return False
    source, along = arguments[name], arguments[clause.words[0]]
    rank = len(source.shape)
    summed = {dim % rank for dim in ([along] if isinstance(along, int) else along or range(rank))}
    return bool(source.axes) and not any(summed & set(axis.varying()) for axis in source.axes)


def _competing(arguments: dict[str, Any], rule: Rule, dim: str) -> bool:
    """Whether channels compete: they alone, along the dimension that argument ``dim`` names."""
    source = arguments[rule.alternatives[0].operands[0].name]
    return (
        isinstance(source, Value)
        and len(source.axes) == 1
        and isinstance(arguments[dim], int)
        and bool(source.at(arguments[dim] % len(source.shape)))
    )


def _choose(
    node: fx.Node, source: Value, dim: int | None, result: int, values: list[Value], facts: Facts
) -> None:
    axes = source.at(dim % len(source.shape)) if source.shape and dim is not None else list(source.axes)
    if dim is not None and len(axes) == 1 and axes[0].varying() == [axes[0].dim]:
        values[result] = replace(values[result], names=axes[0].numbers.reshape(-1))
        return
    facts.freeze(axes, f"chosen by {node.target} in several ways", node)


def _passed(rule: Rule, name: str, names: Tensor, arguments: dict[str, Any], values: list[Value]) -> bool:
    """Whether the rule says what becomes of integers given as argument ``name``; marks the results that hold
    them.
    """
    if rule.moves == name and "pad" not in arguments and not isinstance(arguments[name], (list, tuple)):
        values[:] = [replace(value, names=names) for value in values]
        return True
    for clause in rule.all("pass"):
        if clause.words[0] == name:
            at = ORDINALS[clause.words[1]]
            values[at] = replace(values[at], names=names)
            return True
    known = rule.tallies == name and any(value.axes for value in values)
    looked = _looked_up(rule, name, arguments, names)
    checked = not (rule.moves or rule.alternatives or rule.tallies or rule.creates)
    return known or looked or checked or any(clause.words[0] == name for clause in rule.all("ignore"))
