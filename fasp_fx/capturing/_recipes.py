"""How a weight comes of another by leaving out rows and columns, as data: made without the weight, applied
where it is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import VerificationError


@dataclass(frozen=True, eq=False)
class Cut:
    """Which indices stay along one dimension.

    Attributes:
        dim: the dimension.
        kept: the indices in the order in which they are taken, in each block its own, shape ``[blocks, kept
            in each]``.
        block_dim: the dimension that is divided evenly into blocks; ``None``: there is one block.
    """

    dim: int
    kept: np.ndarray
    block_dim: int | None = None

    @staticmethod
    def of(name: str, dim: int, stays: np.ndarray, block_dim: int | None = None) -> Cut:
        """The cut that leaves what stays, a boolean of shape ``[blocks, size in each]``.

        Args:
            name: of the weight, for the message.

        Raises:
            VerificationError: the blocks would keep unequal numbers of indices.
        """
        counts = stays.sum(1)
        if (counts != counts[0]).any():
            raise VerificationError(
                f"the blocks of '{name}' would keep unequal numbers of channels along dimension {dim}:"
                f" {sorted(set(counts.tolist()))}"
            )
        return Cut(dim, stays.nonzero()[1].reshape(len(stays), -1), block_dim)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Cut)
            and (self.dim, self.block_dim) == (other.dim, other.block_dim)
            and np.array_equal(self.kept, other.kept)
        )

    def apply(self, weight: Tensor) -> Tensor:
        """What stays of a tensor, differentiably."""
        kept = torch.from_numpy(self.kept).to(weight.device)
        if self.block_dim is None:
            return weight.index_select(self.dim, kept[0])
        blocks = zip(weight.chunk(len(kept), self.block_dim), kept, strict=True)
        return torch.cat([block.index_select(self.dim, own) for block, own in blocks], self.block_dim)


@dataclass(frozen=True)
class Recipe:
    """How a weight is made.

    Attributes:
        source: the name of the weight that it is made of.
        cuts: what stays of that, one after the other: each speaks of what the one before leaves, so that
            blocks, which are those of the whole weight, are cut first. Without any, all stays.
    """

    source: str
    cuts: tuple[Cut, ...] = ()

    def then(self, *cuts: Cut) -> Recipe:
        """The recipe with further cuts."""
        return replace(self, cuts=self.cuts + cuts)

    def shape(self, source: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is made of a weight of the shape ``source``."""
        sizes = list(source)
        for cut in self.cuts:
            sizes[cut.dim] = cut.kept.shape[1]
        return tuple(sizes)

    def apply(self, weight: Tensor) -> Tensor:
        """What is made of the source, differentiably, on its device; the source itself where nothing is left
        out.
        """
        for cut in self.cuts:
            weight = cut.apply(weight)
        return weight
