"""The only code that changes a program: small passes and the pipeline that verifies after each."""

from __future__ import annotations

from ._base import WRITTEN_BY, Pass, Pipeline, stamp
from ._verify import verify
from .attention import PadValueHeads, PinAttentionScale
from .dense_count import KeepDenseCount
from .remove_channels import RemoveChannels
from .restore_weights import RestoreWeights
from .split_fused import SplitFusedProducers

__all__ = [
    "WRITTEN_BY",
    "KeepDenseCount",
    "PadValueHeads",
    "Pass",
    "PinAttentionScale",
    "Pipeline",
    "RemoveChannels",
    "RestoreWeights",
    "SplitFusedProducers",
    "stamp",
    "verify",
]
