"""The only code that takes channels out of a program: small passes and the pipeline that verifies after each.

Every pass is a function ``ExportedProgram -> ExportedProgram``; those that touch no weight
(``PinAttentionScale``, ``KeepDenseCount``, ``PadValueHeads``) are ``torch.fx`` ``PassBase`` too.
``Prune(plan)`` is all of them in order.
"""

from __future__ import annotations

from fasp_fx.base._stamps import WRITTEN_BY, stamp

from ._foreign import Foreign
from ._pipeline import Pipeline, Prune, RestoreWeights, SplitFusedProducers
from ._run import GraphPass, Pass, split_fused
from ._verify import verify
from .attention import PadValueHeads, PinAttentionScale
from .dense_count import KeepDenseCount
from .remove_channels import RemoveChannels
from .skip_blocks import SkipBlocks

__all__ = [
    "WRITTEN_BY",
    "Foreign",
    "GraphPass",
    "KeepDenseCount",
    "PadValueHeads",
    "Pass",
    "PinAttentionScale",
    "Pipeline",
    "Prune",
    "RemoveChannels",
    "RestoreWeights",
    "SkipBlocks",
    "SplitFusedProducers",
    "split_fused",
    "stamp",
    "verify",
]
