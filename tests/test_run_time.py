"""Programs with sizes and integers known only at run time: what a mask picks out, what a tensor counts,
tokens dealt out to experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from invariants import invariants_of
from models import block, made, wide
from refusal import Vectors
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")


def _routes(self: Any, x: Tensor) -> Tensor:
    """An expert for the tokens that a gate picks, found by ``nonzero``; its result is added where they came
    from.
    """
    chosen = torch.nonzero(self.gate(x)[:, 0] > 0)[:, 0]
    return block(self, x).index_add(0, chosen, block(self.expert, x[chosen]))


def _counts(self: Any, x: Tensor, length: Tensor) -> Tensor:
    """A length that a tensor holds."""
    count = length.item()
    torch._check(count > 0)
    torch._check(count <= x.shape[0])
    return block(self, x[:count]) * count


def _deals_out(self: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """Tokens are cut into as many as each expert gets."""
    parts = self.up(x).relu().split(sizes)
    return self.down(torch.cat([expert(part) for expert, part in zip(self.experts, parts)]).relu())


def _picks_and_deals_out(self: Any, x: Tensor, keep: Tensor, counts: Tensor) -> Tensor:
    """Of all tokens some are kept, never more than there are rows in a table."""
    kept = x[keep]
    torch._check(kept.shape[0] <= 2)
    torch._check(kept.shape[0] != 0)
    sizes = counts.tolist()
    torch._check(sum(sizes) == kept.shape[0])
    return _deals_out(self, kept, sizes)


def _parts_features(self: Any, x: Tensor) -> Tensor:
    """Features are cut where a tensor says, into parts whose sizes layers settle: these stay."""
    at = torch.tensor([2, 3]) if self.at is None else self.at
    parts = torch.tensor_split(x, at, -1)
    return block(self, torch.relu(sum(own(part) for own, part in zip(self.own, parts))))


def _experts(forward: Callable[..., Tensor], count: int) -> nn.Module:
    experts = nn.ModuleList(nn.Linear(10, 8) for _ in range(count))
    return made(forward, up=nn.Linear(6, 10), down=nn.Linear(8, 4), experts=experts)


def tokens(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], set[str]]] = {
    "nonzero": (
        lambda: wide(_routes, hidden=10, gate=nn.Linear(6, 1), expert=Vectors()),
        lambda n: (tokens(n),),
        {"down.weight", "expert.down.weight"},
    ),
    "mask": (
        lambda: wide(lambda self, x, mask: block(self, x[mask])),
        lambda n: (tokens(n), torch.arange(n) % 3 == 0),
        {"down.weight"},
    ),
    "item": (lambda: wide(_counts), lambda n: (tokens(n), torch.tensor(n - 2)), {"down.weight"}),
    "total": (
        lambda: _experts(_picks_and_deals_out, 2),
        lambda n: (tokens(n), torch.arange(n) < 2, torch.tensor([1, 1])),
        {"experts.0.weight", "experts.1.weight", "down.weight"},
    ),
    "split": (
        lambda: _experts(lambda self, x, counts: _deals_out(self, x, counts.tolist()), 3),
        lambda n: (tokens(n), torch.tensor([1, n - 3, 2])),
        {f"experts.{i}.weight" for i in range(3)} | {"down.weight"},
    ),
    "an empty beginning": (  # of a cache, say, which has no dimensions yet
        lambda: wide(lambda self, x: self.down(torch.cat([torch.tensor([]), self.up(x)], -1).relu())),
        lambda n: (tokens(n),),
        {"down.weight"},
    ),
    **{
        f"parts by {name}": (
            lambda at=at: wide(
                _parts_features, at=at, own=nn.ModuleList(nn.Linear(size, 6) for size in (2, 1, 3))
            ),
            lambda n: (tokens(n),),
            {"down.weight"},
        )
        for name, at in {"a constant": None, "a buffer": torch.tensor([2, 3])}.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_pruned_exactly_for_other_counts(name: str) -> None:
    make, inputs, narrower = CASES[name]
    torch.manual_seed(3)
    model, wanted = make().eval(), invariants_of(name, CASES)
    groups = fasp_fx.analyze(model, inputs(7)).select("prunable")
    assert {part.name for group in groups for part in group.consumers} == narrower
    check_program(model, inputs(7), others=[(inputs(5), {}), (inputs(12), {})], invariants=wanted)


def test_channels_picked_at_run_time_stay() -> None:
    model = wide(
        lambda self, x, mask: self.up(x)[:, mask].sum(1, keepdim=True) * self.other(x), other=nn.Linear(6, 6)
    )
    groups = fasp_fx.analyze(model, (tokens(4), torch.arange(24) % 2 == 0)).groups
    (group,) = [group for group in groups if any(part.name == "up.bias" for part in group.producers)]
    assert (group.status, "index" in group.reason) == ("frozen", True)
