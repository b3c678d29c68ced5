"""Functional graphs of operators: what an exporter left that is not one, and how it is taken apart."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fasp_fx.base import (
    FakeTensor,
    HigherOrderOperator,
    OpOverload,
    aot_export_module,
    decomposition_table,
    is_composite,
    is_transform,
    lying_otherwise,
    pytree,
    quiet,
    rename,
    schema_of,
    storage_of,
    tolerable,
    without_overrides,
    without_stack_traces,
)
from fasp_fx.errors import first_line
from fasp_fx.patterns import lookup

from ._fx import applied, call_in_words, remove_dropouts, stand_for, views_may_copy
from ._rewrites import LAYERS, own_states
from ._shapes import by_shapes
from ._sizes import same_sizes

_log = logging.getLogger("fasp_fx")

_ATEN = torch.ops.aten


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Functionalise, with what ``torch.func`` transforms and what stands in regions of its own; most programs
    are exported functional and keep as they are.
    """
    if is_functional(exported):
        return exported
    with quiet():
        return exported.run_decompositions({})


def is_functional(exported: ExportedProgram) -> bool:
    """Whether nothing in a program writes, and nothing stands in a region of its own."""
    return all(map(_is_functional, exported.graph.nodes))


def _is_functional(node: fx.Node) -> bool:
    if node.op == "get_attr":  # a submodule: a region with its own gradient or autocast mode, or a function
        return all(map(_takes_functions, node.users)) and _stays(node)
    is_higher = isinstance(node.target, HigherOrderOperator)
    return _takes_functions(node) if is_higher else not (_writes(node) or is_transform(node.target))


def take_apart(graph: fx.Graph) -> None:
    """Write operators without a rule that are made of others, and assignments to slices, as what they are
    made of, which may have rules, and recurrent operators layer by layer; one after the other, in a
    functional graph with its values recorded.

    What cannot be followed so (it asks for what a symbolic size is, say) stays whole.
    """
    views_may_copy(graph)  # what is executed can lie otherwise than what was traced
    waiting, known = list(graph.nodes), dict[str, fx.Graph | None]()
    while waiting:
        node = waiting.pop()
        way = _way_apart(node)
        if way is None:
            continue
        try:
            waiting += _written_out(node, way, known)
        except tolerable(Exception) as reason:  # a decomposition raises what it likes
            _log.info("'%s' (%s) stays whole: %s", node.name, node.target, first_line(reason))
    own_states(graph)


def _way_apart(node: fx.Node) -> Callable[..., Any] | None:
    """How to take an operator apart, in terms of others; ``None`` where it stays."""
    operator: Any = node.target
    if operator in WAYS or not isinstance(operator, OpOverload) or not _lacks_rule(node):
        return WAYS.get(operator)
    return operator.decompose if is_composite(operator) else decomposition_table.get(operator)


def _lacks_rule(node: fx.Node) -> bool:
    """Whether nothing is known of what an operator does to channels; what computes positions and indices of
    nothing, or of one another, touches none.
    """
    return lookup(node.target) is None and any(
        isinstance(value := operand.meta.get("val"), Tensor)
        and (value.is_floating_point() or value.is_complex())
        for operand in node.all_input_nodes
    )


def _written_out(node: fx.Node, way: Callable[..., Any], known: dict[str, fx.Graph | None]) -> list[fx.Node]:
    """The nodes that stand in the place of one.

    Args:
        known: what stands for others; that of a call just like one of these is not traced again, nor one that
            stays whole.
    """
    graph, operands = node.graph, node.all_input_nodes
    call = call_in_words(node, lambda operand: operand.meta["val"])
    if call not in known:
        known[call] = None  # if what follows raises
        known[call] = _traced(node, way)
    traced = known[call]
    if traced is None:
        raise NotImplementedError
    copied = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(traced, copied)
    written = [copied[each] for each in traced.nodes if each.op == "call_function"]
    for each in written:
        stand_for(each, node)
        if each.target is _ATEN.sym_size.int:
            _read_off_inputs(each)
    one = isinstance(node.meta["val"], Tensor)
    for old, new in [(node, results[0])] if one else [(user, results[user.args[1]]) for user in node.users]:
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        if new in written:
            new.name = old.name  # by which a program knows what it returns
    if not one:
        graph.erase_node(node)
    return written


