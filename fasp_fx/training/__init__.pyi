from ._distillation import (
    DistillationConfig as DistillationConfig,  # The options of one distillation
    Match as Match,  # what a distillation compares: a loss of your own
)
from ._gates import (
    Gates as Gates,  # One gate for every channel set of a model's groups; attach_gates makes them
    attach_gates as attach_gates,  # Put a gate on every channel set of a model's groups, for any training loop to learn which go
)
from ._recovery import (
    distil as distil,  # Train a pruned model towards the outputs of the dense one (Hinton et al., 2015, arXiv 1503.02531)
)

__all__ = [
    "DistillationConfig",
    "Gates",
    "Match",
    "attach_gates",
    "distil",
]
