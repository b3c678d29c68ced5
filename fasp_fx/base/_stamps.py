"""Which pass wrote a node."""

from __future__ import annotations

from torch import fx

#: key of ``node.meta``, and of ``node.meta["custom"]``, under which a node that a pass wrote carries the
#: pass's name
WRITTEN_BY = "fasp_fx_pass"


def stamp(node: fx.Node, name: str, like: fx.Node | None = None) -> fx.Node:
    """Mark a node as written by the pass ``name``; provenance such as the module stack is taken from
    ``like``.
    """
    if like is not None:
        stand_for(node, like)
    node.meta[WRITTEN_BY] = name
    # What exporting, decomposing and saving keep of a node's meta.
    node.meta["custom"] = {**node.meta.get("custom", {}), WRITTEN_BY: name}
    return node


def stand_for(node: fx.Node, like: fx.Node) -> None:
    """Say of a node that it comes from where ``like`` does: without its module stack, torch cannot unflatten
    the program, and without either quantisers pass it over; and what was noted of ``like``, under ``custom``.
    """
    for key in ("nn_module_stack", "torch_fn", "stack_trace", "source_fn_stack", "custom"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def read_stamps(graph: fx.Graph) -> None:
    """Show again what an export kept of the stamps."""
    for node in graph.nodes:
        name = node.meta.get("custom", {}).get(WRITTEN_BY)
        if name is not None:
            node.meta[WRITTEN_BY] = name
