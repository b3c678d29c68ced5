"""Repair queries for the channels that they lose together with keys, so that their products stay as nearly
what they were as they can.

The product of queries and keys is ``Q Kᵀ = Σ φ_f``, with ``φ_f = Q_f K_fᵀ`` the part that channel set f
gives: the channels that a table of rotations turns into each other, or a single one. Without the sets P,
``Σ_M φ_f`` is left. Factors β_f of the sets M give the product nearest to the whole one for

    ``β_M = H[M, M]⁻¹ H[M, :] 1``,   ``H_fg = ⟨φ_f, φ_g⟩ = Σ (Q_fᵀ Q_g) ∘ (K_fᵀ K_g)``,

the least-squares restoration of FASP (arXiv 2501.09412, section 3), with a row of ones for the weight and H
for the Gram matrix, whose errors are those of the products. Where heads share the rows that the factors are
for (the gain of a norm of queries), their H are added.

Rows of W_Q and of its bias, or the gain, are multiplied by the factors, which commute with all that lies
between: rotations, movement, and what else the rows are multiplied by.

A softmax does not see what is the same for all keys, so that keys of attention count without their mean over
a sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..analysis._analysis import Analysis
from ..analysis.channels import NONE, Product, Repeating, Slot
from ..base._offload import keep
from ..base.compat import pytree
from ..capturing._fx import attribute
from ..capturing._runner import Runner
from ..patterns import CASTS, lookup
from ._marks import Marks
from ._matrices import ConsumerMatrices, bias_of, computes, own_parameter
from ._products import lying_along, scaled, tokens_of
from ._ranks import Ranks
from .restoration import Restored, ridge, together, without_values
from .statistics import FITTED, HELD, PADDING, precise

#: products whose operands are ``[..., tokens, channels]``, and, where the second is ``[..., channels,
#: tokens]``, that it is
FORMS = {
    "aten.scaled_dot_product_attention.default": False,
    "aten.matmul.default": True,
    "aten.bmm.default": True,
}
_SUMS = ("aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default", "aten.stack.default", "aten.neg.default")


@dataclass(frozen=True)
class Mended:
    """A product that was repaired.

    Attributes:
        weights: repaired weights and biases by their canonical names.
        outcome: errors of the product, averaged over blocks; its ``weight`` are the factors, ``[blocks, 1,
            channel sets]``, zero for those that go.
    """

    weights: dict[str, Tensor]
    outcome: Restored


class QueryRepair:
    """The repair of one product: what is seen of it, and the rows that bear the factors.

    Args:
        analysis: of the program.
        product: the product.
        rows: of the weight that becomes the channels of the product's first operand.
        bias: the name of what is added to these rows, and to nothing else; ``None``: nothing is.
    """

    def __init__(self, analysis: Analysis, product: Product, rows: Slot, bias: str | None) -> None:
        self.analysis, self.product, self.rows, self.bias = analysis, product, rows, bias
        self._queries, self._keys = (lying_along(analysis, product, operand)[0] for operand in (0, 1))
        labels, heads = analysis.labels, list(np.unique(_heads(self._queries), axis=0))
        if not np.isin(heads, rows.numbers()).all():  # heads share the rows
            shared = np.unique(np.sort(labels[np.stack(heads)], 1), axis=0)
            heads = [np.flatnonzero(np.isin(labels, own)) for own in shared]
        #: the channel sets of each block: of a head, or of all that share rows
        self._sets = [np.unique(labels[numbers]) for numbers in heads]
        self._block, self._place = (torch.zeros(len(labels), dtype=torch.long) for _ in range(2))
        for block, (numbers, own) in enumerate(zip(heads, self._sets, strict=True)):
            self._block[numbers] = block
            self._place[numbers] = torch.from_numpy(np.searchsorted(own, labels[numbers]))
        self._sums: dict[int, Tensor] = {}

    def observe(self, runner: Runner, marks: Marks, ranks: Ranks) -> None:
        """Add up H over the tokens to fit and over those held out; the product is about to be executed."""
        device = runner.device or attribute(self.analysis.program.module, self.rows.name).device
        width = max(map(len, self._sets))
        for kind in (FITTED, HELD):
            self._sums[kind] = torch.zeros(
                len(self._sets), width, width, dtype=precise(device), device=device
            )
        query, key = self.product.operands
        for number, queries, keys in zip(runner.numbers, runner.read(query), runner.read(key), strict=True):
            marked = marks.of(number, query, queries, tokens_of(self._queries)).expand(queries.shape)[..., :1]
            there = (marks.of(number, key, keys, tokens_of(self._keys)) != PADDING).expand(keys.shape)
            of_keys = self._of_keys(keys, there, queries.shape[-3])
            numbers = self._queries.at(queries.shape)[..., 0, :]
            numbers = numbers.expand(*queries.shape[:-2], -1).flatten(0, -2)
            block, place = (found[numbers].to(queries.device) for found in (self._block, self._place))
            where = block[:, :1, None], place[:, :, None], place[:, None, :]
            for kind, total in self._sums.items():
                own = queries.to(of_keys).masked_fill(marked != kind, 0)
                found = (own.mT @ own * of_keys).flatten(0, -3)
                total.index_put_(where, found.to(total), accumulate=True)
        for total in self._sums.values():
            ranks.add(total)

    def _of_keys(self, keys: Tensor, there: Tensor, heads: int) -> Tensor:
        """The products of keys with themselves, a matrix for each sequence and head of queries, or one for
        all heads.
        """
        is_transposed = FORMS[str(self.product.node.target)]
        if is_transposed:
            keys, there = keys.mT, there.mT
        there = there[..., :1]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32)).masked_fill(~there, 0)
        if not is_transposed:  # of attention
            mean = keys.sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
            keys = (keys - mean).masked_fill(~there, 0)
        found = keys.mT @ keys
        own = found.shape[-3]
        return found if own == 1 else found.repeat_interleave(heads // own, -3)

    def solve(self, gone: np.ndarray) -> Restored:
        """The factors, with the channel numbers ``gone`` removed."""
        removed = np.unique(self.analysis.labels[gone])
        parts = []
        for block, sets in enumerate(self._sets):
            fitted, held = (total[block, : len(sets), : len(sets)] for total in self._sums.values())
            kept = torch.from_numpy(np.flatnonzero(~np.isin(sets, removed))).to(fitted.device)
            outcome = ridge(torch.ones_like(fitted[:1]), fitted.clone(), held.clone(), kept)
            missing = self._sums[FITTED].shape[-1] - len(sets)
            parts.append(replace(outcome, weight=nn.functional.pad(outcome.weight, (0, missing))))
        return together(parts)

    def write(self, outcome: Restored, repaired: Mapping[str, Tensor]) -> Mended:
        """Multiply the rows by the factors; those that go stay as they are, since their channels go with the
        keys'.

        Args:
            repaired: what weights have become already.
        """
        factors = self._by_number(outcome)[self.rows.numbers()]
        weights = {}
        for name, dim in ((self.rows.name, self.rows.dim), (self.bias, 0)):
            if name is not None:
                held = attribute(self.analysis.program.module, name)
                value: Tensor = repaired.get(name, held).detach()
                own = torch.where(factors != 0, factors, 1.0).reshape([-1] + [1] * (value.dim() - dim - 1))
                weights[name] = keep((value * own.to(value.device)).to(value.dtype))
        return Mended(weights, without_values(outcome))

    def carry(self, outcome: Restored, runner: Runner) -> None:
        """Give the product about to be executed the repaired queries, for all batches."""
        runner.change(self.product.operands[0], partial(scaled, self._by_number(outcome), self._queries))

    def _by_number(self, outcome: Restored) -> Tensor:
        """The factor of each channel number of the product."""
        factors = outcome.weight[:, 0].cpu()
        return factors[self._block, self._place]


def _heads(lying: Repeating) -> np.ndarray:
    """The numbers of an operand's channels, ``[heads, channels]``."""
    return lying.numbers.reshape(-1, lying.numbers.shape[-1]).numpy()


