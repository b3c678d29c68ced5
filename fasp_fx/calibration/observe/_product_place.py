"""Where the repair of a product of two activations can be written: rows of a weight that nothing but the
product's first operand depends on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...analysis._analysis import Analysis
from ...analysis.channels import NONE, Product, Repeating
from ...base.compat import OpOverload, pytree
from ...capturing._fx import arguments as arguments_of
from ...capturing._fx import attribute, written_names
from ...patterns import BIASES, CASTS, lookup
from ._matrices import read_alone
from ._products import lying_along

#: products whose operands are ``[..., tokens, channels]``, and, where the second is ``[..., channels,
#: tokens]``, that it is
FORMS = {
    "aten.scaled_dot_product_attention.default": False,
    "aten.matmul.default": True,
    "aten.bmm.default": True,
}
_SUMS = ("aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default", "aten.stack.default", "aten.neg.default")


@dataclass(frozen=True)
class Place:
    """Rows of a weight that become the channels of a product's first operand.

    Attributes:
        weight, dim: its canonical name, and the dimension that its rows lie along.
        bias: what is added to its rows, and to nothing else.
        rows: for each block (a head) the row of each channel, shape ``[blocks, channels]``; one block where
            all heads share the rows.
        lying: the numbers of the first operand's channels.
        numbers: the same, shape ``[blocks, channels]``, for every block.
        mixes: whether rows may be added to each other (nothing but movement lies between); otherwise each is
            only multiplied.
    """

    weight: str
    dim: int
    bias: str | None
    rows: Tensor
    lying: Repeating
    numbers: np.ndarray
    mixes: bool


def place_of(analysis: Analysis, product: Product) -> Place | str:
    """Where the repair of a product can be written, or why nowhere."""
    query, key = product.operands
    if str(product.node.target) not in FORMS or query is key:
        return "it is no product of queries and keys of a form that is known"
    axes, others = lying_along(analysis, product, 0), lying_along(analysis, product, 1)
    last = query.meta["val"].dim() - 1 if "val" in query.meta else -1
    if (
        len(axes) != 1
        or len(others) != 1
        or axes[0].numbers.dim() != last + 1
        or last < 2
        or axes[0].numbers.shape[-2] != 1
        or axes[0].varies[last]
    ):
        return "its channels do not lie along the last dimension of the queries"
    if not _meet(query.meta["val"], key.meta["val"]):
        return "its queries and keys have heads that do not meet one by one"
    numbers = axes[0].numbers.reshape(-1, axes[0].numbers.shape[-1]).numpy()
    if (numbers == NONE).any():
        return "some of its channels are none"
    before, otherwise = _ancestors(query), _ancestors(key)
    for node in [
        node
        for node in analysis.program.module.graph.find_nodes(op="get_attr")
        if node in before and node not in otherwise
    ][::-1]:
        found = _place(analysis, product, node, axes[0], numbers)
        if found is not None:
            return found
    return "no weight leads to its queries alone, by steps that are linear in its rows"


def _meet(query: Tensor, key: Tensor) -> bool:
    """Whether each head of queries meets one of keys, the same number of them each, or a single one of either
    meets all.
    """
    if query.dim() != key.dim() or any(
        str(a) != str(b) for a, b in zip(query.shape[:-3], key.shape[:-3], strict=True)
    ):
        return False
    heads, own = query.shape[-3], key.shape[-3]
    if isinstance(heads, int) and isinstance(own, int):
        return heads == 1 or heads % own == 0
    return str(heads) == str(own)


def _place(
    analysis: Analysis, product: Product, node: fx.Node, lying: Repeating, numbers: np.ndarray
) -> Place | None:
    """The place that a weight offers, if it does."""
    canonical, module = analysis.program.canonical(), analysis.program.module
    name = canonical.get(str(node.target), "")
    weight = attribute(module, str(node.target))
    same = [
        other for other in module.graph.find_nodes(op="get_attr") if canonical.get(str(other.target)) == name
    ]
    if (
        not isinstance(weight, nn.Parameter)
        or not weight.is_floating_point()
        or same != [node]
        or name in written_names(module.graph)
    ):
        return None
    way = _way(analysis, product, node, name)
    if way is None:
        return None
    bias, moves = way
    for dim in range(weight.dim()):
        slot = analysis.numbering.get(name, dim)
        if slot is None or slot.block_dim is not None:
            continue
        rows = numbers - slot.base
        if ((rows >= 0) & (rows < slot.size)).all():
            return Place(name, dim, bias, torch.from_numpy(rows), lying, numbers, moves)
        own = analysis.labels[slot.base : slot.base + slot.size]
        if slot.size == numbers.shape[1] and (analysis.labels[numbers] == own).all() and bias is None:
            return Place(name, dim, None, torch.arange(slot.size)[None], lying, numbers, False)
    return None


def _way(analysis: Analysis, product: Product, weight: fx.Node, name: str) -> tuple[str | None, bool] | None:
    """What a weight's rows go through on their way to a product: the bias that joins them, and whether all
    else is movement; ``None`` where they go elsewhere, or are not merely moved, multiplied by what does not
    depend on them, and added to one another."""
    query = product.operands[0]
    before = _ancestors(query)
    uses = {use.node: use for use in analysis.walk.facts.uses if use.weight == name}
    reached, bias, moves = {weight}, None, True
    for node in analysis.program.module.graph.nodes:
        if node in reached or not any(read in reached for read in node.all_input_nodes):
            continue
        if node is product.node and not any(
            read in reached and read is not query for read in node.all_input_nodes
        ):
            continue
        if node not in before:
            if (
                node.users
                or node.op == "output"
                or not isinstance(node.target, OpOverload)
                or node.target._schema.returns
            ):
                return None
            continue  # an assertion
        if node in uses:
            use, given = uses[node], arguments_of(node)
            names = BIASES.get(str(node.target))
            if use.activation in reached or use.route is not None or use.recurrence is not None:
                return None
            added = (
                given.get(names[1])
                if names
                else next(
                    (given[key] for key in ("bias", "self") if given.get(key) not in (None, use.activation)),
                    None,
                )
            )
            if added is not None:
                bias = read_alone(analysis, added, node)
                if bias is None or any(given.get(key, 1) != 1 for key in ("alpha", "beta")):
                    return None
        elif not _is_movement(node, reached):
            moves = False
            if not _is_linear(node, reached):
                return None
        reached.add(node)
    return (bias, moves) if query in reached else None


def _is_movement(node: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether a node only moves or casts what has been reached."""
    if str(node.target) in CASTS:
        return True
    if node.target is operator.getitem:
        return True
    rule = lookup(node.target)
    if rule is None or rule.moves != "self":
        return False
    return all(read not in reached or read is arguments_of(node)["self"] for read in node.all_input_nodes)


def _is_linear(node: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether a node multiplies what has been reached by what has not, or adds things reached."""
    read, target = [argument in reached for argument in _tensors(node)], str(node.target)
    if target == "aten.mul.Tensor":
        return sum(read) == 1
    if target == "aten.div.Tensor":
        return read[0] and sum(read) == 1
    if target in ("aten.mul.Scalar", "aten.div.Scalar"):
        return True
    return (
        target in _SUMS
        and all(read)
        and len(read) == (len(node.args[0]) if isinstance(node.args[0], (list, tuple)) else len(node.args))
    )


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node is given, in order, as often as it is."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it depends on."""
    found, pending = {node}, [node]
    while pending:
        before = set(pending.pop().all_input_nodes) - found
        found |= before
        pending += before
    return found


__all__ = ["FORMS", "Place", "place_of"]
