"""How a model becomes a functional graph, and a graph an exported program."""

from ._capture import (
    Decompositions,
    any_number_of_steps,
    capture,
    composites,
    export_again,
    is_plain_graph,
    recapture,
    recorded_shapes,
    single_layers,
    taken_apart,
    upper_bound,
)

__all__ = [
    "Decompositions",
    "any_number_of_steps",
    "capture",
    "composites",
    "export_again",
    "is_plain_graph",
    "recapture",
    "recorded_shapes",
    "single_layers",
    "taken_apart",
    "upper_bound",
]