def repair_of(analysis: Analysis, products: Sequence[Product]) -> QueryRepair | str:
    """The repair of the products that the channels of a group are summed over in, or why there is none."""
    if len(products) != 1:
        return f"{len(products)} products share its channels"
    (product,) = products
    query, key = product.operands
    if str(product.node.target) not in FORMS or query is key:
        return "it is no product of queries and keys of a form that is known"
    axes, others = (lying_along(analysis, product, operand) for operand in (0, 1))
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
    if not _meet(query.meta["val"].shape[:-2], key.meta["val"].shape[:-2]):
        return "its queries and keys have heads that do not meet one by one"
    numbers = _heads(axes[0])
    if (numbers == NONE).any():
        return "some of its channels are none"
    sets = np.unique(analysis.labels[numbers])
    for node in reversed(analysis.program.module.graph.find_nodes(op="get_attr")):
        for slot in _rows(analysis, node, sets):
            bias = _bias_on_the_way(analysis, product, node, slot.name)
            if bias is not None:
                return QueryRepair(analysis, product, slot, bias or None)
    return "no weight leads to its queries alone, by steps that are linear in its rows"


def _meet(queries: Sequence[Any], keys: Sequence[Any]) -> bool:
    """Whether, by their leading sizes, each head of queries meets one of keys, the same number of them each,
    or a single one all.
    """
    if len(queries) != len(keys) or list(map(str, queries[:-1])) != list(map(str, keys[:-1])):
        return False
    heads, own = queries[-1], keys[-1]
    if isinstance(heads, int) and isinstance(own, int):
        return heads % own == 0
    return str(heads) == str(own)


