"""What an attention mask hides in calibration data takes no part in a choice, whatever stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators import dense

from fasp_fx import hf
from fasp_fx.allocation import Search

pytestmark = [
    pytest.mark.filterwarnings("ignore::fasp_fx.CalibrationWarning"),
]


SEARCH = Search(generations=1, offspring=3, sequences=2)


@pytest.mark.parametrize(
    ("loss", "allocation", "side"),
    [
        ("next-token", SEARCH, "right"),
        ("outputs", "global", "left"),
        pytest.param("outputs", SEARCH, "left", marks=pytest.mark.slow),
        pytest.param("next-token", "global", "right", marks=pytest.mark.slow),
    ],
    ids=["next-token, search", "outputs", "outputs, search", "next-token"],
)
def test_padding_chooses_nothing(loss: Any, allocation: Any, side: str) -> None:
    """Logits lie at the positions that are asked for, which a program has as an input of its own."""
    model = dense("llama_gqa")
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (4, 10))
    mask = torch.ones_like(ids)
    mask[:, slice(0, 5) if side == "left" else slice(5, None)] = 0
    found = [
        hf.prune(
            model,
            calibration=[{"input_ids": ids.where(mask != 0, filling), "attention_mask": mask}] * 2,
            sparsity=0.25,
            loss=loss,
            allocation=allocation,
        )
        for filling in (0, 23)
    ]
    assert found[0].plan.groups == found[1].plan.groups
    assert found[0].report.notes == found[1].report.notes
