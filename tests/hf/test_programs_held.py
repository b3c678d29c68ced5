"""The programs of one model share their weights: what one of them cannot lose is refused."""

from __future__ import annotations

from typing import Any

import pytest
from generators import dense

import fasp_fx
from fasp_fx import hf
from fasp_fx.pruning.check import _check
from fasp_fx.pruning.check._compare import Seen

pytestmark = pytest.mark.usefixtures("shared_captures")


def test_what_one_program_cannot_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where a weight of the encoder is smaller, in all programs but the planned one."""
    original, weight = _check.compare, "encoder.block.0.layer.1.DenseReluDense.wo.weight"

    def compare(reference: Any, module: Any, pruned: Any, inputs: Any) -> Seen:
        ours, theirs = pruned.weights().get(weight), reference.weights().get(weight)
        lost = ours is not None and theirs is not None and ours.shape != theirs.shape
        return Seen(0.5, False) if lost else original(reference, module, pruned, inputs)

    monkeypatch.setattr(_check, "compare", compare)
    with pytest.raises(
        fasp_fx.VerificationError, match="the program 'encode' of the model cannot lose what the plan removes"
    ):
        hf.prune(dense("t5"), sparsity=0.2, score="magnitude", restore=None)
