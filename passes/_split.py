"""Split fused weights by rows, where a layout ties prunable channels to others.

``linear(x, W)`` viewed as ``[heads, 3, d]`` cannot lose rows of the third part alone. Where every path from
the product takes out one part by mere movement, each part gets a product of its own with the rows it takes,
in the order it takes them. So does a weight of which the model takes ranges of rows apart by itself
(``w_q, w_kv = weight.split([d, 2 * d])``), without a product.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fasp_fx.analysis import Analysis, Axis, PruningPlan, Use, Value, marked, run_on_numbers
from fasp_fx.base import pytree
from fasp_fx.capturing import (
    Cut,
    Program,
    SplitWeight,
    arguments,
    attribute,
    is_dynamic,
    set_weight,
    stamp,
    target_name,
    way_from_weight,
)
from fasp_fx.patterns import Rule, lookup

#: of the pass, in messages and stamps
NAME = "split_fused_producers"
_SWAPS = {
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
    torch.ops.aten.mT.default,
}


@dataclass(frozen=True)
class _Part:
    """One tensor taken out of a fused one: its node, its rows in order, and for each of its dimensions the
    dimension of the fused one that lies along it, ``None`` for those of the rows.
    """

    node: fx.Node
    rows: np.ndarray
    sources: tuple[int | None, ...]


@dataclass(frozen=True)
class _Fused:
    """What is computed once more for each part.

    Attributes:
        chain: the nodes, weights first and the fused value last.
        dim: along which it has its rows.
        row_dims: the weights among them, and along which dimension these have the rows.
    """

    chain: list[fx.Node]
    dim: int
    row_dims: dict[fx.Node, int]
    parts: list[_Part]


def split(program: Program, analysis: Analysis) -> Program:
    """Split the weights that stand in the way, as far as their parts can be told apart; the same program if
    there is nothing to do.

    The parts, named ``<weight>_0``, ``<weight>_1`` … where these names are free, are recorded in
    ``program.parts`` and take the place of the whole.
    """
    splits = list(_Finder(analysis).found()) if analysis.conflicts else []
    if not splits:
        return program
    program = program.copy()
    nodes = {node.name: node for node in program.module.graph.nodes}
    for fused in splits:
        for index, part in enumerate(fused.parts):
            _take_out(program, analysis, nodes, fused, part, index)
    names = {target_name(weight) for fused in splits for weight in fused.row_dims}
    # Weights go that nothing reads any more, and all that was computed of them in vain. Another node without
    # users can be a second name of a tied weight, which must stay.
    program.module.graph.eliminate_dead_code(
        lambda node: node.is_impure() or (node.op == "get_attr" and node.target not in names)
    )
    for name in names - {str(node.target) for node in program.module.graph.find_nodes(op="get_attr")}:
        for known in (program.parts, program.recipes, program.numbers):
            known.pop(name, None)
        path, _, leaf = name.rpartition(".")
        delattr(program.module.get_submodule(path), leaf)
    return program


class _Finder:
    """Finds the weights that can be split.

    Args:
        analysis: of the program.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis, self.values = analysis, analysis.walk.values
        self.canonical, self.aliases = analysis.program.canonical(), analysis.program.aliases()
        self.weights = analysis.program.module.graph.find_nodes(op="get_attr")
        self.looked_up = Counter(self.canonical.get(target_name(node)) for node in self.weights)
        self.stuck = marked(
            int(analysis.labels.max(initial=-1)) + 1, *(conflict.classes for conflict in analysis.conflicts)
        )

    def found(self) -> Iterator[_Fused]:
        """The weights whose rows are part of a conflict, alone or with the products that they are read in."""
        for node in self.weights:
            weight = attribute(self.analysis.program.module, target_name(node))
            for dim in range(weight.dim()) if isinstance(weight, nn.Parameter) else ():
                yield from self._fused([node], dim, {node: dim})
        for use in self.analysis.walk.facts.uses:
            if (
                len(use.slots) == 1
                and len(attribute(self.analysis.program.module, use.weight).shape) == 2
                and use.columns.shape[0] == use.columns.shape[2] == 1
                and isinstance(self.values[use.node], Value)  # several results have no rows to tell apart
            ):
                yield from self._product(use)

    def _product(self, use: Use) -> Iterator[_Fused]:
        """A product of a matrix, with the biases that are added to it."""
        ((_, contracted),) = use.slots
        others = [node for node in use.node.all_input_nodes if node not in (use.activation, use.operand)]
        chain = self._with_biases(use.node)
        others += [read for node in chain[1:] for read in node.all_input_nodes if read.op == "get_attr"]
        weight, *moves = way_from_weight(use.operand)
        row_dims = {weight: 1 - contracted, **dict.fromkeys(others, 0)}
        if (
            all(node.target in _SWAPS for node in moves)
            and all(node.op == "get_attr" for node in others)
            and all(len(node.users) == 1 for node in (weight, *moves, *others))
        ):
            chain = [weight, *moves, *others, *chain]
            yield from self._fused(chain, len(self.values[use.node].shape) - 1, row_dims)

    def _fused(self, chain: list[fx.Node], dim: int, row_dims: dict[fx.Node, int]) -> Iterator[_Fused]:
        """What a chain computes, if it consists of parts. Its weights have one name each and are looked up
        once: what is tied, used elsewhere or written into stays one tensor.
        """
        names = [self.canonical[target_name(node)] for node in row_dims]
        if any(self.looked_up[name] != 1 or len(self.aliases[name]) != 1 for name in names):
            return
        # Other dimensions may be numbered too, such as tokens of which there is a fixed number.
        axis = next((axis for axis in self.values[chain[-1]].axes if axis.varying() == [dim]), None)
        if axis is None:
            return
        rows = axis.numbers.reshape(-1).numpy()
        if self.stuck[self.analysis.labels[rows]].any():
            parts = self._parts(chain[-1], dim, rows) or []
            taken = [row for part in parts for row in part.rows.tolist()]
            if len(parts) > 1 and sorted(taken) == sorted(rows.tolist()):
                yield _Fused(chain, dim, row_dims, parts)

    def _with_biases(self, node: fx.Node) -> list[fx.Node]:
        """The product and the additions of a weight with an entry for each of its rows that follow it."""
        chain, rows = [node], self.values[node].shape[-1:]
        while len(chain[-1].users) == 1:
            (user,) = chain[-1].users
            others = [n for n in user.all_input_nodes if n is not chain[-1]]
            if (
                user.target is not torch.ops.aten.add.Tensor
                or len(others) != 1
                or others[0].op != "get_attr"
                or self.values[others[0]].shape != rows
            ):
                break
            chain.append(user)
        return chain

    def _parts(self, root: fx.Node, dim: int, rows: np.ndarray) -> list[_Part] | None:
        """The tensors that hold some of the rows, and are taken out by mere movement; ``None`` if anything
        else is done to all of them, or to what lies along the other dimensions.
        """
        shape, recorded = self.values[root].shape, root.meta["val"].shape
        leads = {
            lead: torch.arange(size).reshape([-1] + [1] * (len(shape) - 1 - lead)).expand(shape)
            for lead, size in enumerate(shape)
            if lead != dim
        }
        parts: list[_Part] = []
        pending: list[tuple[fx.Node, dict[int, Any]]] = [(root, leads)]
        while pending:
            node, labels = pending.pop(0)
            for user in node.users:
                others = [self.values.get(other) for other in user.all_input_nodes if other is not node]
                if any(
                    isinstance(other, tuple) or (isinstance(other, Value) and not other.constant)
                    for other in others
                ):
                    return None
                moved = {lead: self._carry(user, label) for lead, label in labels.items()}
                gives = user.meta.get("val")
                if not all(_lies_along(label, gives, recorded[lead]) for lead, label in moved.items()):
                    return None
                value = self.values.get(user)
                if isinstance(value, Value):
                    axes = [axis for axis in value.axes if np.isin(axis.numbers.numpy(), rows).any()]
                    if len(axes) != 1:
                        return None
                    if len(np.unique(axes[0].numbers.numpy())) < len(np.unique(rows)):
                        part = _part(user, value, axes[0], moved)
                        if part is None:
                            return None
                        parts.append(part)
                        continue
                pending.append((user, moved))
        return parts

    def _carry(self, node: fx.Node, label: Any) -> Any:
        """A label tensor moved the way ``node`` moves its input at every size, or ``None`` if the node does
        anything but move.
        """
        if node.target is operator.getitem and isinstance(label, (list, tuple)):
            return label[arguments(node)["1"]]
        rule = lookup(node.target)
        moves = rule is not None and rule.moves == "self" and _moves_alike(node, rule)
        with suppress(ValueError):
            return run_on_numbers(node, label, self.values) if moves and isinstance(label, Tensor) else None
        return None


