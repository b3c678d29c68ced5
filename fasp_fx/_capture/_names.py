"""Names of nodes that nothing else has."""

from __future__ import annotations

from torch import fx


def own_names(module: fx.GraphModule) -> None:
    """Rename nodes called like a weight that they are not: inputs, and tensors that a graph makes, have channels by their names as weights have.

    An argument ``x`` beside a parameter ``x`` is such a one. A node called ``self`` hides the module in generated code.
    """
    weights = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))}
    for node in module.graph.nodes:
        wanted, called = node.name, weights if node.op != "get_attr" else set()
        while node.name in called or node.name == "self":
            wanted = f"{wanted}_node"
            node._rename(wanted)


__all__ = ["own_names"]
