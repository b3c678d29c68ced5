"""Channels that lie along a dimension whose size varies: heads folded into the batch, as
``nn.MultiheadAttention`` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
from oracle import assert_exact
from torch import Tensor, nn

import fasp_fx
import fasp_fx.patterns
from fasp_fx.analysis import repeating

pytestmark = pytest.mark.usefixtures("shared_captures")


def attended(inside: Callable[[Tensor], Tensor] = torch.relu, **options: Any) -> nn.Module:
    """Attention between two layers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        return m.out(inside(m.up(m.attention(h, h.relu(), h)[0])))

    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True, **options)
    sizes = {"into": (8, 12), "up": (12, 16), "out": (16, 8)}
    return made(forward, attention=attention, **{name: nn.Linear(*size) for name, size in sizes.items()})


def drawn(samples: int, tokens: int = 5) -> Tensor:
    return torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(samples))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "inside of the batch": attended,
    "a row behind the keys": lambda: attended(add_bias_kv=True, add_zero_attn=True),
}


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        *((name, 4) for name in MODELS),
        ("inside of the batch", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in list(MODELS)[1:]),
    ],
)
def test_exempt_channels_are_exact_at_every_batch_size(name: str, samples: int) -> None:
    model, data = MODELS[name](), [drawn(size) for size in (4, 4, 4, 4, 3, 1)]
    captured = fasp_fx.capture(model, (drawn(samples),))
    asked: dict[str, Any] = {"include": ("exempt",), "sparsity": 0.3, "allocation": "uniform"}
    result = fasp_fx.prune(captured, calibration=data, **asked)
    assert not [note for note in result.report.notes if "not run" in note or "whole" in note]
    assert result.plan.groups
    assert name == "a row behind the keys" or any(not group.consumers for group in result.plan.groups)
    result = fasp_fx.apply(captured, result.plan)
    assert_exact(model, result, *((drawn(size, 7),) for size in (1, 2, 5, 8)), producers=True)


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
