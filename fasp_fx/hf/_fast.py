"""Rewrites of a captured decoder that change nothing but its speed: no checks inside, no copies of keys and
values, plain products for one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..base._stamps import stamp
from ..patterns import RESHAPES

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_WHOLE = 1 << 62

Call = Callable[..., fx.Node]


def without_checks(graph: fx.Graph) -> None:
    """Drop the assertions of the capture, whose place the model's own checks take, and slices that take
    everything.
    """
    for node in list(graph.nodes):
        if node.op == "call_module" or node.target in _CHECKS:
            graph.erase_node(node)
        elif node.target is aten.slice.Tensor and _takes_all(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _takes_all(node: fx.Node) -> bool:
    given: list[Any] = [*node.args[2:], *[None, None, 1][len(node.args) - 2 :]]
    start, end, step = given
    return start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= _WHOLE))


def grouped(graph: fx.Graph) -> None:
    """Let attention read each key and value head once, where the model repeats it for the query heads that
    share it.
    """
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        padding: Any = node.args[2] if _pads_width(node.args[2]) else None
        key, times = _repeated(node.args[1])
        value, same = _repeated(node.args[2] if padding is None else padding.args[0])
        if times == 1 or same != times or node.kwargs.get("enable_gqa"):
            continue
        if padding is not None:
            with graph.inserting_before(node):
                value = stamp(
                    graph.call_function(padding.target, (value, *padding.args[1:]), dict(padding.kwargs)),
                    "grouped",
                    node,
                )
        node.args = (node.args[0], key, value, *node.args[3:])
        node.update_kwarg("enable_gqa", True)
        stamp(node, "grouped")
    graph.eliminate_dead_code()


def _pads_width(node: Any) -> bool:
    """Whether a node adds columns at the end of the last dimension, and nothing else."""
    if node.target is not aten.constant_pad_nd.default:
        return False
    borders = node.args[1]
    return len(borders) == 2 and bool(borders[0] == 0)


def _repeated(node: Any) -> tuple[Any, int]:
    """What is repeated and how often, if the node is ``[b, heads, l, d]`` repeated along a new dimension
    after the heads; else itself and 1.
    """
    inner = node
    for targets in (RESHAPES, {"aten.clone.default"}):
        if str(inner.target) in targets:
            inner = inner.args[0]
    if inner.target is not aten.expand.default:
        return node, 1
    opened: Any = inner.args[0]
    if opened.target is not aten.unsqueeze.default or opened.args[1] != 2:
        return node, 1
    before, after = _shape(opened.args[0]), _shape(node)
    if (
        len(before) != 4
        or len(after) != 4
        or not all(isinstance(size, int) for size in (before[1], after[1], before[3], after[3]))
    ):
        return node, 1
    times = after[1] // before[1]
    return (
        (opened.args[0], int(times)) if times * before[1] == after[1] and before[3] == after[3] else (node, 1)
    )


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def one_token(graph: fx.Graph) -> None:
    """Write out attention as it is for a query of one token.

    The heads that share keys then make one matrix product, where the fused kernel reads the keys once per
    head, and values may be narrower than keys. What is not understood stays.
    """
    masks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.find_nodes(op="call_function", target=_ATTENTION)):
        _write_out(graph, node, masks)
    graph.eliminate_dead_code()


def _write_out(graph: fx.Graph, node: fx.Node, masks: dict[fx.Node, fx.Node]) -> None:
    named: dict[str, Any] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args), **node.kwargs
    )
    query, key, value, mask, scale = (
        named["query"],
        named["key"],
        named["value"],
        named.get("attn_mask"),
        named.get("scale"),
    )
    cut = _cut_after(node) if _pads_width(value) else None
    value = value.args[0] if cut is not None else value
    q, k, v = _shape(query), _shape(key), _shape(value)
    fits = len(q) == len(k) == len(v) == 4 and all(isinstance(size, int) for size in (q[1], q[3], k[1], v[3]))
    if (
        not fits
        or scale is None
        or named.get("dropout_p")
        or named.get("is_causal")
        or not _simple(mask, q[1])
    ):
        return
    heads, shared = q[1], k[1]

    with graph.inserting_before(node):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return stamp(graph.call_function(target, args, kwargs), "one_token", node)

        rows = call(aten.reshape.default, query, [-1, shared, heads // shared, q[3]])
        scores = call(
            aten.matmul.default, call(aten.mul.Tensor, rows, scale), call(aten.transpose.int, key, 2, 3)
        )
        if mask is not None:
            if mask not in masks:
                masks[mask] = _additive(mask, heads, shared, query.meta["val"], call)
            scores = call(aten.add.Tensor, scores, masks[mask])
        weights = call(aten._safe_softmax.default, scores, -1)
        out = call(aten.reshape.default, call(aten.matmul.default, weights, value), [-1, heads, 1, v[3]])
    (node if cut is None else cut).replace_all_uses_with(out)
    if cut is not None:
        graph.erase_node(cut)
    graph.erase_node(node)


def _cut_after(node: fx.Node) -> fx.Node | None:
    """The slice that takes the padding of the values off the result, if that is all that reads it."""
    value: Any = node.args[2]
    width = _shape(value.args[0])[-1:]
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.slice.Tensor and users[0].args[1:] == (3, 0, *width):
        return users[0]
    return None


def _simple(mask: Any, heads: int) -> bool:
    """Whether a mask is ``[b, 1, 1, l]`` or ``[b, heads, 1, l]`` where the query is one token."""
    shape = _shape(mask)
    return mask is None or (len(shape) == 4 and isinstance(shape[1], int) and shape[1] in (1, heads))


def _additive(mask: fx.Node, heads: int, shared: int, query: Tensor, call: Call) -> fx.Node:
    """A mask as what is added to scores ``[b, shared, heads / shared, l]``; written before the first layer,
    it serves all.
    """
    if mask.meta["val"].dtype == torch.bool:
        zero, least = (
            call(aten.full.default, [], number, dtype=query.dtype, device=query.device)
            for number in (0.0, float("-inf"))
        )
        added = call(aten.where.self, mask, zero, least)
    else:
        added = mask
    if _shape(mask)[1] == 1:
        return added
    return call(aten.squeeze.dim, call(aten.unflatten.int, added, 1, [shared, heads // shared]), 3)


__all__ = ["grouped", "one_token", "without_checks"]
