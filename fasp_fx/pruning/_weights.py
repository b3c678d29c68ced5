"""The weights of a result under the names that they have in the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..analysis.plan import PruningPlan
from ..capturing._program import SplitWeight


class FusedWeights:
    """The weights of the model that a result holds in parts.

    Args:
        plan: of the result.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self._splits: dict[str, list[SplitWeight]] = {}
        for split in plan.splits:
            self._splits.setdefault(split.source, []).append(split)
        self._removed = (
            {place: {index for _, index in pairs} for place, pairs in plan.slices().items()}
            if plan.splits
            else {}
        )

    def __contains__(self, name: object) -> bool:
        return name in self._splits

    def joined(self, name: str, pruned: Mapping[str, Tensor]) -> Tensor:
        """The parts of one weight put together again, each row where it stood among those that stay.

        Args:
            name: that of the weight in the model.
            pruned: the weights of the result.

        Raises:
            RuntimeError: the parts have lost different numbers of positions along another dimension.
        """
        splits = self._splits[name]
        dim = splits[0].dim
        removed = self._removed.get((name, dim), set())
        rows = [row for split in splits for row in split.rows if row not in removed]
        parts = torch.cat([pruned[split.name].detach() for split in splits], dim)
        return parts.index_select(dim, torch.argsort(torch.tensor(rows, device=parts.device)))


__all__ = ["FusedWeights"]
