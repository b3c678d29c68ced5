"""Positions that are known only at run time, or taken one by one: masks, counts, messages along the edges of
a graph, tokens dealt out to experts, stacks of weights; and operators that ask how their operands lie in
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Vectors, block, linear, made, parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F

from . import Args, Entry, Make, drawn, entries, rows, sequences


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
    return made(forward, experts=experts, **linear(up=(6, 10), down=(8, 4)))


def _of_counts(*more: Callable[[int], Any]) -> tuple[Args, ...]:
    """Calls with several numbers of tokens, and what else depends on them."""
    return tuple((*drawn((count, 6)), *(other(count) for other in more)) for count in (7, 5, 12))


#: calls, and what makes the model
AT_RUN_TIME: dict[str, tuple[Make, tuple[Args, ...]]] = {
    "nonzero": (
        lambda: wide(_routes, hidden=10, gate=nn.Linear(6, 1), expert=Vectors()),
        _of_counts(),
    ),
    "mask": (
        lambda: wide(lambda self, x, mask: block(self, x[mask])),
        _of_counts(lambda n: torch.arange(n) % 3 == 0),
    ),
    "item": (lambda: wide(_counts), _of_counts(lambda n: torch.tensor(n - 2))),
    "total": (
        lambda: _experts(_picks_and_deals_out, 2),
        _of_counts(lambda n: torch.arange(n) < 2, lambda n: torch.tensor([1, 1])),
    ),
    "split": (
        lambda: _experts(lambda self, x, counts: _deals_out(self, x, counts.tolist()), 3),
        _of_counts(lambda n: torch.tensor([1, n - 3, 2])),
    ),
    "an empty beginning": (  # of a cache, say, which has no dimensions yet
        lambda: wide(lambda self, x: self.down(torch.cat([torch.tensor([]), self.up(x)], -1).relu())),
        _of_counts(),
    ),
    **{
        f"parts by {name}": (
            lambda at=at: wide(
                _parts_features, at=at, own=nn.ModuleList(nn.Linear(size, 6) for size in (2, 1, 3))
            ),
            _of_counts(),
        )
        for name, at in {"a constant": None, "a buffer": torch.tensor([2, 3])}.items()
    },
    # channels picked at run time stay
    "channels by a mask": (
        lambda: wide(
            lambda self, x, mask: self.up(x)[:, mask].sum(1, keepdim=True) * self.other(x),
            other=nn.Linear(6, 6),
        ),
        _of_counts(lambda n: torch.arange(24) % 2 == 0),
    ),
}

# --- messages along the edges of a graph: rows added at places that integers name


def scattering(scatter: Callable[..., Tensor], **held: Any) -> Make:
    """Every node adds up what its neighbours say, in a tensor made of its own, and goes on with all channels
    of that; an index has a number for each element: one for all channels, spread out.
    """

    def forward(self: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        said, own = self.say(x).tanh()[source], self.own(x)
        return self.out((scatter(own, target, said) + own).relu())

    return lambda: made(forward, **linear(say=(6, 12), own=(6, 12), out=(12, 3)))


def _spread(target: Tensor, said: Tensor) -> Tensor:
    return target[:, None].expand_as(said)


#: the last two add at places of channels, or leave channels as they are: these stay
MESSAGES: dict[str, Make] = {
    **{
        f"{add} into {name}": scattering(
            lambda own, at, said, add=add, start=start: getattr(start(own), add)(0, at, said)
        )
        for add in ("index_add", "index_copy")
        for name, start in {
            "zeros": lambda x: torch.zeros(x.shape[0], 12).to(x),
            "zeros_like": torch.zeros_like,
        }.items()
    },
    "scatter_add": scattering(
        lambda own, at, said: torch.zeros_like(own).scatter_add(0, _spread(at, said), said)
    ),
    "scatter": scattering(lambda own, at, said: torch.zeros_like(own).scatter(0, _spread(at, said), said)),
    "scatter of a value": scattering(
        lambda own, at, said: torch.zeros_like(own).scatter(0, _spread(at, said), 0.5) + said.sum(0)
    ),
    "scatter of the most": scattering(
        lambda own, at, said: torch.zeros_like(own).scatter_reduce(0, _spread(at, said), said, "amax")
    ),
    "a number for each channel": scattering(
        lambda own, at, said: torch.zeros_like(own).scatter_add(0, _spread(at, said).clone().flip(1), said)
    ),
    "some channels": scattering(
        lambda own, at, said: torch.zeros_like(own).scatter_add(0, _spread(at, said)[:, :7], said)
    ),
    "along the channels": scattering(
        lambda own, at, said: own.index_add(1, at[:4], own[:, :4].tanh()) + said.sum(0)
    ),
}


def graph(nodes: int, edges: int) -> Args:
    """Several rows that come to one place: which one stays is not determined, so each comes to its own."""
    generator = torch.Generator().manual_seed(nodes)
    source = torch.randint(0, nodes, (edges,), generator=generator)
    return (*drawn((nodes, 6)), source, torch.randperm(nodes, generator=generator)[:edges])


# --- stacks of weights of which a model takes one by one

COUNT, WIDTH, INNER = 3, 8, 12
Step = Callable[[Any, Tensor, int], Tensor]


def stacked(step: Step, positions: tuple[int, ...] = (0, 1, 2)) -> nn.Module:
    """``step(model, x, i)`` for some ``i``, added up, between two layers."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.stack([step(self, x, i) * (i + 1) for i in positions]).sum(0).tanh())

    return made(
        forward,
        up=parameter(COUNT, INNER, WIDTH, scale=1 / 3),
        down=parameter(COUNT, WIDTH, INNER, scale=1 / 3),
        swapped=parameter(INNER, COUNT, WIDTH, scale=1 / 3),
        bias=parameter(COUNT, INNER),
        ups=nn.ModuleList(nn.Linear(WIDTH, INNER) for _ in range(COUNT)),
        downs=nn.ModuleList(nn.Linear(INNER, WIDTH) for _ in range(COUNT)),
        **linear(first=(5, WIDTH), last=(WIDTH, 4)),
    )