def _moves_alike(node: fx.Node, rule: Rule) -> bool:
    """Whether a node moves what it is given in the same way at every size, or its shape tells how it does, as
    that of a view or a cut.

    What is padded on one side by an amount that a size decides, and cut by as much on the other, keeps its
    shape and is shifted.
    """
    others = [value for name, value in arguments(node).items() if name != rule.moves]
    return (
        bool(rule.all("shape"))
        or node.target is torch.ops.aten.slice.Tensor
        or not any(
            isinstance(leaf, fx.Node) and is_dynamic(leaf.meta.get("val"))
            for leaf in pytree.tree_leaves(others)
        )
    )


def _lies_along(label: Any, recorded: Any, size: Any) -> bool:
    """Whether a dimension of the fused value lies, whole and in order, along one dimension of what a node
    gives, whatever its size.

    Labels show where it lies at the small sizes of the analysis alone, at which a single window may hold all
    tokens, and a cut may leave them all.
    """
    if isinstance(label, (list, tuple)) and isinstance(recorded, (list, tuple)):
        return len(recorded) == len(label) and all(map(_lies_along, label, recorded, repeat(size)))
    if not (isinstance(label, Tensor) and isinstance(recorded, Tensor)):
        return False
    moved = Axis.of(label)
    if moved is None:  # one element, which nothing can move
        return isinstance(size, int) and size == 1
    dim, *others = moved.varying()
    # Written alike, and not merely equal by what the capture assumed: an exporter can take a number of
    # windows for one.
    is_same = not others and str(recorded.shape[dim]) == str(size)
    return is_same and torch.equal(moved.numbers.reshape(-1), torch.arange(label.shape[dim]))


