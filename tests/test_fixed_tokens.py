"""Sequences whose length a weight fixes: tokens are features, and what is computed of their number is
settled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made
from oracle import TOLERANCE, assert_exact, error, zeroed
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import fasp_fx

pytestmark = pytest.mark.usefixtures("shared_captures")

TOKENS = 3
#: what cuts or shifts as many tokens as a quarter of them, which is none
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cut": lambda x: x[:, : x.shape[1] - x.shape[1] // 4],
    "shifted": lambda x: F.pad(x, (0, 0, x.shape[1] // 4, -(x.shape[1] // 4))),
}


def linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def mixed(part: Callable[[Tensor], Tensor]) -> nn.Module:
    """Attention with one weight for queries, keys and values of each head, and then a layer over tokens."""

    def forward(m: Any, x: Tensor) -> Tensor:
        length = x.shape[1]
        heads = part(m.qkv(x)).unflatten(-1, (2, 3, 4)).transpose(1, 2)
        query, key, value = heads.unbind(-2)
        x = m.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))
        x = F.pad(x, (0, 0, 0, length))[:, :length]
        return m.last(m.down(F.gelu(m.up(x.transpose(1, 2)))).transpose(1, 2))

    sizes = {"qkv": (6, 24), "out": (8, 6), "up": (TOKENS, 5), "down": (5, TOKENS), "last": (6, 2)}
    return made(forward, **linear(**sizes)).double()


@pytest.mark.parametrize("name", PARTS)
def test_a_fused_weight_is_split_where_tokens_are_features(name: str) -> None:
    torch.manual_seed(0)
    model, x = mixed(PARTS[name]), torch.randn(2, TOKENS, 6).double()
    result = fasp_fx.prune(model, (x,), score="random", restore=None, sparsity=0.2)
    gone = {part.name for group in result.plan.groups for part in group.consumers}
    assert {"out.weight", "down.weight"} <= gone
    assert_exact(model, result, (x,))


def test_a_part_that_has_lost_all_its_channels_has_no_say_on_tokens() -> None:
    """Two halves of a layer go on side by side and lie beside what a layer over tokens makes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.first(x).chunk(2, -1)
        after = m.after(torch.cat([left, right.relu()], -1))
        other = m.other(m.tokens(m.second(x).transpose(1, 2)).transpose(1, 2))
        return m.last((after * other).roll(-1, 1).flatten(1))

    torch.manual_seed(0)
    sizes = {"first": (6, 4), "second": (6, 5), "tokens": (TOKENS, TOKENS), "after": (4, 8), "other": (5, 8)}
    model = made(forward, **linear(**sizes, last=(TOKENS * 8, 2))).double()
    x = torch.randn(2, TOKENS, 6).double()
    with torch.no_grad():
        model.after.weight[:, :2] *= 1e-6  # which go first, and leave nothing of their half
    result = fasp_fx.prune(model, (x,), score="magnitude", restore=None, sparsity={"after.weight": 0.5})
    assert not result.report.notes
    (group,) = result.plan.groups
    assert [(part.name, tuple(part.removed)) for part in group.consumers] == [("after.weight", (0, 1))]
    assert error(result.module(x), zeroed(model, result.plan)(x)) <= TOLERANCE


#: what takes tokens by a number that is settled only afterwards, and how many are left of five
TAKEN: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "all but the last": (lambda x, count: x[:, : count - 1], 4),
    "the second half": (lambda x, count: x[:, count // 2 :], 3),
    "every second": (lambda x, count: x[:, :: count // 2], 3),
    "behind zeros": (lambda x, count: F.pad(x, (0, 0, count // 2, 0)), 7),
    "parts exchanged": (lambda x, count: torch.cat(x.split([count // 2, count - count // 2], 1)[::-1], 1), 5),
    "one in front": (lambda x, count: torch.cat([x[:, count - 2].unsqueeze(1), x], 1), 6),
}


@pytest.mark.parametrize("name", TAKEN)
def test_tokens_are_taken_by_a_number_that_is_settled_afterwards(name: str) -> None:
    """Of those that a layer makes, by the number of those of another input."""
    take, left = TAKEN[name]

    def forward(m: Any, x: Tensor, other: Tensor) -> Tensor:
        taken = take(m.down(F.gelu(m.up(other))).transpose(1, 2), x.shape[1]).transpose(1, 2)
        return m.last(m.down_again(F.gelu(m.up_again(taken))).transpose(1, 2) + m.own(x))

    torch.manual_seed(0)
    sizes = {"up": (4, 7), "down": (7, 5), "up_again": (left, 4), "down_again": (4, 5), "own": (6, 8)}
    model = made(forward, **linear(**sizes, last=(8, 3))).double()
    args, others = ((torch.randn(n, 5, 6).double(), torch.randn(n, 8, 4).double()) for n in (2, 3))
    result = fasp_fx.prune(model, args, score="random", restore=None, sparsity=0.5)
    assert not result.report.notes
    assert "up_again.weight" in {part.name for group in result.plan.groups for part in group.consumers}
    assert_exact(model, result, args, others)


# --- inputs joined side by side: where one ends decides which weights meet the next


def joined() -> nn.Module:
    """A projected input between two others."""
    return made(
        lambda m, before, x, after: m.out(torch.cat([before, m.middle(x), after], dim=-1)),
        middle=nn.Linear(4, 6),
        out=nn.Sequential(nn.Linear(14, 8), nn.ReLU(), nn.Linear(8, 2)),
    )


ARGS = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4))


def test_their_widths_are_fixed_and_what_lies_between_is_pruned() -> None:
    torch.manual_seed(0)
    model = joined()
    result = fasp_fx.prune(model, ARGS, sparsity=0.4, score="random", restore=None)
    assert {part.name for group in result.plan.groups for part in group.producers} == {
        "middle.weight",
        "middle.bias",
        "out.0.weight",
        "out.0.bias",
    }
    assert_exact(model, result, ARGS, tuple(torch.randn(5, 4) for _ in ARGS))
    with pytest.raises(
        fasp_fx.CallError, match="argument 'before': dimension 1 is 5, the program was captured for 4"
    ):
        result.module(torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 3))


def test_what_the_caller_lets_vary_freezes_what_lies_between() -> None:
    """Widths that may trade with each other leave no fixed place for what lies between."""
    shapes = ({1: Dim.AUTO}, None, {1: Dim.AUTO})
    analysis = fasp_fx.analyze(joined(), ARGS, dynamic_shapes=shapes)
    reasons = {group.producers[0].name: group.reason for group in analysis.groups if group.producers}
    assert "a length known only at run time" in reasons["middle.weight"]
    assert [group.producers[0].name for group in analysis.select("prunable")] == ["out.0.weight"]


def test_what_lies_beside_two_axes_in_one_is_pruned() -> None:
    """One table for all fields, whose vectors lie side by side, beside what a network makes of them."""

    def forward(m: Any, fields: Tensor) -> Tensor:
        flat = m.table(fields).flatten(1)
        return m.out(torch.cat([flat, m.deep(flat)], dim=1))

    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    model = made(forward, table=nn.Embedding(30, 4), deep=deep, out=nn.Linear(20, 2))
    fields = torch.randint(30, (5, 3))
    result = fasp_fx.prune(model, (fields,), sparsity=0.4, score="random", restore=None)
    names = {group.consumers[0].name for group in result.plan.groups}
    assert names == {"deep.0.weight", "deep.2.weight", "out.weight"}, (
        "a dimension of the table, of all fields"
    )
    assert_exact(model, result, (fields,), (fields[:2].flip(1),))
