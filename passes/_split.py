"""Split a fused producer by rows, where a layout ties prunable channels to others.

``linear(x, W)`` viewed as ``[heads, 3, d]`` cannot lose rows of the third part alone. Where every path from
the product takes out one part by mere movement, each part gets a product of its own with the rows it takes,
in the order it takes them. A weight of which the model takes ranges of rows apart by itself becomes several
weights first.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from fasp_fx.analysis.channels import Axis, Use, Value, marked, run_on_numbers
from fasp_fx.base._stamps import stamp
from fasp_fx.base.compat import pytree
from fasp_fx.capturing._fx import arguments, attribute, target_name
from fasp_fx.capturing._program import Program
from fasp_fx.capturing._sizes import is_dynamic
from fasp_fx.patterns import Rule, lookup

from ._pieces import add_part, delete_unused, numbers_of, take_apart

if TYPE_CHECKING:
    from fasp_fx.analysis._analysis import Analysis

#: of the pass, in messages and stamps
NAME = "split_fused_producers"
_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class _Part:
    """One tensor taken out of the product: its node, its rows in order, and how its dimensions come from the
    product's.
    """

    node: fx.Node
    rows: np.ndarray
    # Per dimension: a leading dimension of the product, -1 for channels, None for size 1.
    sources: tuple[int | None, ...]


def split(program: Program, analysis: Analysis) -> Program:
    """Split the producers that stand in the way; see :class:`SplitFusedProducers`."""
    if not analysis.conflicts:
        return program
    apart = take_apart(program, analysis, stuck_sets(analysis), NAME)
    if apart is not program:
        return apart  # what is fused in them is split next, when they are weights
    splitter = _Splitter(analysis)
    plans = [plan for plan in (splitter.plan(use) for use in splitter.fused()) if plan is not None]
    if not plans:
        return program
    program = program.copy()
    nodes = {node.name: node for node in program.module.graph.nodes}
    for use, chain, parts in plans:
        splitter.split(program, nodes, use, chain, parts)
    delete_unused(program, {name for use, chain, _ in plans for name in _weights_of(chain, use)})
    return program


class _Splitter:
    """Finds the products that can be split, and splits them.

    Args:
        analysis: of the program.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.canonical, self.aliases = analysis.program.canonical(), analysis.program.aliases()
        self.looked_up = Counter(
            self.canonical.get(target_name(node))
            for node in analysis.program.module.graph.find_nodes(op="get_attr")
        )

    # --- finding

    def fused(self) -> list[Use]:
        """The products whose rows are part of a conflict."""
        stuck = marked(int(self.analysis.labels.max(initial=-1)) + 1, stuck_sets(self.analysis))
        return [
            use
            for use in self.analysis.walk.facts.uses
            # an operator with several results has no rows that could be told apart
            if isinstance(self.analysis.walk.values[use.node], Value)
            and stuck[self.analysis.labels[numbers_of(self.analysis, use.node)]].any()
        ]

    def plan(self, use: Use) -> tuple[Use, list[fx.Node], list[_Part]] | None:
        value = self.analysis.walk.values[use.node]
        rows = _rows(value)
        if (
            len(attribute(self.analysis.program.module, use.weight).shape) != 2
            or use.columns.shape[0] != 1
            or use.columns.shape[2] != 1
        ):
            return None  # only matrices are split so far
        if rows is None or not _cloneable(use):
            return None
        chain = self._with_bias(use.node)
        if not self._only_there(chain, use):
            return None
        parts = self._parts(chain[-1], value)
        if parts is None:
            return None
        taken = np.sort(np.concatenate([part.rows for part in parts]))
        whole = np.sort(rows.numbers.reshape(-1).numpy())
        return (use, chain, parts) if len(parts) > 1 and np.array_equal(taken, whole) else None

    def _only_there(self, chain: list[fx.Node], use: Use) -> bool:
        """Whether the weights of a chain have one name each, and are looked up once, for one use: what is
        tied, used elsewhere or written into stays one tensor.
        """
        names = {self.canonical[name] for name in _weights_of(chain, use)}
        return all(len(node.users) == 1 for node in _weights_nodes(chain, use)) and all(
            self.looked_up[name] == len(self.aliases[name]) == 1 for name in names
        )

    def _with_bias(self, node: fx.Node) -> list[fx.Node]:
        """The product and the additions of a weight with an entry for each of its rows that follow it."""
        chain, rows = [node], self.analysis.walk.values[node].shape[-1:]
        while len(chain[-1].users) == 1:
            (user,) = chain[-1].users
            others = [n for n in user.all_input_nodes if n is not chain[-1]]
            if (
                user.target is not _ADD
                or len(others) != 1
                or others[0].op != "get_attr"
                or self.analysis.walk.values[others[0]].shape != rows
            ):
                break
            chain.append(user)
        return chain

    def _parts(self, root: fx.Node, product: Value) -> list[_Part] | None:
        lead = len(product.shape) - 1
        labels = [_label(product.shape, dim) for dim in range(lead)]
        sizes = root.meta["val"].shape[:lead]
        rows = _rows(self.analysis.walk.values[root])
        if rows is None:
            return None
        whole = np.unique(rows.numbers.reshape(-1).numpy())
        found: list[_Part] = []
        pending: list[tuple[fx.Node, list[Tensor]]] = [(root, labels)]
        while pending:
            node, at_node = pending.pop(0)
            for user in node.users:
                value = self.analysis.walk.values.get(user)
                carried = [self._carry(user, label) for label in at_node]
                if (
                    any(label is None for label in carried)
                    or len({id(v) for v in user.all_input_nodes if _is_tensor(self.analysis, v)}) != 1
                ):
                    return None
                if not all(
                    _holds_at_every_size(user, label, size)
                    for label, size in zip(carried, sizes, strict=True)
                ):
                    return None
                if isinstance(value, Value):
                    held = [(axis, axis.numbers.reshape(-1).numpy()) for axis in value.axes]
                    own = [(axis, numbers) for axis, numbers in held if np.isin(numbers, whole).any()]
                    if len(own) != 1:
                        return None
                    ((axis, numbers),) = own
                    if not np.array_equal(np.unique(numbers), whole):
                        part = _part(user, value, axis, [label for label in carried if label is not None])
                        if part is None:
                            return None
                        found.append(part)
                        continue
                pending.append((user, [label for label in carried if label is not None]))
        return found

    def _carry(self, node: fx.Node, label: Any) -> Any:
        """A label tensor moved the way ``node`` moves its input at every size, or ``None`` if the node does
        anything but move.
        """
        if node.target is operator.getitem and isinstance(label, (list, tuple)):
            return label[arguments(node)["1"]]
        rule = lookup(node.target)
        if (
            rule is None
            or rule.moves != "self"
            or not isinstance(label, Tensor)
            or not _moves_alike(node, rule)
        ):
            return None
        try:
            return run_on_numbers(node, label, self.analysis.walk.values)
        except ValueError:
            return None

    # --- rewriting

    def split(
        self, program: Program, nodes: dict[str, fx.Node], use: Use, chain: list[fx.Node], parts: list[_Part]
    ) -> None:
        graph = program.module.graph
        base_of_weight = self.analysis.numbering.slot_of(int(parts[0].rows.min())).base
        for index, part in enumerate(parts):
            rows = part.rows - base_of_weight
            anchor = nodes[part.node.name]
            copies: dict[fx.Node, fx.Node] = {}
            with graph.inserting_before(anchor):
                for original in _weights_nodes(chain, use):
                    if original.op == "get_attr":
                        name = program.free_name(f"{original.target}_{index}")
                        source = str(original.target)
                        add_part(program, self.analysis, source, name, rows, self._row_dim(source, use))
                        copies[nodes[original.name]] = stamp(graph.get_attr(name), NAME)
                    else:
                        copies[nodes[original.name]] = self._copy(nodes[original.name], copies, anchor)
                for original in chain:
                    copies[nodes[original.name]] = self._copy(nodes[original.name], copies, anchor)
                product = copies[nodes[chain[-1].name]]
                result = self._lay_out(graph, product, part)
            anchor.replace_all_uses_with(result)

    def _copy(self, node: fx.Node, copies: dict[fx.Node, fx.Node], anchor: fx.Node) -> fx.Node:
        # It is computed where the part was taken out: in the module of the product, which has returned by
        # then, it would be a call of that module which the model does not have.
        return stamp(anchor.graph.node_copy(node, lambda n: copies.get(n, n)), NAME, anchor)

    def _row_dim(self, name: str, use: Use) -> int:
        if name != use.weight:
            return 0  # a bias
        ((_, contracted),) = use.slots
        return 1 - contracted

    def _lay_out(self, graph: fx.Graph, product: fx.Node, part: _Part) -> fx.Node:
        """Bring the product of one part into the shape that the original took out."""

        def call(operator: Any, *args: Any) -> fx.Node:
            return stamp(graph.call_function(operator, args), NAME, part.node)

        value = self.analysis.walk.values[part.node]
        recorded = part.node.meta["val"].shape
        lead = list(range(max([d for d in part.sources if d is not None], default=-1) + 1))
        order = [*lead, *(dim for dim, source in enumerate(part.sources) if source == -1)]
        sizes: list[Any] = []
        for dim in lead:
            at = part.sources.index(dim)
            dynamic = isinstance(recorded[at], torch.SymInt)
            sizes.append(call(torch.ops.aten.sym_size.int, product, dim) if dynamic else value.shape[at])
        sizes += [value.shape[dim] for dim, source in enumerate(part.sources) if source == -1]
        node = call(torch.ops.aten.view.default, product, sizes)
        present = [
            ("lead", source) if source != -1 else ("own", dim)
            for dim, source in enumerate(part.sources)
            if source is not None
        ]
        laid = [("lead", dim) for dim in lead] + [("own", dim) for dim in order[len(lead) :]]
        permutation = [laid.index(item) for item in present]
        if permutation != sorted(permutation):
            node = call(torch.ops.aten.permute.default, node, permutation)
        for dim, source in enumerate(part.sources):
            if source is None:
                node = call(torch.ops.aten.unsqueeze.default, node, dim)
        return node


