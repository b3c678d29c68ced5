"""How a model becomes a functional graph, and a graph an exported program."""

from ._capture import capture, in_training, recapture
from ._export import export_again
from ._functional import is_plain_graph, take_apart
from ._fx import is_pure
from ._shapes import by_shapes
from ._sizes import lower_bound, recorded_shapes, upper_bound

__all__ = [
    "by_shapes",
    "capture",
    "export_again",
    "in_training",
    "is_plain_graph",
    "is_pure",
    "lower_bound",
    "recapture",
    "recorded_shapes",
    "take_apart",
    "upper_bound",
]
