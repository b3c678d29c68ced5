"""Channels contracted between two activations (rows of W_Q and W_K): how much their product or the loss would
lose without some, and the repair of what is left of the product.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from ..analysis._analysis import Analysis
from ..analysis.channels import Product, Repeating, Slot, repeating
from ..analysis.groups import Group
from ..base._device import device_of
from ..base._offload import keep
from ..base.compat import pytree
from ..capturing._fx import attribute
from ..capturing._runner import Runner
from ..patterns import CASTS, lookup
from ._marks import Marks
from ._matrices import ConsumerMatrices, bias_of, computes, read_otherwise
from ._ranks import Ranks
from .restoration import Restored, ridge, together
from .scoring import ByColumns, Columns
from .statistics import FITTED, HELD, PADDING, precise

#: what is seen of a product besides its operands, 0 and 1
EFFECT = "effect"


class ObservedProducts:
    """What is seen of the operands of products, channel by channel.

    Channel i adds the matrix q_i k_iᵀ to the product of queries and keys, whose Frobenius norm is ‖q_i‖₂
    ‖k_i‖₂: that is its score, where ‖q_i‖₂ runs over all that a channel set holds of an operand (every head
    and layer that shares one table of rotations, say). Several products are added.

    Where a loss is run back, h_ti is its gradient with respect to the query's channel i at token t, so that
    to first order the loss falls by q_ti h_ti without it. The mean of the squares over the loss' terms is the
    curvature by Fisher's information, and half of it what the channel costs: the unit of the costs of
    consumers (:class:`fasp_fx.obs.OBS`).

    Args:
        groups: those that can be pruned; products decide those of them that no weight reads.

    Attributes:
        terms: of how many terms the loss was the sum.
    """

    def __init__(self, analysis: Analysis, groups: list[Group]) -> None:
        self.analysis = analysis
        self.of_group = {
            group.name: [
                product
                for product in analysis.walk.facts.products
                if np.isin(analysis.labels[product.numbers], group.sets).any()
            ]
            for group in groups
            if not group.uses
        }
        #: sums of squares of a product's operands, 0 and 1, and of the effects of the first, for each of its
        #: channel numbers
        self._sums: dict[tuple[Product, int | str], Tensor] = {}
        self.terms = 0

    @property
    def all(self) -> list[Product]:
        """The products of all groups, each once."""
        return list(dict.fromkeys(product for found in self.of_group.values() for product in found))

    def of(self, group: Group) -> list[Product]:
        """The products that decide a group: those of one without consumers."""
        return self.of_group.get(group.name, [])

    def observe(self, runner: Runner, marks: Marks, products: list[Product], ranks: Ranks) -> None:
        """Add the squares of the operands of products about to be executed, without padding, over the batches
        of all processes.
        """
        for product in products:
            for operand, node in enumerate(product.operands):
                for number, batch in zip(runner.numbers, runner.read(node), strict=True):
                    self.see(product, operand, batch, marks, number)
                self.add_up(product, operand, ranks, runner.device)

    def see(self, product: Product, what: int | str, value: Tensor, marks: Marks, number: int) -> None:
        """Add the squares of one operand of a product, or of its effects, in one batch, without padding."""
        operand = 0 if what == EFFECT else int(what)
        squares = value.detach().abs().to(torch.float32).square()
        for lying in lying_along(self.analysis, product, operand):
            counts = marks.of(number, product.operands[operand], value, tokens_of(lying)) != PADDING
            more = lying.summed((squares * counts).to(precise(value.device))).reshape(-1)
            numbers = lying.numbers.numpy().reshape(-1)
            own = np.isin(numbers, product.numbers)
            place = torch.from_numpy(np.searchsorted(product.numbers, numbers[own])).to(more.device)
            self._sum(product, what, more.device).index_add_(0, place, more[torch.from_numpy(own)])

    def _sum(self, product: Product, what: int | str, device: torch.device) -> Tensor:
        zeros = torch.zeros(len(product.numbers), dtype=precise(device), device=device)
        return self._sums.setdefault((product, what), zeros)

    def add_up(
        self, product: Product, what: int | str, ranks: Ranks, device: torch.device | None = None
    ) -> None:
        """Add what other processes have seen of an operand or of effects; this one may have seen none.

        Args:
            device: where the program runs; ``None``: where it is.
        """
        ranks.add(self._sum(product, what, device or device_of(self.analysis.program.module)))

    def effects(self) -> list[Tensor]:
        """The sums of the squared effects."""
        return [value for (_, what), value in self._sums.items() if what == EFFECT]

    def forget(self, effects: bool = True) -> None:
        """Keep nothing of what was seen, or nothing but effects on the loss."""
        self._sums = {key: value for key, value in self._sums.items() if key[1] == EFFECT and not effects}

    def costs(self, group: Group) -> np.ndarray:
        """What each channel set of a group costs, in the order of ``group.sets``: by its effects on the loss,
        or where no loss was run back, half its part of the squared scores.
        """
        products = self.of(group)
        if products and all((product, EFFECT) in self._sums for product in products):
            effects: np.ndarray = np.sum([self._by_set(group, one, EFFECT) for one in products], 0)
            return 0.5 * effects / max(self.terms, 1)
        scores = np.zeros(group.size)
        for product in products:
            energies = [self._by_set(group, product, operand) for operand in range(len(product.operands))]
            scores += np.prod(np.sqrt(energies), 0)
        return 0.5 * scores**2 / max(float((scores**2).sum()), 1e-300)

    def _by_set(self, group: Group, product: Product, what: int | str) -> np.ndarray:
        """What was seen of a product, added up for the channel sets of a group."""
        total = np.zeros(group.size)
        _add(total, group, self.analysis, product.numbers, self._sums[product, what].cpu().numpy())
        return total

    def cut(self, runner: Runner, products: list[Product], gone: np.ndarray) -> None:
        """Take removed channels out of products about to be executed: zeros in the first operand."""
        kept = torch.from_numpy(~np.append(gone, False))  # the last entry serves NONE (-1)
        for product in products:
            for lying in lying_along(self.analysis, product, 0):
                runner.change(product.operands[0], partial(_scaled, kept, lying))


def _scaled(factors: Tensor, lying: Repeating, value: Tensor) -> Tensor:
    """An operand whose channels are multiplied by factors, which are given by channel number."""
    return value * factors[lying.at(value.shape)].to(value)


def lying_along(analysis: Analysis, product: Product, operand: int) -> list[Repeating]:
    """How the channels that a product sums over lie along one of its operands."""
    node = product.operands[operand]
    axes = [
        axis.numbers
        for axis in analysis.walk.values[node].axes
        if np.isin(axis.numbers.numpy(), product.numbers).any()
    ]
    # A node that a pass has written may have none: nothing is known then of sizes that vary.
    recorded = node.meta.get("val")
    found = [repeating(numbers, numbers.shape if recorded is None else recorded.shape) for numbers in axes]
    return [lying for lying in found if lying is not None]  # the analysis leaves others whole


def tokens_of(lying: Repeating) -> list[int]:
    """The dimensions along which tokens lie."""
    sizes = zip(lying.numbers.shape, lying.varies, strict=True)
    return [dim for dim, (size, varies) in enumerate(sizes) if size == 1 or varies]


def row_scores(analysis: Analysis, group: Group, score: ByColumns, within: str) -> np.ndarray:
    """Without data, one value for each channel set: the score of the producers' rows, added up.

    Args:
        within: the path of the submodule that was captured, if it was none of the whole model.
    """
    total = np.zeros(group.size)
    for slot in group.slots:
        is_whole = slot.kind == "weight" and slot.block_dim is None
        weight = attribute(analysis.program.module, slot.name) if is_whole else None
        if isinstance(weight, Tensor) and weight.dim() > 1 and weight.is_floating_point():
            rows = weight.detach().movedim(slot.dim, -1).reshape(-1, weight.shape[slot.dim])
            columns = Columns(rows, None, None, name=f"{within}, {slot.name}, {slot.dim}, 0")
            _add(total, group, analysis, slot.numbers().numpy(), score.values(columns))
    return total


def _add(
    total: np.ndarray, group: Group, analysis: Analysis, numbers: np.ndarray, values: np.ndarray
) -> None:
    sets = sets_in(group, analysis.labels, numbers)
    np.add.at(total, sets[sets >= 0], values[sets >= 0])


def sets_in(group: Group, labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For channel numbers of any shape, which of a group's channel sets each belongs to, counted in the order
    of ``group.sets``; -1 where none.

    Args:
        labels: the channel set of each channel number.
    """
    place = np.full(len(labels) + 1, -1)  # of each channel set; the last entry serves NONE (-1)
    place[group.sets] = np.arange(group.size)
    return place[np.where(numbers >= 0, labels[np.maximum(numbers, 0)], -1)]


