"""Scans that a model writes out in chunks: sequences are padded to whole chunks, by nothing where they fill
them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import TOLERANCE, error, zeroed
from torch import Tensor, nn
from torch.nn import functional as F

import fasp_fx
from fasp_fx.errors import StoreError

CHUNK = 4


class Scan(nn.Module):
    """A state-space layer within chunks of four tokens, as Mamba 2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.write, self.read, self.decay = (nn.Linear(6, width) for width in (8, 3, 3, 2))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        missing = (CHUNK - length % CHUNK) % CHUNK
        chunks = (length + missing) // CHUNK
        value, write, read, decay = (
            F.pad(layer(x), (0, 0, 0, missing)).view(batch, chunks, CHUNK, -1)
            for layer in (self.value, self.write, self.read, self.decay)
        )
        value = value.unflatten(-1, (2, 4))
        fallen = -F.softplus(decay).cumsum(2)
        mask = torch.ones(CHUNK, CHUNK, dtype=x.dtype).tril()[..., None]
        weight = torch.exp((fallen[:, :, :, None] - fallen[:, :, None]).clamp(max=0)) * mask
        found = torch.einsum("zcln,zcsn,zclsh,zcshp->zclhp", read, write, weight, value)
        return x + self.out(found.reshape(batch, chunks * CHUNK, -1)[:, :length])


class Behind(nn.Module):
    """Reads channels, padded to an even number of tokens, in the order in which they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).transpose(1, 2)
        hidden = F.pad(hidden, (0, x.shape[1] % 2))
        pairs = torch.einsum("bcpk,k->bcp", hidden.unflatten(2, (-1, 2)), torch.ones(2, dtype=x.dtype))
        return self.down(pairs.transpose(1, 2))


@pytest.mark.parametrize(
    ("kind", "length"),
    [(Scan, 8), (Behind, 7), (Behind, 8), pytest.param(Scan, 7, marks=pytest.mark.slow)],
)
def test_what_fills_its_chunks_is_pruned_exactly_and_saved(
    kind: type[nn.Module], length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = kind().double().eval(), torch.randn(2, length, 6).double()
    result = fasp_fx.prune(model, (x,), score="random", restore=None, sparsity=0.2)
    again = fasp_fx.load(result.save(tmp_path / "out"))
    for given in (x, torch.randn(3, length, 6).double()):
        expected = zeroed(model, result.plan)(given)
        assert error(expected, model(given)) > 100 * TOLERANCE
        assert error(result.module(given), expected) <= TOLERANCE
        assert torch.equal(again.module(given), result.module(given))


def test_a_result_that_is_captured_again_copies_no_more() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6)
    result = fasp_fx.prune(Behind().eval(), (x,), score="random", restore=None, sparsity=0.2)
    again = fasp_fx.prune(result.module, (x,), score="random", restore=None, sparsity=0.2)
    copies = [
        len(one.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))
        for one in (result, again)
    ]
    assert copies[0] == copies[1] > 0


class Nested(nn.Module):
    """Sizes are computed of sizes, time and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.up, self.down = times, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden, size = self.up(x), x.shape[1]
        for number in range(self.times):
            size = (size * size + 3) // (size + number + 2) + 1
        return self.down(F.pad(hidden, (0, 0, 0, size)))


@pytest.mark.slow
def test_sizes_that_are_too_long_to_be_stored_are_refused_in_words(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6)
    result = fasp_fx.prune(Nested(7).eval(), (x,), score="random", restore=None, sparsity=0.2)
    with pytest.raises(StoreError, match="too long to be stored"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
