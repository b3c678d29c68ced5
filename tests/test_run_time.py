"""Programs with sizes and integers known only at run time: what a mask picks out, what a tensor counts,
tokens dealt out to experts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from invariants import invariants_of
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")


class Routed(nn.Module):
    """An expert for the tokens that a gate picks, found by ``nonzero``; its result is added where they came
    from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 1)
        self.expert_up, self.expert_down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.nonzero(self.gate(x)[:, 0] > 0)[:, 0]
        return self.down(self.up(x).relu()).index_add(
            0, chosen, self.expert_down(self.expert_up(x[chosen]).relu())
        )


class Picked(nn.Module):
    """Tokens that a boolean mask picks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.down(self.up(x[mask]).relu())


class Counted(nn.Module):
    """A length that a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        count = length.item()
        torch._check(count > 0)
        torch._check(count <= x.shape[0])
        return self.down(self.up(x[:count]).relu()) * count


class DealtOut(nn.Module):
    """Sorted tokens are cut into as many as each expert gets."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(10, 8) for _ in range(3))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = self.up(x).relu().split(counts.tolist())
        return self.down(torch.cat([expert(part) for expert, part in zip(self.experts, parts)]).relu())


class PickedAndDealtOut(nn.Module):
    """Of all tokens some are kept, never more than there are rows in a table; those are dealt out to two
    experts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(10, 8) for _ in range(2))

    def forward(self, x: Tensor, keep: Tensor, counts: Tensor) -> Tensor:
        kept = x[keep]
        torch._check(kept.shape[0] <= 2)
        torch._check(kept.shape[0] != 0)
        sizes = counts.tolist()
        torch._check(sum(sizes) == kept.shape[0])
        parts = self.up(kept).relu().split(sizes)
        return self.down(torch.cat([expert(part) for expert, part in zip(self.experts, parts)]).relu())


def tokens(count: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(count))


CASES: dict[str, tuple[type[nn.Module], Callable[[int], tuple[Tensor, ...]], set[str]]] = {
    "nonzero": (Routed, lambda n: (tokens(n),), {"down.weight", "expert_down.weight"}),
    "mask": (Picked, lambda n: (tokens(n), torch.arange(n) % 3 == 0), {"down.weight"}),
    "item": (Counted, lambda n: (tokens(n), torch.tensor(n - 2)), {"down.weight"}),
    "total": (
        PickedAndDealtOut,
        lambda n: (tokens(n), torch.arange(n) < 2, torch.tensor([1, 1])),
        {"experts.0.weight", "experts.1.weight", "down.weight"},
    ),
    "split": (
        DealtOut,
        lambda n: (tokens(n), torch.tensor([1, n - 3, 2])),
        {f"experts.{i}.weight" for i in range(3)} | {"down.weight"},
    ),
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
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.up(x)[:, mask].sum(1, keepdim=True) * self.down(x)

    analysis = fasp_fx.analyze(Channels().eval(), (tokens(4), torch.arange(10) % 2 == 0))
    group = next(
        group
        for group in analysis.groups
        if any(part.name == "up.weight" and part.dim == 0 for part in group.producers)
    )
    assert group.status == "frozen"
    assert "index" in group.reason