def _traced(node: fx.Node, way: Callable[..., Any]) -> fx.Graph:
    """What an operator is made of, in terms of its operands."""
    operands = node.all_input_nodes

    def compute(*values: Any) -> Any:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        with without_overrides():  # a tracer's own would record the operator as it is
            results = way(*args, **kwargs)
        if results is NotImplemented:  # as decompositions of torch's decline
            raise NotImplementedError
        return (results,) if isinstance(results, Tensor) else tuple(results)

    module = nn.Module()
    module.forward = compute
    with quiet(), torch.no_grad(), by_shapes(), without_stack_traces():
        # Of what lies in order, an operator would not write down that it must (``contiguous``).
        stand_ins = [_stand_in(operand.meta["val"]) for operand in operands]
        module_traced, _ = aot_export_module(
            module, stand_ins, trace_joint=False, pre_dispatch=True, decompositions={}
        )
    traced = cast(fx.GraphModule, module_traced).graph
    views_may_copy(traced)
    if any(
        each.op == "get_attr"
        or (each.target == node.target and node.target not in LAYERS)  # it would be taken apart for ever
        # Nothing is won where channels end all the same; and what the stand-ins were asked (their strides,
        # whether they are trained) is true of them alone.
        or (isinstance(each.target, OpOverload) and _lacks_rule(each) and _way_apart(each) is None)
        for each in traced.nodes
    ):
        raise NotImplementedError
    (output,) = traced.find_nodes(op="output")
    for copy in traced.find_nodes(op="call_function", target=_ATEN.clone.default):
        # What lies in order already needs no copy; a result is one, or it could be an input of the program.
        if copy.kwargs == {"memory_format": torch.contiguous_format} and output not in copy.users:
            copy.target, copy.kwargs = _ATEN.contiguous.default, {}
    return traced


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return value
    return lying_otherwise(value).requires_grad_(value.requires_grad)


def _read_off_inputs(size: fx.Node) -> None:
    """Let a size that is read off a tensor be one that the graph has, or be read off an input: it says
    nothing of channels then.
    """
    places = (
        (node, dim)
        for node in size.graph.find_nodes(op="placeholder")
        for dim, length in enumerate(getattr(node.meta.get("val"), "shape", ()))
        if same_sizes([length], [size.meta["val"]])
    )
    others = itertools.takewhile(lambda node: node is not size, size.graph.nodes)
    counted = (node for node in others if isinstance(node.meta.get("val"), torch.SymInt))
    same = (node for node in counted if same_sizes([node.meta["val"]], [size.meta["val"]]))
    if place := next(places, None):
        size.args = place
    elif other := next(same, None):
        size.replace_all_uses_with(other)
        size.graph.erase_node(size)


def _takes_functions(node: fx.Node) -> bool:
    """Whether a node is a call of an operator with a rule that is given functions, as flex attention is."""
    return isinstance(node.target, HigherOrderOperator) and lookup(node.target) is not None


def _stays(node: fx.Node) -> bool:
    """Whether the function that a node looks up would be taken apart into what it is."""
    module = node.graph.owning_module
    function = None if module is None else getattr(module, str(node.target), None)
    return isinstance(function, fx.GraphModule) and all(map(_is_simple, function.graph.nodes))


def _is_simple(node: fx.Node) -> bool:
    """Whether a node of a function is neither made of others nor writes into anything."""
    target = node.target
    return node.op in ("placeholder", "output") or (
        isinstance(target, OpOverload) and not _writes(node) and not is_composite(target)
    )


def is_plain(node: fx.Node) -> bool:
    """Whether a node of a graph with its weights as attributes is no call but of an operator and what an
    exporter leaves beside those, which takes their items or computes with sizes.
    """
    target: Any = node.target
    return node.op in ("placeholder", "output", "get_attr") or (
        isinstance(target, (OpOverload, HigherOrderOperator))
        or getattr(target, "__module__", None) in ("_operator", "math")
        or getattr(target, "__name__", "").startswith("sym_")
    )


