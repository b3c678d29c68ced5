"""Messages along the edges of a graph, and tokens put back where they came from: rows added at places that
integers name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from invariants import invariants_of
from models import made
from torch import Tensor, nn

import fasp_fx
from fasp_fx.testing import check_program

pytestmark = pytest.mark.usefixtures("shared_captures")

NODES, EDGES = 5, 9
SAY = {"say.weight", "say.bias", "own.weight", "own.bias"}


Start = Callable[[Tensor], Tensor]


def _layers() -> dict[str, nn.Module]:
    return {"say": nn.Linear(6, 12), "own": nn.Linear(6, 12), "out": nn.Linear(12, 3)}


def messages(start: Start, add: str = "index_add") -> nn.Module:
    """Every node adds up what its neighbours say, in a tensor made by ``start``, and goes on with all
    channels of that.
    """

    def forward(self: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        said, own = self.say(x).tanh()[source], self.own(x)
        return self.out((getattr(start(own), add)(0, target, said) + own).relu())

    return made(forward, **_layers())


STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: torch.zeros(x.shape[0], 12),
    "zeros_like": lambda x: torch.zeros_like(x),
}


def scattered(scatter: Callable[..., Tensor]) -> nn.Module:
    """The same with scatters, whose index has a number for each element: one for all channels, spread out."""

    def forward(self: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        said, own = self.say(x).tanh()[source], self.own(x)
        return self.out((scatter(torch.zeros_like(own), target[:, None].expand_as(said), said) + own).relu())

    return made(forward, **_layers())


SCATTERS: dict[str, Callable[..., Tensor]] = {
    "scatter_add": lambda start, index, said: start.scatter_add(0, index, said),
    "scatter": lambda start, index, said: start.scatter(0, index, said),
    "of a value": lambda start, index, said: start.scatter(0, index, 0.5) + said.sum(0),
    "most": lambda start, index, said: start.scatter_reduce(0, index, said, "amax"),
}


def graph(nodes: int = NODES, edges: int = EDGES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(nodes)
    return (
        torch.randn(nodes, 6, generator=generator),
        *(torch.randint(0, nodes, (edges,), generator=generator) for _ in range(2)),
    )


@pytest.mark.parametrize("add", ["index_add", "index_copy"])
@pytest.mark.parametrize("start", STARTS)
def test_channels_of_messages_go(start: str, add: str) -> None:
    torch.manual_seed(0)
    model, wanted = messages(STARTS[start], add), invariants_of(start, STARTS)
    (group,) = fasp_fx.analyze(model, graph()).select("prunable")
    assert {part.name for part in group.producers if part.dim == 0} == SAY
    assert [part.name for part in group.consumers] == ["out.weight"]
    check_program(model, graph(), others=[(graph(7, 4), {})], invariants=wanted)


@pytest.mark.parametrize("name", SCATTERS)
def test_an_index_that_is_spread_out_narrows_with_the_channels(name: str) -> None:
    torch.manual_seed(3)
    model = scattered(SCATTERS[name])
    # several rows that come to one place: which one stays is not determined, so each comes to its own
    inputs = [
        (x, source, torch.randperm(len(x))[: len(source)]) for x, source, _ in (graph(5, 4), graph(7, 6))
    ]
    (group,) = fasp_fx.analyze(model, inputs[0]).select("prunable")
    assert {part.name for part in group.producers if part.dim == 0} == SAY
    check_program(model, inputs[0], others=[(inputs[1], {})], invariants=("mask-exact", "rules"))


def test_an_index_with_a_number_for_each_channel_is_no_index_of_rows() -> None:
    model = scattered(lambda start, index, said: start.scatter_add(0, index.clone().flip(1), said))
    check_program(model, graph(), invariants=("mask-exact", "nothing"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        # an index that is narrower than the rows leaves the other channels as they are
        (
            lambda: scattered(lambda start, index, said: start.scatter_add(0, index[:, :7], said)),
            "in a way that its rule does not speak of",
        ),
        (
            lambda: made(
                lambda self, x, source, target: self.out(
                    self.own(x).index_add(1, target[:4], self.more(x)).relu() + self.say(x)
                ),
                **_layers(),
                more=nn.Linear(6, 4),
            ),
            "aten.index_add.default cannot lose positions along this dimension",
        ),
    ],
    ids=["some channels", "along the channels"],
)
def test_what_is_added_at_places_of_channels_keeps_them(make: Callable[[], nn.Module], says: str) -> None:
    analysis = fasp_fx.analyze(make(), graph(4))
    assert {group.status for group in analysis.groups} == {"frozen"}
    assert any(says in group.reason for group in analysis.groups)
    assert not analysis.without_rule
