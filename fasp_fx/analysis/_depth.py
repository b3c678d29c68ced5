"""Residual blocks that can go as a whole: what reads all channels of a group gives zero without them (or its
bias), and is added to a value that is there without it, so that an identity stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.capturing import Program, arguments, attribute, is_pure, same_sizes, target_name
from fasp_fx.patterns import RESHAPES, affine

from ._groups import FROZEN, PRUNABLE, Group
from .channels import Value, Walk

#: the word of ``include=`` for it
DEPTH = "depth"
_ATEN = torch.ops.aten
_SUM = _ATEN.add.Tensor
#: looks at the type of a value and gives nothing
_CHECK = _ATEN._assert_tensor_metadata.default
#: how many operators may stand between a consumer and the sum
_NEAR = 24


def let_blocks_go(groups: list[Group], labels: np.ndarray, program: Program, walk: Walk) -> list[Group]:
    """The groups, of which those that are all there is to a residual block need not keep anything."""
    free = np.concatenate([np.zeros(0, dtype=np.int64), *(g.sets for g in groups if g.status != FROZEN)])
    return [
        replace(group, needed=0) if _is_a_block(group, labels, program, walk, free) else group
        for group in groups
    ]


def _lines(
    node: fx.Node, walk: Walk, labels: np.ndarray, free: np.ndarray
) -> set[tuple[int, tuple[int, ...], bytes]]:
    """The channel sets along each dimension of a node's value of which some can go."""
    value = walk.values.get(node)
    axes = value.axes if isinstance(value, Value) else ()
    lines = [(axis.dim, labels[axis.numbers.numpy()]) for axis in axes]
    return {(dim, sets.shape, sets.tobytes()) for dim, sets in lines if np.isin(sets, free).any()}


def laid_out(node: fx.Node) -> fx.Node:
    """Where a consumer's output has the shape of the model's activations: behind views that keep its last
    dimension.
    """
    while len(node.users) == 1 and str((user := next(iter(node.users))).target) in RESHAPES:
        first, second = _value(node), _value(user)
        if first is None or second is None or not same_sizes(first.shape[-1:], second.shape[-1:]):
            break
        node = user
    return node


def beside(node: fx.Node) -> fx.Node | None:
    """The value that all that is made of a consumer's output ends in a sum with, if it is there before the
    consumer runs and is of its shape and type.

    Before the sum there may be operators (dropout, a norm, a gain): what they make of zeros is what stays of
    the block.
    """
    inside, user = {node}, node.next
    while user.op == "call_function" and len(inside) <= _NEAR:
        if any(read in inside for read in user.all_input_nodes):
            others = [read for read in user.all_input_nodes if read not in inside and _alike(read, node)]
            ends = all(reader is user or reader in inside for one in inside for reader in one.users)
            if user.target is _SUM and _alike(user, node) and len(others) == 1 and ends:
                first = next(one for one in node.graph.nodes if one is node or one is others[0])
                return others[0] if first is others[0] and not user.kwargs else None
            inside.add(user)
        user = user.next
    return None


def _is_a_block(group: Group, labels: np.ndarray, program: Program, walk: Walk, free: np.ndarray) -> bool:
    if group.status != PRUNABLE or group.granularity not in ("channel", "head") or not group.uses:
        return False
    if any(slot.kind == "input" for slot in group.slots):
        return False  # a cache holds them
    for use in group.uses:
        read, end = use.columns[use.columns >= 0], laid_out(use.node)
        if (
            affine(use.node.target) is None
            or use.route is not None
            or not np.isin(labels[read], group.sets).all()
            or not {arguments(use.node).get(factor, 1) for factor in ("alpha", "beta")} <= {1}
            or (other := beside(end)) is None
            # Zeros like the one take its channels along.
            or _lines(end, walk, labels, free) != _lines(other, walk, labels, free)
        ):
            return False
    return _leaves_nothing(group, program)


def serving(ends: Iterable[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """The nodes that serve nothing but some consumers, last ones first: these themselves, what they alone
    need, and what checks that.
    """
    unused = set(ends)
    for node in reversed(graph.nodes):
        needed = {user for user in node.users if user.target is not _CHECK}
        if node not in unused and needed and needed <= unused:
            unused |= {*node.users, node}
    return [node for node in reversed(graph.nodes) if node in unused]


def _leaves_nothing(group: Group, program: Program) -> bool:
    """Whether nothing but vectors is left unused where the consumers of a group give zero, and nothing goes
    that does more than compute.
    """
    whole = {member.name for member in group.members if len(member.indices) == member.size}
    for node in serving({use.node for use in group.uses}, program.module.graph):
        if node.op == "get_attr":
            name = target_name(node)
            weight = attribute(program.module, name)
            origin = program.parts[name].source if name in program.parts else name
            if isinstance(weight, nn.Parameter) and weight.dim() > 1 and origin not in whole:
                return False
        elif node.op != "call_function" or not goes_with_a_block(node):
            return False
    return True


def goes_with_a_block(node: fx.Node) -> bool:
    """Whether nothing but its result is lost with a call that serves a block."""
    return node.target is _CHECK or is_pure(node)


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _alike(node: fx.Node, other: fx.Node) -> bool:
    first, second = _value(node), _value(other)
    return (
        first is not None
        and second is not None
        and first.dtype == second.dtype
        and same_sizes(first.shape, second.shape)
    )
