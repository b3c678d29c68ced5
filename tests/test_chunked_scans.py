"""Scans that a model writes out in chunks: sequences are padded to whole chunks, by nothing where they fill
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import made, wide
from oracle import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import StoreError

CHUNK = 4


def scan() -> nn.Module:
    """A state-space layer within chunks of four tokens, as Mamba 2 writes it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        missing = (CHUNK - length % CHUNK) % CHUNK
        chunks = (length + missing) // CHUNK
        value, write, read, decay = (
            F.pad(layer(x), (0, 0, 0, missing)).view(batch, chunks, CHUNK, -1)
            for layer in (m.value, m.write, m.read, m.decay)
        )
        fallen = -F.softplus(decay).cumsum(2)
        mask = torch.ones(CHUNK, CHUNK, dtype=x.dtype).tril()[..., None]
        weight = torch.exp((fallen[:, :, :, None] - fallen[:, :, None]).clamp(max=0)) * mask
        value = value.unflatten(-1, (2, 4))
        found = torch.einsum("zcln,zcsn,zclsh,zcshp->zclhp", read, write, weight, value)
        return x + m.out(found.reshape(batch, chunks * CHUNK, -1)[:, :length])

    sizes = {"value": (6, 8), "write": (6, 3), "read": (6, 3), "decay": (6, 2), "out": (8, 6)}
    return made(forward, **{name: nn.Linear(*size) for name, size in sizes.items()})


def behind() -> nn.Module:
    """Reads channels, padded to an even number of tokens, in the order in which they lie."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.pad(m.up(x).transpose(1, 2), (0, x.shape[1] % 2))
        pairs = torch.einsum("bcpk,k->bcp", hidden.unflatten(2, (-1, 2)), torch.ones(2, dtype=x.dtype))
        return m.down(pairs.transpose(1, 2))

    return wide(forward, hidden=8)


@pytest.mark.parametrize(
    ("make", "length"),
    [(behind, 7), (behind, 8), *(pytest.param(scan, length, marks=pytest.mark.slow) for length in (7, 8))],
)
def test_what_fills_its_chunks_is_pruned_exactly_and_saved(
    make: Callable[[], nn.Module], length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, calls = make().double(), [torch.randn(samples, length, 6).double() for samples in (2, 3)]
    result = fasp_fx.prune(model, (calls[0],), score="random", restore=None, sparsity=0.2)
    assert_exact(model, result, *((x,) for x in calls))
    loaded = fasp_fx.load(result.save(tmp_path / "out")).module
    assert all(torch.equal(loaded(x), result.module(x)) for x in calls)
    if make is behind:
        again = fasp_fx.prune(result.module, (calls[0],), score="random", restore=None, sparsity=0.2)
        copies = [
            len(one.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))
            for one in (result, again)
        ]
        assert copies[0] == copies[1], "captured again it copies no more"


@pytest.mark.slow
def test_sizes_that_are_too_long_to_be_stored_are_refused_in_words(tmp_path: Path) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        """Sizes are computed of sizes, time and again."""
        size = x.shape[1]
        for number in range(7):
            size = (size * size + 3) // (size + number + 2) + 1
        return m.down(F.pad(m.up(x), (0, 0, 0, size)))

    x = torch.randn(2, 7, 6)
    result = fasp_fx.prune(wide(forward, hidden=8), (x,), score="random", restore=None, sparsity=0.2)
    with pytest.raises(StoreError, match="too long to be stored"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