def stuck_sets(analysis: Analysis) -> np.ndarray:
    """The channel sets that the conflicts of a layout concern."""
    return np.unique(np.concatenate([conflict.classes for conflict in analysis.conflicts]))


def _label(shape: tuple[int, ...], dim: int) -> Tensor:
    return torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _is_tensor(analysis: Analysis, node: fx.Node) -> bool:
    value = analysis.walk.values.get(node)
    return (isinstance(value, Value) and not value.constant) or isinstance(value, tuple)


def _moves_alike(node: fx.Node, rule: Rule) -> bool:
    """Whether a node moves what it is given in the same way at every size, or its shape tells how it does, as
    that of a view or a cut.

    What is padded on one side by an amount that a size decides, and cut by as much on the other, keeps its
    shape and is shifted.
    """
    if any(rule.all(keyword) for keyword in ("shape", "span")):
        return True
    others = [value for name, value in arguments(node).items() if name != rule.moves]
    return not any(
        isinstance(leaf, fx.Node) and is_dynamic(leaf.meta.get("val")) for leaf in pytree.tree_leaves(others)
    )


def _holds_at_every_size(node: fx.Node, label: Any, size: Any) -> bool:
    """Whether a leading dimension of the product lies, whole and in order, along one dimension of what a node
    gives, whatever its size.

    Labels show where it lies at the small sizes of the analysis alone, at which a single window may hold all
    tokens, and a cut may leave them all.
    """
    recorded = node.meta.get("val")
    if isinstance(label, (list, tuple)):
        found = recorded if isinstance(recorded, (list, tuple)) else ()
        return len(found) == len(label) and all(
            _lies_along(one, made, size) for one, made in zip(label, found, strict=True)
        )
    return _lies_along(label, recorded, size)