#: how one position is used
STEPS: dict[str, Step] = {
    "linear": lambda m, x, i: F.linear(F.linear(x, m.up[i]).tanh(), m.down[i]),
    "with biases": lambda m, x, i: F.linear(F.linear(x, m.up[i], m.bias[i]).tanh(), m.down[i]),
    "transposed products": lambda m, x, i: (x @ m.up[i].t()).tanh() @ m.down[i].transpose(0, 1),
    "unbound": lambda m, x, i: F.linear(F.linear(x, [*m.up][i]).tanh(), m.down.unbind(0)[i]),
    "along another dimension": lambda m, x, i: F.linear(F.linear(x, m.swapped[:, i]).tanh(), m.down[i]),
    "other consumers": lambda m, x, i: m.downs[i](F.linear(x, m.up[i], m.bias[i]).tanh()),
    "other producers": lambda m, x, i: F.linear(m.ups[i](x).tanh(), m.down[i]),
    "scales": lambda m, x, i: m.downs[i](m.ups[i](x).tanh() * m.bias[i]),
}


def indexed(index: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("btd,efd->ebtf", x, self.into))
        taken = torch.einsum("ebtf,eof->bto", hidden, index(self.out))
        return self.last(F.relu(self.third(taken)))

    return made(
        forward, into=parameter(3, 12, 8), out=parameter(3, 5, 12), **linear(third=(5, 16), last=(16, 4))
    )


# --- operators whose decompositions ask how their operands lie, or need them in order

