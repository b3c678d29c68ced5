from ._distillation import (
    DistillationConfig as DistillationConfig,  # The options of one distillation
    Match as Match,  # what a distillation compares: a loss of your own
)
from ._gates import (
    Gates as Gates,  # One gate for every channel set of a model's groups; attach_gates makes them
    attach_gates as attach_gates,  # Put a gate on every channel set of a model's groups, for any training loop to learn which go
)
from ._optimizer import (
    cut_optimizer as cut_optimizer,  # Let an optimiser of torch.optim go on with a smaller model
)
from ._recovery import (
    distil as distil,  # Train a pruned model towards the outputs of the dense one (Hinton et al., 2015, arXiv 1503.02531)
)
from ._schedule import (
    Schedule as Schedule,  # When a model in training becomes smaller, and by how much
    cubic as cubic,  # Prunings spread over a training, large ones first
    lightning_callback as lightning_callback,  # A callback that prunes in Lightning's Trainer
    trainer_callback as trainer_callback,  # A callback that prunes in transformers' Trainer
)

__all__ = [
    "DistillationConfig",
    "Gates",
    "Match",
    "Schedule",
    "attach_gates",
    "cubic",
    "cut_optimizer",
    "distil",
    "lightning_callback",
    "trainer_callback",
]