def _rows(analysis: Analysis, node: fx.Node, sets: np.ndarray) -> Iterator[Slot]:
    """The dimensions of a weight along which there are rows of these channel sets, of all of them and no
    others, where one node alone gives the weight and nothing writes into it.
    """
    name, weight = own_parameter(analysis, node) or ("", torch.empty(()))
    for dim in range(weight.dim() if weight.is_floating_point() else 0):
        slot = analysis.numbering.get(name, dim)
        if slot is None or slot.block_dim is not None:
            continue
        if np.array_equal(np.unique(analysis.labels[slot.numbers()]), sets):
            yield slot


def _bias_on_the_way(analysis: Analysis, product: Product, weight: fx.Node, name: str) -> str | None:
    """The name of the bias that joins a weight's rows on their way to a product's first operand, or an empty
    one; ``None`` where they go elsewhere, or are not merely moved, multiplied by what does not depend on
    them, and added to one another.
    """
    query = product.operands[0]
    uses = {use.node: use for use in analysis.walk.facts.uses if use.weight == name}
    before, reached, bias = _ancestors(query), {weight}, ""
    for node in analysis.program.module.graph.nodes:
        read = [source in reached for source in _tensors(node)]
        if node in reached or not any(read) or (node not in before and not computes(node)):
            continue
        if node is product.node and read == [source is query for source in _tensors(node)]:
            continue
        if node not in before:
            return None
        if node in uses:
            use = uses[node]
            if use.activation in reached or use.route is not None or use.recurrence is not None:
                return None
            bias = bias_of(analysis, [use], ConsumerMatrices(use, analysis.walk.values)) or ""
            if len(read) > 2 and not bias:
                return None
        elif not _is_linear(node, read):
            return None
        reached.add(node)
    return bias if query in reached else None


def _is_linear(node: fx.Node, read: Sequence[bool]) -> bool:
    """Whether a node moves or casts what has been reached, multiplies it by what has not, or adds things
    reached.

    Args:
        read: of the tensors that it is given, which have been reached.
    """
    target, rule = str(node.target), lookup(node.target)
    if target in CASTS or node.target is operator.getitem or target in ("aten.mul.Scalar", "aten.div.Scalar"):
        return True
    if rule is not None and rule.moves == "self":
        return read[0] and sum(read) == 1
    if target in ("aten.mul.Tensor", "aten.div.Tensor"):
        return sum(read) == 1 and (read[0] or target == "aten.mul.Tensor")
    summands = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args
    return target in _SUMS and all(read) and len(read) == len(summands)


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


__all__ = ["Mended", "QueryRepair", "repair_of"]
