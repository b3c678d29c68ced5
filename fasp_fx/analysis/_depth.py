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

from ._groups import FROZEN, PRUNABLE, Coupling, Group
from .channels import Use, Value

#: the word of ``include=`` for it
DEPTH = "depth"
_ATEN = torch.ops.aten
_SUM = _ATEN.add.Tensor
#: looks at the type of a value and gives nothing
_CHECK = _ATEN._assert_tensor_metadata.default
#: how many operators may stand between a consumer and the sum
_NEAR = 24


def let_blocks_go(analysis: Coupling) -> list[Group]:
    """The groups, of which those that are all there is to a residual block need not keep anything."""
    some = [group.sets for group in analysis.groups if group.status != FROZEN]
    free = np.concatenate([np.zeros(0, dtype=np.int64), *some])
    return [
        replace(group, needed=0) if _is_a_block(group, analysis, free) else group for group in analysis.groups
    ]


def _lines(node: fx.Node, analysis: Coupling, free: np.ndarray) -> set[tuple[int, tuple[int, ...], bytes]]:
    """The channel sets along each dimension of a node's value of which some can go."""
    value = analysis.walk.values.get(node)
    axes = value.axes if isinstance(value, Value) else ()
    lines = [(axis.dim, analysis.labels[axis.numbers.numpy()]) for axis in axes]
    return {(dim, sets.shape, sets.tobytes()) for dim, sets in lines if np.isin(sets, free).any()}


def laid_out(node: fx.Node) -> fx.Node:
    """Where a consumer's output has the shape of the model's activations: behind views that keep its last
    dimension.
    """
    while (
        len(node.users) == 1
        and str((user := next(iter(node.users))).target) in RESHAPES
        and _alike(node, user, -1)
    ):
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
                return others[0] if others[0] < node and not user.kwargs else None
            inside.add(user)
        user = user.next
    return None


def _is_a_block(group: Group, analysis: Coupling, free: np.ndarray) -> bool:
    return (
        group.status == PRUNABLE
        and group.granularity in ("channel", "head")
        and bool(group.uses)
        and not any(slot.kind == "input" for slot in group.slots)  # a cache holds them
        and all(_ends_a_block(use, group, analysis, free) for use in group.uses)
        and _leaves_nothing(group, analysis.program)
    )


def _ends_a_block(use: Use, group: Group, analysis: Coupling, free: np.ndarray) -> bool:
    """Whether a consumer reads channels of the group alone, and ends in a sum."""
    read, end = use.columns[use.columns >= 0], laid_out(use.node)
    return (
        affine(use.node.target) is not None
        and use.route is None
        and bool(np.isin(analysis.labels[read], group.sets).all())
        and {arguments(use.node).get(factor, 1) for factor in ("alpha", "beta")} <= {1}
        and (other := beside(end)) is not None
        # Zeros like the one take its channels along.
        and _lines(end, analysis, free) == _lines(other, analysis, free)
    )


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


def _alike(node: fx.Node, other: fx.Node, first: int = 0) -> bool:
    """Whether two nodes give real numbers of one type, and of one shape from a dimension on."""
    one, two = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(one, Tensor)
        and isinstance(two, Tensor)
        and one.is_floating_point()
        and one.dtype == two.dtype
        and same_sizes(one.shape[first:], two.shape[first:])
    )