_SUMS = ("aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default", "aten.stack.default", "aten.neg.default")


class QueryRepair:
    """Repairs queries for the channels that they lose together with keys.

    The product of queries and keys is ``Q Kᵀ = Σ φ_f``, with ``φ_f = Q_f K_fᵀ`` the part that channel set f
    gives: the channels that a table of rotations turns into each other, or a single one. Without the sets P,
    ``Σ_M φ_f`` is left. Factors β_f of the sets M give the product nearest to the whole one for

        ``β_M = H[M, M]⁻¹ H[M, :] 1``,   ``H_fg = ⟨φ_f, φ_g⟩ = Σ (Q_fᵀ Q_g) ∘ (K_fᵀ K_g)``,

    the least-squares restoration of FASP (arXiv 2501.09412, section 3), with a row of ones for the weight and
    H for the Gram matrix, whose errors are those of the products. Rows of W_Q and of its bias are multiplied
    by the factors, which commute with all that lies between: rotations, movement, and what else the rows are
    multiplied by. A softmax does not see what is the same for all keys, so that keys of attention count
    without their mean over a sequence.

    Args:
        queries: how the channels lie along the product's first operand, ``[..., head, 1, channel]``.
        rows: of the weight that become these channels.
        bias: what is added to these rows, and to nothing else, by name.
    """

    def __init__(
        self, analysis: Analysis, product: Product, queries: Repeating, rows: Slot, bias: str | None
    ) -> None:
        self.analysis, self.product, self._queries = analysis, product, queries
        self.rows, self.bias = rows, bias
        labels = analysis.labels[_heads(queries)]
        #: the channel sets of each head, ``[heads, sets]``, and which of them each channel is of
        self._sets = np.stack([np.unique(own) for own in labels])
        places = [np.searchsorted(sets, own) for sets, own in zip(self._sets, labels, strict=True)]
        self._place = torch.from_numpy(np.stack(places))
        self._sums: dict[int, Tensor] = {}

    def observe(self, runner: Runner, marks: Marks, ranks: Ranks) -> None:
        """Add up H over the tokens to fit and over those held out; the product is about to be executed."""
        query, key = self.product.operands
        lead = self._queries.numbers.shape[:-2]
        (keys_lying,) = lying_along(self.analysis, self.product, 1)
        member = torch.nn.functional.one_hot(self._place, self._sets.shape[1])
        device = runner.device or device_of(self.analysis.program.module)
        member = member.to(device, precise(device))
        self._sums = {kind: member.new_zeros(member.mT.matmul(member).shape) for kind in (FITTED, HELD)}
        for number, queries, keys in zip(runner.numbers, runner.read(query), runner.read(key), strict=True):
            marked = marks.of(number, query, queries, tokens_of(self._queries)).expand(queries.shape)[..., :1]
            there = (marks.of(number, key, keys, tokens_of(keys_lying)) != PADDING).expand(keys.shape)
            of_keys = _of_keys(keys, there[..., :1], queries.shape[-3])
            for kind, total in self._sums.items():
                own = queries.to(of_keys).masked_fill(marked != kind, 0)
                found = own.mT @ own * of_keys
                found = found.sum_to_size(*lead, *found.shape[-2:]).flatten(0, -3).to(total)
                total += member.mT @ found @ member
        for total in self._sums.values():
            ranks.add(total)

    def solve(self, gone: np.ndarray) -> Restored:
        """The factors, with the channel numbers ``gone`` removed."""
        removed = np.isin(self._sets, self.analysis.labels[gone])
        parts = []
        for fitted, held, own in zip(*self._sums.values(), ~removed, strict=True):
            kept = torch.from_numpy(np.flatnonzero(own)).to(fitted.device)
            parts.append(ridge(torch.ones_like(fitted[:1]), fitted.clone(), held.clone(), kept))
        return together(parts)

    def write(self, outcome: Restored, repaired: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply the rows by the factors; those that go stay as they are, since their channels go with the
        keys'. What the weights and biases become, by their canonical names.

        Args:
            repaired: what weights have become already.
        """
        factors = self._by_number(outcome)[self.rows.numbers()]
        weights: dict[str, Tensor] = {}
        for name, dim in ((self.rows.name, self.rows.dim), *([] if self.bias is None else [(self.bias, 0)])):
            value = repaired.get(name, attribute(self.analysis.program.module, name)).detach()
            own = torch.where(factors != 0, factors, 1.0).reshape([-1] + [1] * (value.dim() - dim - 1))
            weights[name] = keep((value * own.to(value.device)).to(value.dtype))
        return weights

    def carry(self, outcome: Restored, runner: Runner) -> None:
        """Give the product about to be executed the repaired queries, for all batches."""
        runner.change(self.product.operands[0], partial(_scaled, self._by_number(outcome), self._queries))

    def _by_number(self, outcome: Restored) -> Tensor:
        """The factor of each channel number of the product."""
        factors = outcome.weight[:, 0].cpu()
        found = factors.new_ones(len(self.analysis.labels))
        found[_heads(self._queries)] = factors.gather(1, self._place)
        return found


def _of_keys(keys: Tensor, there: Tensor, heads: int) -> Tensor:
    """The products of keys with themselves, a matrix for each sequence and head of queries, or one for
    all heads.
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32)).masked_fill(~there, 0)
    mean = keys.sum(-2, keepdim=True) / there.sum(-2, keepdim=True).clamp_min(1)
    keys = (keys - mean).masked_fill(~there, 0)
    found = keys.mT @ keys
    own = found.shape[-3]
    return found if own == 1 else found.repeat_interleave(heads // own, -3)


def _heads(lying: Repeating) -> np.ndarray:
    """The numbers of an operand's channels, ``[heads, channels]``."""
    return lying.numbers.reshape(-1, lying.numbers.shape[-1]).numpy()


def repair_of(analysis: Analysis, products: Sequence[Product]) -> QueryRepair | None:
    """The repair of the products that the channels of a group are summed over in; ``None`` where it is not
    one product of attention, or its channels are not rows of one weight, along the last dimension of the
    queries of each head.
    """
    (product, *others) = products
    query, key = product.operands
    if others or str(product.node.target) != "aten.scaled_dot_product_attention.default" or query is key:
        return None
    axes, keys = (lying_along(analysis, product, operand) for operand in (0, 1))
    if (
        len(axes) != 1
        or len(keys) != 1
        or axes[0].numbers.dim() < 3
        or axes[0].numbers.shape[-2] != 1
        or any(axes[0].varies)
        or len({len(np.unique(own)) for own in analysis.labels[_heads(axes[0])]}) != 1
    ):
        return None
    found = _source(analysis, product, np.sort(_heads(axes[0]), None))
    return None if found is None else QueryRepair(analysis, product, axes[0], *found)


def _source(analysis: Analysis, product: Product, numbers: np.ndarray) -> tuple[Slot, str | None] | None:
    """The rows of a weight that become a product's first operand, and what is added to them, by name.

    ``None`` where the operand is not linear in both together, or they lead elsewhere too: they are merely
    moved, multiplied by what does not depend on them, and added to one another.
    """
    rows = analysis.numbering.slot_of(int(numbers[0]))
    uses = [use for use in analysis.walk.facts.uses if use.weight == rows.name]
    if not np.array_equal(rows.numbers().reshape(-1), numbers) or len(uses) != 1:
        return None
    (use,) = uses
    matrices = ConsumerMatrices(use, analysis.walk.values)
    bias, query = bias_of(analysis, uses, matrices), product.operands[0]
    if len(_tensors(use.node)) != 2 + (bias is not None) or read_otherwise(analysis, matrices) is not None:
        return None
    reached = {use.node}
    for node in analysis.program.module.graph.nodes:
        read = [source in reached for source in _tensors(node)]
        is_end = node is product.node and read == [source is query for source in _tensors(node)]
        if any(read) and computes(node) and not is_end:
            if not _is_linear(node, read):
                return None
            reached.add(node)
    return (rows, bias) if query in reached else None


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node is given, in order, as often as it is."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _is_linear(node: fx.Node, read: Sequence[bool]) -> bool:
    """Whether a node moves or casts what has been reached, multiplies it by what has not, or adds things
    reached.

    Args:
        read: of the tensors that it is given, which have been reached.
    """
    target, rule = str(node.target), lookup(node.target)
    if target in CASTS or node.target is operator.getitem or target in ("aten.mul.Scalar", "aten.div.Scalar"):
        return True
    if (rule is not None and rule.moves == "self") or target in ("aten.mul.Tensor", "aten.div.Tensor"):
        return sum(read) == 1 and (read[0] or target == "aten.mul.Tensor")
    summands = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args
    return target in _SUMS and all(read) and len(read) == len(summands)
