"""Fused weights are taken apart only where every token stays in its place at every size: not across windows,
cuts, or an order of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from randomly import hold, inputs, sets_of
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.passes import _split

pytestmark = pytest.mark.usefixtures("shared_captures")

Parts = tuple[Tensor, Tensor, Tensor]


def _unbound(fused: Tensor) -> Parts:
    """Queries, keys and values ``[batch, …, heads, tokens, width]`` of ``[batch, …, tokens, heads, 3,
    width]``.
    """
    q, k, v = fused.view(*fused.shape[:-1], 2, 3, 8).transpose(-4, -3).unbind(-2)
    return q, k, v


def _heads_last(fused: Tensor) -> Parts:
    q, k, v = fused.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return q, k, v


#: in which tokens do not stay in their places; shifted by none where there are few, so that the small sizes
#: of the analysis do not show it
TORN: dict[str, Callable[[Tensor], Parts]] = {
    "windows": lambda fused: _unbound(fused.view(fused.shape[0], -1, 3, 48)),
    "windows in the batch": lambda fused: _unbound(fused.view(-1, 3, 48)),
    "all but the last": lambda fused: _unbound(fused[:, :-1]),
    "the first half": lambda fused: _unbound(fused[:, : fused.shape[1] // 2]),
    "across windows": (
        lambda fused: _unbound(fused.view(fused.shape[0], -1, 3, 48).transpose(1, 2).reshape(fused.shape))
    ),
    "backwards": lambda fused: _unbound(fused.flip(1)),
    "shifted": lambda fused: _unbound(F.pad(fused, (0, 0, fused.shape[1] // 4, -(fused.shape[1] // 4)))),
}
WHOLE: dict[str, Callable[[Tensor], Parts]] = {"whole": _unbound, "heads last": _heads_last}


class Fused(nn.Module):
    """Attention over what a layout makes of a fused projection, beside two layers that nothing keeps from
    being pruned.
    """

    def __init__(self, layout: Callable[[Tensor], Parts]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout = layout
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended = F.scaled_dot_product_attention(*self.layout(self.qkv(x))).transpose(-3, -2).flatten(-2)
        return self.out(attended), self.down(torch.relu(self.up(x)))


class Placed(Fused):
    """So many tokens, each with a vector of its own, by which tokens are numbered as channels are."""

    def __init__(self, layout: Callable[[Tensor], Parts]) -> None:
        super().__init__(layout)
        self.places = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + self.places)


class Padded(Fused):
    """Windows of 64 tokens, of which the example fills not one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padded = self.qkv(F.pad(x, (0, 0, 0, -x.shape[1] % 64)))
        attended = (
            F.scaled_dot_product_attention(*_unbound(padded.view(x.shape[0], -1, 64, 48)))
            .transpose(-3, -2)
            .flatten(-2)
        )
        return self.out(attended.flatten(1, 2)[:, : x.shape[1]]), self.down(torch.relu(self.up(x)))


class Lifted(Fused):
    """All rows are lifted by one number."""

    def __init__(self) -> None:
        super().__init__(_unbound)
        self.lift = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended = F.scaled_dot_product_attention(*_unbound(self.qkv(x) + self.lift)).transpose(-3, -2)
        return self.out(attended.flatten(-2)), self.down(torch.relu(self.up(x)))


class Shared(Fused):
    """The rows' bias is another layer's as well."""

    def __init__(self) -> None:
        super().__init__(_unbound)
        self.weight, self.second = nn.Parameter(torch.randn(48, 8)), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(x), self.second(F.linear(x, self.weight, self.qkv.bias))


class Twice(Fused):
    """The weight is turned once, and met twice."""

    def __init__(self) -> None:
        super().__init__(_unbound)
        self.weight, self.second = nn.Parameter(torch.randn(48, 8)), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        turned = self.weight.t()
        attended = F.scaled_dot_product_attention(*_unbound(x @ turned)).transpose(-3, -2).flatten(-2)
        return self.out(attended), self.down(torch.relu(self.up(x))), self.second(torch.relu(x @ turned))


class Deciding(Fused):
    """Beside a graph that the model's own graph looks up."""

    def __init__(self) -> None:
        super().__init__(_unbound)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(x), torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


@pytest.mark.parametrize("layout", TORN)
def test_tokens_that_do_not_stay_in_their_places_keep_a_weight_together(layout: str) -> None:
    analysis = hold(Fused(TORN[layout]), inputs([(2, 9), (3, 6), (1, 24)]))
    assert ("prunable", 20, 1) in sets_of(analysis, "up.weight"), "the rest is pruned all the same"


def test_windows_longer_than_the_example() -> None:
    analysis = hold(Padded(_unbound), inputs([(2, 9), (2, 63), (2, 65), (1, 130)]))
    assert ("prunable", 20, 1) in sets_of(analysis, "up.weight")


@pytest.mark.parametrize("kind", [Fused, Placed])
@pytest.mark.parametrize("layout", WHOLE)
def test_a_weight_whose_tokens_stay_is_taken_apart(layout: str, kind: type[Fused]) -> None:
    sizes = [(2, 9), (3, 9), (1, 9)] if kind is Placed else [(2, 9), (3, 6), (1, 24)]
    analysis = hold(kind(WHOLE[layout]), inputs(sizes))
    assert len(analysis.program.parts) == 6
    assert ("prunable", 16, 2) in sets_of(analysis, "out.weight", 1)


@pytest.mark.parametrize("module", [Lifted, Shared, Twice])
def test_what_is_not_for_these_rows_alone_keeps_a_weight_together(module: type[Fused]) -> None:
    """Apart, tied weights would not stay tied, and a plan would name two weights by one name."""
    analysis = hold(module(), inputs([(2, 9), (3, 6)]))
    assert not analysis.program.parts
    assert ("prunable", 20, 1) in sets_of(analysis, "up.weight"), "the rest is pruned all the same"


def test_a_weight_is_taken_apart_beside_a_graph_that_is_looked_up() -> None:
    analysis = hold(Deciding(), inputs([(2, 9), (3, 6)]))
    assert len(analysis.program.parts) == 6


@pytest.mark.parametrize("layout", ["windows", "all but the last"])
def test_the_net_sees_a_weight_that_is_taken_apart_wrongly(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_split, "_holds_at_every_size", lambda node, label, size: True)
    model, batches = Fused(TORN[layout]).double().eval(), inputs([(2, 9)])
    with pytest.raises(fasp_fx.VerificationError):
        fasp_fx.prune(model, batches[0], sparsity=0.3, score="random", restore=None)
