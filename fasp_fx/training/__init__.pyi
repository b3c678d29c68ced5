from ._distillation import (
    DistillationConfig as DistillationConfig,  # The options of one distillation
)
from ._distillation import (
    Match as Match,  # what a distillation compares: a loss of your own
)
from ._gates import (
    Gates as Gates,  # One gate for every channel set of a model's groups; attach_gates makes them
)
from ._gates import (
    Scaled as Scaled,  # A parametrization that multiplies the columns of a weight by the gates of the channels that they read
)
from ._gates import (
    Target as Target,  # What is asked of the gates of a model, which no training changes and all copies share
)
from ._gates import (
    attach_gates as attach_gates,  # Put a gate on every channel set of a model's groups, for any training loop to learn which go
)
from ._recovery import (
    Lessons as Lessons,  # The batches, and what the loss keeps of what the dense model returns for them, one file for each
)
from ._recovery import (
    State as State,  # Everything that the rest of a training depends on
)
from ._recovery import (
    Trained as Trained,  # A module as an optimiser sees it; called like the module
)
from ._recovery import (
    Training as Training,  # One training of a module
)
from ._recovery import (
    distil as distil,  # Train a pruned model towards the outputs of the dense one (Hinton et al., 2015, arXiv 1503.02531)
)
from ._recovery import (
    split as split,  # Numbers of the batches to train on, and of those held out: a fraction of them, at least one, spread evenly
)

__all__ = [
    "DistillationConfig",
    "Gates",
    "Match",
    "attach_gates",
    "distil",
]
