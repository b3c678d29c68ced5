"""Where a consumer adds a bias, its repair has an intercept: what goes had a mean, which the bias can give in
its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from ...analysis._analysis import Analysis
from ...analysis.channels import Use
from ...capturing._fx import arguments, attribute, written_names
from ...patterns import BIASES
from ._matrices import ConsumerMatrices

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


__all__ = ["bias_of", "centred", "read_alone", "with_ones"]
