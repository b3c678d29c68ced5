"""Channels that lie along a dimension whose size varies: heads folded into the batch, as
``nn.MultiheadAttention`` has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from corpus.attention import attended
from torch import Tensor, nn

import fasp_fx
import fasp_fx.patterns
from fasp_fx.analysis import repeating


def drawn(samples: int, tokens: int = 5) -> Tensor:
    return torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(samples))


def test_exempt_channels_are_chosen_by_batches_of_other_sizes() -> None:
    model, data = attended(), [drawn(size) for size in (4, 4, 3, 1)]
    asked: dict[str, Any] = {"include": ("exempt",), "sparsity": 0.3, "allocation": "uniform"}
    result = fasp_fx.prune(model, (drawn(4),), calibration=data, **asked)
    assert not [note for note in result.report.notes if "not run" in note or "whole" in note]
    assert any(not group.consumers for group in result.plan.groups)


def test_a_wrong_rule_is_seen_beside_exempt_channels() -> None:
    """The check by running masks them at sizes that are not those of the analysis, and sees what else is
    wrong there.
    """

    @torch.library.custom_op("fasp_fx_tests::turned", mutates_args=())
    def turned(self: Tensor) -> Tensor:
        return self.roll(1, -1)

    turned.register_fake(torch.empty_like)
    operator = torch.ops.fasp_fx_tests.turned.default
    fasp_fx.patterns.register(operator, "self[...] -> [...]")
    try:
        model = attended(lambda h: turned(h).relu())
        with pytest.warns(fasp_fx.VerificationWarning, match=r"'out\.weight' stays whole"):
            result = fasp_fx.prune(
                model, (drawn(4),), include=("exempt",), sparsity=0.3, score="random", restore=None
            )
        assert any(not group.consumers for group in result.plan.groups)
    finally:
        fasp_fx.patterns.unregister(operator)


def test_numbers_that_do_not_repeat_have_no_place_at_other_sizes() -> None:
    exported = torch.export.export(
        nn.Identity(), (torch.zeros(7, 1),), dynamic_shapes=({0: torch.export.Dim("size")},)
    )
    recorded = next(iter(exported.graph.nodes)).meta["val"].shape
    assert repeating(torch.tensor([0, 1, 2])[:, None], recorded) is None
    assert repeating(torch.tensor([0, 1, 2])[:, None], (3, 1)) is not None
