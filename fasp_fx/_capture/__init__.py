"""How a model becomes a functional graph, and a graph an exported program."""

from ._capture import capture, export_again, is_plain_graph, recapture, recorded_shapes, upper_bound

__all__ = ["capture", "export_again", "is_plain_graph", "recapture", "recorded_shapes", "upper_bound"]
