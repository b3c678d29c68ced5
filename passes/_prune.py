"""A whole plan as one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ._pipeline import Pipeline
from .attention import PadValueHeads, PinAttentionScale
from .dense_count import KeepDenseCount
from .remove_channels import RemoveChannels
from .restore_weights import RestoreWeights
from .skip_blocks import SkipBlocks

if TYPE_CHECKING:
    import numpy as np

    from fasp_fx.analysis._analysis import Analysis
    from fasp_fx.analysis.plan import PruningPlan


class Prune(Pipeline):
    """Apply a plan: ``Prune(plan)(exported)`` is an exported program without the plan's channels.

    Precondition: the program is of the model that the plan was made for; foreign passes may have run on it in
    the same pipeline. Postcondition: it computes what the dense program computes with the removed activations
    at zero (with ``restored``: those weights in place of its own).

    Args:
        removal: the plan; inside the library also the channel numbers that go.
        restored: repaired weights by name, of the dense shapes; a plan holds none.
        reference: as for :class:`Pipeline`.
    """

    def __init__(
        self,
        removal: PruningPlan | np.ndarray,
        restored: dict[str, Tensor] | None = None,
        reference: Analysis | None = None,
    ) -> None:
        super().__init__(
            [
                PinAttentionScale(),
                RestoreWeights(restored or {}),
                SkipBlocks(removal),
                KeepDenseCount(removal),
                RemoveChannels(removal),
                PadValueHeads(),
            ],
            reference,
        )
