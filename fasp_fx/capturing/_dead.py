"""What a graph computes in vain: what nothing reads, and dropouts that are off."""

from __future__ import annotations

import torch
from torch import fx

from ..base.compat import OpOverload
from ._fx import arguments

#: return their input itself in evaluation mode, which functionalising them whole does not know
_DROPOUTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


def remove_dropouts(graph: fx.Graph) -> bool:
    """Let what reads a dropout that is off read its input; whether there was one.

    One that the graph returns stays: what is returned must be no input.
    """
    found = False
    for operator in _DROPOUTS:
        for node in graph.find_nodes(op="call_function", target=operator):
            given = arguments(node)
            if given["train"] is False and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)
                found = True
    return found


def remove_dead(graph: fx.Graph) -> None:
    """Remove what a model computes without using it, such as a statistic that somebody logged once: it would
    keep channels for nothing.

    What draws random numbers stays, since those after it would be others.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and is_pure(node):
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a call does nothing but compute its result, always the same of the same arguments."""
    if isinstance(node.target, OpOverload):
        return not draws(node) and not node.is_impure(impure_random=False)
    return getattr(node.target, "__module__", None) in ("_operator", "operator")


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers. What has a dropout that is off (attention, recurrent layers)
    could, and does not.
    """
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = arguments(node)
    return given.get("dropout_p") != 0.0 and given.get("train") is not False
