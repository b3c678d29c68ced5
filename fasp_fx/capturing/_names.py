"""Names of nodes that nothing else has."""

from __future__ import annotations

import keyword
from collections.abc import Iterable

from torch import fx, nn

from ..errors import CaptureError

#: attributes that every graph module has, or the one that torch.export makes of a program
_OF_GRAPH_MODULES = (
    frozenset(dir(fx.GraphModule))
    | vars(fx.GraphModule({}, fx.Graph())).keys()
    | {"meta", "range_constraints", "module_call_signatures"}
)


def check_names(weights: Iterable[str]) -> None:
    """Refuse weights under names that a graph module has for something else, such as a submodule ``graph``,
    or that are words of Python, such as ``class``.

    Raises:
        CaptureError: names the attribute.
    """
    for name in weights:
        first = name.partition(".")[0]
        reserved = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if reserved is not None:
            raise CaptureError(
                f"the model holds '{name}', but '{reserved}' is a word of Python, which no graph can write;"
                f" rename '{reserved}' in the model"
            )
        if first in _OF_GRAPH_MODULES:
            raise CaptureError(
                f"the model holds '{name}', but torch.fx has '{first}' for an attribute of every graph;"
                f" rename '{first}' in the model"
            )


def own_names(module: nn.Module, graph: fx.Graph) -> None:
    """Rename nodes of a graph called like a weight of its module that they are not: inputs, and tensors that
    a graph makes, have channels by their names as weights have.

    An argument ``x`` beside a parameter ``x`` is such a one. A node called ``self`` hides the module in
    generated code.
    """
    weights = {
        name
        for name, _ in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    for node in graph.nodes:
        wanted, called = node.name, weights if node.op != "get_attr" else set()
        while node.name in called or node.name == "self":
            wanted = f"{wanted}_node"
            node._rename(wanted)


__all__ = ["check_names", "own_names"]