# --- Operators that write into a tensor that the graph has made, as the operators that return the result.
#
# Functionalising a graph traces it once more, which takes longer than its export. Nearly all writes in models
# are into what is known under no other name any more (``relu_``, ``position += offset``) or into a part of it
# (``mask[:, 1:] = 0``), and need no trace.

#: what puts a part back into the whole that an operator has taken it out of
_BACK: dict[Any, OpOverload] = {
    _ATEN.slice.Tensor: _ATEN.slice_scatter.default,
    _ATEN.select.int: _ATEN.select_scatter.default,
}


def out_of_place(graph: fx.Graph) -> None:
    """Rewrite such writes in a graph whose recorded tensors share memory as those of the trace did."""
    writes = [node for node in graph.nodes if _writes(node)]
    if not writes or any(is_transform(node.target) for node in graph.nodes):
        return
    written = {storage_of(node.meta.get("val")) for node in writes}
    remove_dropouts(graph)
    sharing: dict[object, list[fx.Node]] = {}
    for node in graph.nodes:
        for storage in written & {storage_of(value) for value in pytree.tree_leaves(node.meta.get("val"))}:
            sharing.setdefault(storage, []).append(node)
    for alike in sharing.values():
        _write_beside(graph, alike)


def _write_beside(graph: fx.Graph, alike: list[fx.Node]) -> None:
    """Rewrite all writes into one piece of memory, if each of them can be: after one, what is read of the
    memory is taken anew out of what was returned.

    Args:
        alike: the nodes that give it or parts of it, in graph order.
    """
    base = alike[0]
    whole: dict[fx.Node, Any] = {node: node.args[0] if node.args else None for node in alike[1:]}
    twins = {node: _twin(node) for node in whole if _writes(node)}
    if (
        base.op != "call_function"
        or _writes(base)
        or None in twins.values()
        or not all(source is base or source in whole for source in whole.values())
        or any(
            _is_read_later(node, [whole[part] for part in _way(node, whole, twins)], alike) for node in twins
        )
    ):
        return
    current = {base: base}  # what has the value of a node since the last write

    def read(node: fx.Node, user: fx.Node) -> fx.Node:
        if node not in current and node in whole:
            if node in twins:
                return read(whole[node], user)
            with graph.inserting_before(user):
                current[node] = graph.node_copy(node, lambda operand: read(operand, user))
            _record(current[node], node)
        return current.get(node, node)

    nodes = list(graph.nodes)
    for node in nodes[nodes.index(base) + 1 :]:
        for operand in node.all_input_nodes:
            operand_now = read(operand, node)
            if operand_now is not operand:
                node.replace_input_with(operand, operand_now)
                if node.op == "output":  # a program knows by name what it returns
                    name = operand.name
                    rename(operand, f"{name}_before")
                    rename(operand_now, name)
        if node in twins:
            written_value, now = node, {node: node}
            for part in _way(node, whole, twins):
                if part.target in _BACK:
                    put = (read(whole[part], node), written_value, *part.args[1:])
                    with graph.inserting_after(written_value):
                        written_value = graph.call_function(_BACK[part.target], put, part.kwargs)
                    _record(written_value, node)
                now[whole[part]] = written_value
            node.target = twins[node]
            current.clear()
            current.update(now)
        elif node in whole:
            current[node] = node