def _part(node: fx.Node, value: Value, axis: Axis, labels: dict[int, Tensor]) -> _Part | None:
    sources: list[int | None] = [None] * len(value.shape)
    for lead, label in labels.items():
        moved = Axis.of(label)
        if moved is None or len(moved.varying()) != 1 or sources[moved.dim] is not None:
            return None
        sources[moved.dim] = lead
    if any(
        source is None and size != 1 and dim not in axis.varying()
        for dim, (source, size) in enumerate(zip(sources, value.shape, strict=True))
    ):
        return None
    return _Part(node, axis.numbers.reshape(-1).numpy(), tuple(sources))


def _take_out(
    program: Program,
    analysis: Analysis,
    nodes: dict[str, fx.Node],
    fused: _Fused,
    part: _Part,
    index: int,
) -> None:
    """Compute one part of its own rows, in the place where it was taken out: in the module of the product,
    which has returned by then, it would be a call of that module which the model does not have.
    """
    graph, anchor = program.module.graph, nodes[part.node.name]
    rows = part.rows - analysis.numbering.slot_of(int(part.rows.min())).base
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(anchor):
        for node in fused.chain:
            original = nodes[node.name]
            if node in fused.row_dims:
                name = program.free_name(f"{node.target}_{index}")
                _add_part(program, analysis, target_name(node), name, rows, fused.row_dims[node])
                copies[original] = stamp(graph.get_attr(name), NAME)
            else:
                copies[original] = stamp(graph.node_copy(original, lambda n: copies.get(n, n)), NAME, anchor)
        result = _laid_out(copies[nodes[fused.chain[-1].name]], fused.dim, part, analysis, anchor)
    anchor.replace_all_uses_with(result)


