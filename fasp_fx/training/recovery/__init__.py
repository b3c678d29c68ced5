"""Training after pruning: what the closed forms leave is learned back from the dense model.

:func:`distil` trains a pruned model towards the outputs of the model it was made of, keeps the weights that
do best on batches held out of the training, and never returns worse ones than it was given
(docs/recovery.md).
"""

from __future__ import annotations

from ._config import DistillationConfig, DistillationOptions, Divergence, Match, SquaredError
from ._distil import distil

__all__ = ["DistillationConfig", "DistillationOptions", "Divergence", "Match", "SquaredError", "distil"]
