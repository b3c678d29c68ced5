"""The only code that takes channels out of a program: small passes and the pipeline that verifies after each.

Every pass is a function ``ExportedProgram -> ExportedProgram``; those that touch no weight
(``PinAttentionScale``, ``KeepDenseCount``, ``PadValueHeads``) are ``torch.fx`` ``PassBase`` too.
``Prune(plan)`` is all of them in order.
"""

from __future__ import annotations

from fasp_fx.base._stamps import WRITTEN_BY, stamp

from ._base import GraphPass, Pass
from ._foreign import Foreign
from ._pipeline import Pipeline, Prune
from ._run import split_fused
from ._unshare import share_again
from ._verify import verify
from .attention import PadValueHeads, PinAttentionScale
from .dense_count import KeepDenseCount
from .remove_channels import RemoveChannels
from .restore_weights import RestoreWeights
from .skip_blocks import SkipBlocks
from .split_producers import SplitFusedProducers

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
    "share_again",
    "split_fused",
    "stamp",
    "verify",
]