def _laid_out(value: fx.Node, dim: int, part: _Part, analysis: Analysis, anchor: fx.Node) -> fx.Node:
    """Bring what was computed of the rows of one part into the shape that the original took out."""

    def call(target: Any, *args: Any) -> fx.Node:
        return stamp(anchor.graph.call_function(target, args), NAME, anchor)

    dims = [at for at, source in enumerate(part.sources) if source is None]
    # The dimensions of the part, as they lie in what was computed.
    places = range(len(part.sources) - len(dims) + 1)
    order = [at for one in places for at in (dims if one == dim else [part.sources.index(one)])]
    shape, recorded = analysis.walk.values[part.node].shape, part.node.meta["val"].shape
    if len(dims) != 1:
        value = call(
            torch.ops.aten.reshape.default,
            value,
            [
                call(torch.ops.aten.sym_size.int, value, part.sources[at])
                if isinstance(recorded[at], torch.SymInt) and part.sources[at] is not None
                else shape[at]
                for at in order
            ],
        )
    if order != sorted(order):
        value = call(torch.ops.aten.permute.default, value, [order.index(at) for at in range(len(order))])
    return value


def _add_part(program: Program, analysis: Analysis, name: str, new: str, rows: np.ndarray, dim: int) -> None:
    """Register some rows of a weight as a weight of its own; to the verifier its channels are those of the
    whole.
    """
    weight, whole, cut = attribute(program.module, name), program.parts.get(name), Cut(dim, rows[None])
    # Rows that lie together are not copied: they share the storage of the caller's weight, as all does that a
    # program holds of it. Of all of them no view could be told from a copy.
    together = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))) and len(rows) < len(weight)
    is_view = together and dim == 0 and weight.is_contiguous()
    part = weight.narrow(0, int(rows[0]), len(rows)) if is_view else cut.apply(weight)
    set_weight(program.module, new, nn.Parameter(part.detach(), requires_grad=weight.requires_grad))
    program.recipes[new] = program.recipe(name).then(cut)
    source, indices = (name, rows) if whole is None else (whole.source, np.array(whole.rows)[rows])
    program.parts[new] = SplitWeight(new, source, dim, tuple(indices.tolist()))
    numbers = [analysis.numbering.numbers(name, each) for each in range(weight.dim())]
    if (along := numbers[dim]) is not None:
        numbers[dim] = along[torch.from_numpy(rows)]
    program.numbers[new] = numbers


def fused_weights(plan: PruningPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: the weights of a model that a result holds in parts, put together again, each row where it
    stood among those that stay.

    Args:
        plan: of the result.
        weights: of the result.

    Raises:
        RuntimeError: the parts of one have lost different numbers of positions along another dimension.
    """
    slices = plan.slices() if plan.splits else {}
    fused = {}
    for name in dict.fromkeys(split.source for split in plan.splits):
        parts = [split for split in plan.splits if split.source == name]
        dim = parts[0].dim
        removed = {index for _, index in slices.get((name, dim), ())}
        rows = [row for part in parts for row in part.rows if row not in removed]
        joined = torch.cat([weights[part.name].detach() for part in parts], dim)
        fused[name] = joined.index_select(dim, torch.argsort(torch.tensor(rows, device=joined.device)))
    return fused
