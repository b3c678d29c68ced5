"""What an expansion repeats over channels is repeated less often once they go: masks, norms, averages.

The oracle zeroes columns of the consumer in a copy of the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

Spread = Callable[[Tensor, Tensor, nn.Parameter], Tensor]

FORMS: dict[str, Spread] = {
    "a mask": lambda h, mask, _: h * mask.unsqueeze(-1).expand_as(h),
    "filled": lambda h, mask, _: h.masked_fill((mask[..., None] == 0).expand_as(h), 0.0),
    "chosen": lambda h, mask, _: torch.where((mask[..., None] > 0).expand(-1, -1, 12), h, 0.1 * h),
    "a parameter": lambda h, _, one: h * one.expand(1, 12),
    "cast": lambda h, mask, _: h * mask.bool().unsqueeze(-1).expand(h.size()).to(h.dtype),
    "repeated": lambda h, mask, _: h * mask[..., None].repeat(1, 1, 12),
    "repeated in blocks": lambda h, mask, _: (
        h.view(*h.shape[:2], 3, 4) * mask[..., None, None].repeat(1, 1, 3, 4)
    ).flatten(2),
    "channels repeated": lambda h, mask, _: h + h.repeat(1, 1, 2)[..., :12] * mask[..., None],
    "in blocks": lambda h, mask, _: (
        h.view(*h.shape[:2], 3, 4) * mask[..., None, None].expand(-1, -1, 3, 4)
    ).flatten(2),
    "joined": lambda h, mask, _: torch.cat([h, mask.unsqueeze(-1).expand_as(h)], -1)[..., :12],
}


def _average(h: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens that are shown, as encoders of sentences compute it."""
    shown = mask.unsqueeze(-1).expand(h.size()).float().to(h.dtype)
    return (h * shown).sum(1) / torch.clamp(shown.sum(1), min=1e-9)


class Net(nn.Module):
    def __init__(self, form: Spread) -> None:
        super().__init__()
        self.up, self.down, self.one = nn.Linear(5, 12), nn.Linear(12, 3), nn.Parameter(torch.randn(1, 1))
        self.form = form

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.down(self.form(self.up(x), mask, self.one))


def _inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    return x, (torch.rand(batch, tokens, generator=generator, dtype=torch.float64) > 0.3).double()


@pytest.mark.parametrize("name", [*FORMS, "averaged"])
def test_it_shrinks_with_the_channels(name: str) -> None:
    torch.manual_seed(0)
    form = (lambda h, mask, _: _average(h, mask)) if name == "averaged" else FORMS[name]
    model = Net(form).double().eval()
    result = fasp_fx.prune(model, _inputs(2, 4), sparsity=0.3, score="random", restore=None)
    assert result.report.sparsity > 0.2, "the channels are free"
    dense = copy.deepcopy(model)
    for part in (part for group in result.plan.groups for part in group.consumers):
        gone = torch.tensor([index for block in part.by_block() for index in block])
        dense.get_parameter(part.name).data.index_fill_(part.dim, gone, 0)
    for sizes in ((2, 4), (3, 7), (1, 1)):
        inputs = _inputs(*sizes)
        torch.testing.assert_close(result.module(*inputs), dense(*inputs))


def test_a_norm_that_is_written_for_all_channels_can_be_asked_for() -> None:
    model = Net(lambda h, *_: functional.normalize(h, dim=-1)).double().eval()
    (group,) = (group for group in fasp_fx.analyze(model, _inputs(2, 4)).groups if group.size == 12)
    assert group.status == "approximate"
    options = {"sparsity": 0.3, "score": "random", "restore": None, "include": ("approximate",)}
    result = fasp_fx.prune(model, _inputs(2, 4), **options)
    (planned,) = result.plan.groups
    kept = [index for index in range(12) if index not in planned.producers[0].by_block()[0]]
    x, _ = inputs = _inputs(3, 6)
    h = functional.normalize(functional.linear(x, model.up.weight[kept], model.up.bias[kept]), dim=-1)
    expected = functional.linear(h, model.down.weight[:, kept], model.down.bias)
    torch.testing.assert_close(result.module(*inputs), expected)


def test_what_others_add_has_no_channels() -> None:
    """An expansion that a running sum has mixed along is no repetition any more."""
    model = Net(lambda h, mask, _: h + mask.unsqueeze(-1).expand(-1, -1, 12).cumsum(-1)).double().eval()
    (group,) = (group for group in fasp_fx.analyze(model, _inputs(2, 4)).groups if group.size == 12)
    assert group.status == "frozen"
