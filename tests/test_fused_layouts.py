"""Fused weights are taken apart only where every token stays in its place at every size: not across windows,
cuts, or an order of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import block, parameter, wide
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


def fused(
    layout: Callable[[Tensor], Parts] = _unbound, more: Callable[..., Any] = lambda m, x: (), **held: Any
) -> nn.Module:
    """Attention over what a layout makes of a fused projection, beside two layers that nothing keeps from
    being pruned; ``more`` is returned as well.
    """

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        mixed = F.scaled_dot_product_attention(*layout(m.project(m, x))).transpose(-3, -2).flatten(-2)
        return m.out(mixed if mixed.dim() == 3 else mixed.flatten(1, 2)), block(m, x), *more(m, x)

    torch.manual_seed(0)
    layers = {"qkv": nn.Linear(8, 48), "out": nn.Linear(16, 8)}
    return wide(forward, 8, 20, **{"project": lambda m, x: m.qkv(x), **layers, **held})


def _padded(m: Any, x: Tensor) -> Tensor:
    """Windows of 64 tokens, of which the example fills not one."""
    return m.qkv(F.pad(x, (0, 0, 0, -x.shape[1] % 64)))


def _turned(m: Any, x: Tensor) -> Tensor:
    """The weight is turned once, and met twice."""
    return x @ m.weight.t()


def _rows() -> dict[str, Any]:
    return {"weight": parameter(48, 8), "second": nn.Linear(48, 8)}


FEW, MANY = [(2, 9), (3, 6), (1, 24)], [(2, 9), (2, 63), (2, 65), (1, 130)]
#: models that keep a weight together: tokens do not stay in their places, or what it is made of is not for
#: these rows alone, so that tied weights would not stay tied, or a plan would name two weights by one name
TOGETHER: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    **{name: (lambda layout=layout: fused(layout), FEW) for name, layout in TORN.items()},
    "windows longer than the example": (
        lambda: fused(lambda made: _unbound(made.view(made.shape[0], -1, 64, 48)), project=_padded),
        MANY,
    ),
    "lifted by one number": (
        lambda: fused(project=lambda m, x: m.qkv(x) + m.lift, lift=nn.Parameter(torch.ones(1))),
        FEW,
    ),
    "a bias shared": (
        lambda: fused(more=lambda m, x: (m.second(F.linear(x, m.weight, m.qkv.bias)),), **_rows()),
        FEW,
    ),
    "a weight met twice": (
        lambda: fused(project=_turned, more=lambda m, x: (m.second(torch.relu(_turned(m, x))),), **_rows()),
        FEW,
    ),
}


def _placed(m: Any, x: Tensor) -> Tensor:
    """So many tokens, each with a vector of its own, by which tokens are numbered as channels are."""
    return m.qkv(x + m.places)


def _decided(m: Any, x: Tensor) -> tuple[Tensor]:
    """A graph that the model's own graph looks up."""
    return (torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),)


APART: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    **{name: (lambda layout=layout: fused(layout), FEW) for name, layout in WHOLE.items()},
    **{
        f"{name}, placed": (
            lambda layout=layout: fused(layout, project=_placed, places=parameter(9, 8)),
            [(2, 9), (3, 9), (1, 9)],
        )
        for name, layout in WHOLE.items()
    },
    "beside a graph": (lambda: fused(more=_decided), FEW),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_a_weight_stays_together_and_the_rest_is_pruned_all_the_same(name: str) -> None:
    make, sizes = TOGETHER[name]
    analysis = hold(make(), inputs(sizes))
    assert name in TORN or not analysis.program.parts
    assert ("prunable", 20, 1) in sets_of(analysis, "up.weight")


@pytest.mark.parametrize("name", APART)
def test_a_weight_whose_tokens_stay_is_taken_apart(name: str) -> None:
    make, sizes = APART[name]
    analysis = hold(make(), inputs(sizes))
    assert len(analysis.program.parts) == 6
    assert ("prunable", 16, 2) in sets_of(analysis, "out.weight", 1)


@pytest.mark.parametrize("layout", ["windows", "all but the last"])
def test_the_net_sees_a_weight_that_is_taken_apart_wrongly(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_split, "_lies_along", lambda label, recorded, size: label is not None)
    model, batches = fused(TORN[layout]).double(), inputs([(2, 9)])
    with pytest.raises(fasp_fx.VerificationError):
        fasp_fx.prune(model, batches[0], sparsity=0.3, score="random", restore=None)
