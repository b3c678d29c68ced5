"""Whether a weight is read in any way besides the one that it would be repaired for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...analysis._analysis import Analysis
from ...analysis.channels import Use
from ...base.compat import pytree
from ...capturing._fx import arguments, attribute, way_from_weight, written_names
from ...patterns import BIASES
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


#: the part of the means that is not taken for granted
STAYING = 1e-3


def bias_of(analysis: Analysis, uses: Sequence[Use], matrices: ConsumerMatrices) -> str | None:
    """The parameter that is added to every token of a consumer's output and read nowhere else, by its
    canonical name.

    Args:
        uses: those of the consumer.
        matrices: the weight as matrices, whose rows are the bias' entries, block after block.
    """
    use = uses[0]
    names = BIASES.get(str(use.node.target))
    if len(uses) > 1 or names is None or use.route is not None or use.recurrence is not None:
        return None
    given = arguments(use.node)
    weight, bias = (given.get(name) for name in names)
    name = read_alone(analysis, bias, use.node)
    if (
        weight is not use.operand
        or name is None
        or any(given.get(name, 1) != 1 for name in ("alpha", "beta"))
    ):
        return None
    held, own = (attribute(analysis.program.module, read) for read in (name, use.weight))
    return name if held.dtype == own.dtype and len(held) == matrices.rows(own) else None


def read_alone(analysis: Analysis, bias: object, node: fx.Node) -> str | None:
    """The canonical name of a parameter of one dimension that one node alone reads, once, and nothing writes
    into; ``None`` if it is none.
    """
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    module, canonical = analysis.program.module, analysis.program.canonical()
    name, held = canonical.get(str(bias.target), ""), attribute(module, str(bias.target))
    if not isinstance(held, nn.Parameter) or held.dim() != 1 or name in written_names(module.graph):
        return None
    same = [
        other for other in module.graph.find_nodes(op="get_attr") if canonical.get(str(other.target)) == name
    ]
    return name if [user for other in same for user in other.users] == [node] else None


def with_ones(tokens: Tensor) -> Tensor:
    """Tokens ``[tokens, columns]`` and a one behind each, which the intercept is the weight of."""
    return torch.cat([tokens, tokens.new_ones((len(tokens), 1))], 1)


def centred(gram: Tensor, columns: int) -> Tensor:
    """The Gram matrix ``[columns, columns]`` of columns without their means: what is left of them where an
    intercept takes the means over.

    A thousandth of the means stays, as if the ones were damped: of few tokens a mean says little, and all
    columns may be constant.

    Args:
        gram: that of the columns, followed by the ones.
    """
    own, sums = gram[:columns, :columns], gram[:columns, columns]
    return own - torch.outer(sums, sums) / (gram[columns, columns].clamp_min(1.0) * (1 + STAYING))


__all__ = ["bias_of", "centred", "read_alone", "read_otherwise", "with_ones"]
