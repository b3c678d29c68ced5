"""A weight whose columns are multiplied by gates, as a parametrization of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...analysis.channels import laid_by_block
from ...analysis.groups import Member

if TYPE_CHECKING:
    from ._gates import Gates


class Scaled(nn.Module):
    """Multiplies what a group's channels are read by: to gate a column is to gate the channel that it reads.

    Args:
        gates: all gates.
        places: for each group that takes columns of the weight along, its number, and the member that says
            which.
        device: that of the weight.
        holds: whether the gates are a part of the model by this. A submodule of their own would be called by
            a model that calls all it has in turn.
    """

    #: what a capture refuses a model by, though it be a part that the gates themselves are not in
    is_fasp_fx_gates = True

    def __init__(
        self, gates: Gates, places: list[tuple[int, Member]], device: torch.device, holds: bool
    ) -> None:
        super().__init__()
        self._gates = (gates,)  # in a tuple: no part of this module
        if holds:
            self.gates = gates
        self._places = places
        for index, (_, member) in enumerate(places):
            self.register_buffer(
                f"indices_{index}", torch.tensor(member.indices, device=device), persistent=False
            )
            self.register_buffer(f"sets_{index}", torch.tensor(member.sets, device=device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        for index, (number, member) in enumerate(self._places):
            drawn: Tensor = self._gates[0].drawn(number).to(weight)
            factors = drawn.new_ones(member.size).index_put(
                (getattr(self, f"indices_{index}"),), drawn[getattr(self, f"sets_{index}")]
            )
            weight = weight * _along(factors, member, weight.shape)
        return weight


def _along(factors: Tensor, member: Member, shape: torch.Size) -> Tensor:
    """Factors of a member's indices, laid along the weight that they are for."""
    if member.block_dim is None:
        return factors.reshape([-1 if dim == member.dim else 1 for dim in range(len(shape))])
    return laid_by_block(factors.reshape(member.blocks, -1), member.dim, member.block_dim, shape)


__all__ = ["Scaled"]
