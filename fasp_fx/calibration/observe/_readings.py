"""Whether a weight is read in any way besides the one that it would be repaired for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx

from ...analysis._analysis import Analysis
from ...base.compat import pytree
from ...capturing._fx import attribute, way_from_weight
from ._matrices import ConsumerMatrices


def read_otherwise(analysis: Analysis, matrices: ConsumerMatrices) -> str | None:
    """Why a repair of a weight for one reading would change more than this reading, or ``None``.

    A repair minimises the error of a weight as the consumer of one kind of input. It would also change what
    the same entries compute as a producer, as an embedding, or as a consumer read in another way (a
    transposed tied weight).
    """
    weight = matrices.use.weight
    uses = [use for use in analysis.walk.facts.uses if use.weight == weight]
    canonical = analysis.program.canonical()
    names = [
        node
        for node in analysis.program.module.graph.find_nodes(op="get_attr")
        if canonical.get(str(node.target)) == weight
    ]
    inside = {*names, *(node for use in uses for node in way_from_weight(use.operand))}
    for node in inside:
        for user in node.users:
            if (
                user not in inside
                and _computes(user)
                and not any(
                    use.node is user and use.operand is node and use.activation is not node for use in uses
                )
            ):
                return f"it is also read by '{user.name}' ({user.target}), which a repair would change"
    others = [
        other
        for other in (ConsumerMatrices(use, analysis.walk.values) for use in uses)
        if other.key != matrices.key
    ]
    if not others:
        return None
    shape = attribute(analysis.program.module, weight).shape
    own = _places(matrices, shape)
    for other in others:
        if np.intersect1d(own, _places(other, shape)).size:
            return (
                f"'{other.use.node.name}' reads the same entries in another way, which a repair would change"
            )
    return None


def _computes(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or is the output; others look at sizes and types alone."""
    leaves: Iterable[object] = pytree.tree_leaves(node.meta.get("val"))
    return node.op == "output" or "val" not in node.meta or any(isinstance(leaf, Tensor) for leaf in leaves)


def _places(matrices: ConsumerMatrices, shape: torch.Size) -> np.ndarray:
    """Which entries of a weight are read."""
    return np.unique(matrices.moved(torch.arange(shape.numel()).reshape(shape)).numpy())


__all__ = ["read_otherwise"]