def _way(node: fx.Node, whole: Mapping[fx.Node, fx.Node], twins: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that take a part out of the next one, or write into it, from one on, as far as what they give
    can be put back.
    """
    while node in whole and (node in twins or node.target in _BACK):
        yield node
        node = whole[node]


def _is_read_later(write: fx.Node, known: list[fx.Node], alike: list[fx.Node]) -> bool:
    """Whether memory is read after a write under a name that what was written cannot be put back into.

    Args:
        known: the names that it can be put back into.
    """
    earlier = [] if alike[0] in known else alike[: alike.index(write)]
    return any(write < user for node in earlier if node not in known for user in node.users)


def _record(node: fx.Node, like: fx.Node) -> None:
    """Record what a node gives that comes from where another does."""
    stand_for(node, like)
    node.meta["val"] = _made(node, node.target)


def _made(node: fx.Node, operator: Any) -> Any:
    """What an operator makes of what a node is called with."""
    values = pytree.tree_leaves([operand.meta.get("val") for operand in node.all_input_nodes])
    mode, *_ = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, torch.no_grad():
        return applied(node, operator)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def _twin(node: fx.Node) -> OpOverload | None:
    """The operator that returns what the one of a node writes into its first argument alone, and takes the
    same arguments; ``None`` also for assignments, which become operators of other kinds.
    """
    target: Any = node.target
    name, _, overload = target.name().partition("::")[2].partition(".")
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    twin = getattr(packet, overload or "default", None)
    if not isinstance(twin, OpOverload) or schema_of(twin).is_mutable:
        return None
    first, *rest = schema_of(target).arguments
    alone = first.is_write and not any(argument.is_write for argument in rest)
    same = [one.name for one in rest] == [other.name for other in schema_of(twin).arguments[1:]]
    return twin if alone and same and _keeps_type(node, twin) else None


def _keeps_type(node: fx.Node, twin: OpOverload) -> bool:
    """Whether an operator returns the type of what the one in its place writes into, as far as that can be
    told.
    """
    try:
        return bool(_made(node, twin).dtype == node.meta["val"].dtype)
    except tolerable(Exception):
        return False  # an operator raises what it likes; the write stays one, and the graph is traced again


# --- Assignments to a slice (``x[:, 1:] += y``), written as what they are to channels: a concatenation of
# what stays and what is new; and to a mask, a choice.
#
# Functionalised the former are ``slice_scatter`` and ``select_scatter`` of a ``copy``. Nothing can go
# along the dimension of a scatter, which has no gradient for complex tensors, and a copy has none at all.


def _slice_scatter(
    self: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    """The operator stays as it is where the pieces are not known while capturing."""
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    fixed = all(type(bound) is int for bound in (start, end, step))
    if (
        not fixed
        or step != 1
        or src.dtype != self.dtype
        or (isinstance(src.shape[dim], int) and src.shape[dim] == 0)
    ):
        raise NotImplementedError
    before = [] if start == 0 else [_ATEN.slice.Tensor(self, dim, 0, start)]
    after = [] if end == sys.maxsize else [_ATEN.slice.Tensor(self, dim, end, sys.maxsize)]
    pieces = [
        piece
        for piece in (*before, src, *after)
        if not (isinstance(piece.shape[dim], int) and piece.shape[dim] == 0)
    ]
    return _ATEN.cat.default(pieces, dim) if len(pieces) > 1 else _ATEN.clone.default(src)


def _select_scatter(self: Tensor, src: Tensor, dim: int, index: Any) -> Any:
    if type(index) is not int:
        raise NotImplementedError
    rank = self.dim()
    return _slice_scatter(
        self, _ATEN.unsqueeze.default(src, dim % rank), dim % rank, index, None if index == -1 else index + 1
    )


def _index_put(self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """One value wherever a mask is true (``x[x > 1] = 1``)."""
    mask = indices[0] if len(indices) == 1 else None
    one = all(isinstance(size, int) and size == 1 for size in values.shape)
    if mask is None or mask.dtype != torch.bool or not one or accumulate:
        raise NotImplementedError
    for _ in range(self.dim() - mask.dim()):
        mask = _ATEN.unsqueeze.default(mask, -1)
    return _ATEN.where.self(mask, _ATEN.view.default(values, []), self)


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    if src.device != self.device:
        raise NotImplementedError
    cast = (
        _ATEN.clone.default(src) if src.dtype == self.dtype else _ATEN._to_copy.default(src, dtype=self.dtype)
    )
    return cast if cast.shape == self.shape else _ATEN.expand.default(cast, list(self.shape))


#: how operators are taken apart that have decompositions of ours, which raise where they stay
WAYS: dict[OpOverload, Callable[..., Any]] = {
    **LAYERS,
    _ATEN.copy.default: _copy,
    _ATEN.index_put.default: _index_put,
    _ATEN.slice_scatter.default: _slice_scatter,
    _ATEN.select_scatter.default: _select_scatter,
}
