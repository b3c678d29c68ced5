"""Sparse tensors that a model returns: what is dense is pruned, and what is sparse comes back as it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import zeroed
from refusal import Vectors, X
from torch import Tensor, nn

import fasp_fx

pytestmark = pytest.mark.usefixtures("no_files", "shared_captures")


class Sparse(nn.Module):
    """Returns a sparse tensor: a buffer, or its output, which no exporter takes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.block, self.what = Vectors(), what
        self.register_buffer("edges", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.block(x)
        if self.what == "buffer":
            return out, self.edges
        return out, out.to_sparse() if self.what == "coo" else out.to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("what", ["buffer", "coo", "csr"])
def test_sparse_outputs(what: str) -> None:
    torch.manual_seed(0)
    model = Sparse(what).eval()
    result: Any = fasp_fx.prune(model, (X,), score="random", restore=None, sparsity=0.3)
    with torch.no_grad():
        found, expected = result.module(X), zeroed(model, result.plan)(X)
    assert found[1].layout == expected[1].layout != torch.strided
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense())


class Alone(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to_sparse()


def test_a_sparse_output_with_no_dense_part_before_it_is_refused_in_words() -> None:
    with pytest.raises(fasp_fx.CaptureError, match=r"_to_sparse.*No submodule can be pruned by itself"):
        fasp_fx.prune(Alone().eval(), (X,), score="magnitude", restore=None)