def _lies_along(label: Any, recorded: Any, size: Any) -> bool:
    if not (isinstance(label, Tensor) and isinstance(recorded, Tensor)):
        return False
    moved = Axis.of(label)
    if moved is None:  # one element, which nothing can move
        return isinstance(size, int) and size == 1
    dim, *others = moved.varying()
    # Written alike, and not merely equal by what the capture assumed: an exporter can take a number of
    # windows for one.
    if others or str(recorded.shape[dim]) != str(size):
        return False
    return torch.equal(moved.numbers.reshape(-1), torch.arange(label.shape[dim]))


def _rows(value: Value) -> Axis | None:
    """The axis of a product along which the rows of its weight lie, the last; tokens may be numbered too, if
    there is a fixed number of them.
    """
    return next((axis for axis in value.axes if axis.varying() == [len(value.shape) - 1]), None)


def _part(node: fx.Node, value: Value, axis: Axis, labels: list[Tensor]) -> _Part | None:
    sources: list[int | None] = [-1 if dim in axis.varying() else None for dim in range(len(value.shape))]
    for lead, label in enumerate(labels):
        moved = Axis.of(label)
        if moved is None:
            continue
        if (
            moved.varying() != [moved.dim]
            or sources[moved.dim] is not None
            or not torch.equal(moved.numbers.reshape(-1), torch.arange(value.shape[moved.dim]))
        ):
            return None
        sources[moved.dim] = lead
    if any(source is None and size != 1 for source, size in zip(sources, value.shape, strict=True)):
        return None
    if any(lead not in sources for lead in range(len(labels))):
        return None
    return _Part(node, axis.numbers.reshape(-1).numpy(), tuple(sources))


def _cloneable(use: Use) -> bool:
    """Whether the weight reaches the product through nothing but dimension swaps."""
    return all(node.op == "get_attr" or node.target in _SWAPS for node in _upstream(use))


_SWAPS = {
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
    torch.ops.aten.mT.default,
}


def _upstream(use: Use) -> list[fx.Node]:
    """The nodes that lead from weights to the product, apart from its activation, weights first."""
    found: list[fx.Node] = []
    pending = [node for node in use.node.all_input_nodes if node is not use.activation]
    while pending:
        node = pending.pop()
        found.insert(0, node)
        pending += node.all_input_nodes
    return found


def _weights_nodes(chain: list[fx.Node], use: Use) -> list[fx.Node]:
    """The nodes that bring the weights of a chain: those of the product, then the biases."""
    return [*_upstream(use), *(n for node in chain[1:] for n in node.all_input_nodes if n.op == "get_attr")]


def _weights_of(chain: list[fx.Node], use: Use) -> list[str]:
    return [target_name(node) for node in _weights_nodes(chain, use) if node.op == "get_attr"]