LYING: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda x: x.unfold(2, 3, 2),
    "diagonal": lambda x: x.diagonal(1, 2, 3),
    "diag": lambda x: torch.diag(x[0, 1]),
    "trace": lambda x: torch.trace(x[0, 1]),
    "repeated letter": lambda x: torch.einsum("bcii->bci", x),
    "stft": lambda x: torch.stft(
        x[:, 0, 0], 4, 2, window=torch.ones(4).to(x), center=False, return_complex=True
    ).abs(),
    "bag": lambda x: F.embedding_bag(torch.tensor([[0, 1, 2], [3, 5, 0]]), x[0, 0, :, ::2]),
    "ordered": lambda x: x.contiguous().view(3, -1),
    "patches": lambda x: F.unfold(x, 3),
    "shuffled": lambda x: F.pixel_shuffle(x, 2),
    "product": lambda x: torch.einsum("bcij,bdjk->bik", x, x),
    "filled": lambda x: x.index_fill(3, torch.tensor([1, 4]), 2.0),
    "written": lambda x: (x * 1.0).relu_().unfold(3, 2, 1),
}
#: along other dimensions than that of the channels
PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold beside channels": lambda h: h.unfold(1, 3, 2).movedim(2, -1),
    "diagonal beside channels": lambda h: h.diagonal(0, 0, 1).movedim(0, -1),
}


def _lying(operator: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.up(x).relu()
        return self.down(hidden), operator(x), operator(x.permute(0, 1, 3, 2) + 1), operator(block(self, x))

    return wide(forward, hidden=12)


# --- sizes that a capture fixes: how a column gets its length

COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "a list": lambda x: torch.tensor([[0.0]] * x.shape[0])[:, None].to(x),
    "a sum": lambda x: torch.zeros(5, 1, 1).to(x),
    "a length": lambda x: torch.zeros(x.shape[0], int(x.shape[1]), 1).to(x),
    "a batch": lambda x: torch.zeros(int(x.shape[0]), 1, 1).to(x),
    "a size": lambda x: torch.zeros(x.shape[0], 1, 1).to(x),
}


def _column(way: Callable[[Tensor], Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        """Appends a column to what it is given."""
        hidden = self.up(x).relu().clone().add_(1)
        column = way(x) + torch.zeros(x.shape[0], x.shape[1], 1).to(x)
        return self.down(torch.cat([hidden, column], -1))

    return made(forward, **linear(up=(8, 24), down=(25, 4)))


ENTRIES: dict[str, Entry] = {
    **{
        name: Entry(make, calls, invariants=("rules", "shapes"))
        for name, (make, calls) in AT_RUN_TIME.items()
    },
    **entries(MESSAGES, (graph(5, 4), graph(7, 6)), invariants=("rules",)),
    **entries(
        {f"stacked, {name}": lambda step=step: stacked(step) for name, step in STEPS.items()}, rows(5, 9, 7)
    ),
    # what is never taken goes along
    "stacked, never taken": Entry(lambda: stacked(STEPS["linear"], (0, 2)), rows(5, 9, 7)),
    **{
        f"indices into a stack, {name}": Entry(lambda index=index: indexed(index), sequences(8))
        for name, index in {
            "computed": lambda v: v[torch.arange(3).flip(0)],
            "one twice": lambda v: v[[0, 0, 2]],
            "permuted": lambda v: v[torch.tensor([2, 0, 1])],
        }.items()
    },
    **entries(
        {f"lying, {name}": lambda operator=operator: _lying(operator) for name, operator in LYING.items()},
        (drawn((3, 4, 6, 6)),),
    ),
    **entries(
        {
            name: lambda operator=operator: wide(lambda self, x: self.down(operator(self.up(x))), hidden=12)
            for name, operator in PASSING.items()
        },
        (drawn((3, 5, 6)),),
    ),
    **{
        f"a column of the length of {name}, {samples}": Entry(
            lambda way=way: _column(way), sequences(8, (samples, 7), (samples + 1, 7), (samples, 9))
        )
        for samples in (5, 1)
        for name, way in COLUMNS.items()
        if samples == 5 or name in ("a batch", "a size")
    },
}
