"""The weights of a pruned program under the names and in the layout of the model it was made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._result import Result
from ..errors import ArgumentError
from ..plan import SplitWeight


def smaller_weights(model: nn.Module, result: Result) -> dict[str, Tensor]:
    """The smaller parameters of ``model`` and its persistent buffers, under all their names; none shares storage with ``model``.

    A fused weight that the program holds in parts is put together again. A parameter that the program does not use is as it was.

    Raises:
        ArgumentError: the program lost rows or columns of a weight that the model computes from others.
    """
    folded = {weight.name: weight for weight in result.plan.folds}
    lost = next((folded[name] for name, _ in result.plan.slices() if name in folded), None)
    if lost is not None:
        raise ArgumentError(f"the model computes {lost} in every call, so that no checkpoint of its class can hold it smaller; prune it without plain")
    pruned = dict(result.module.named_parameters(remove_duplicate=False))
    fused: dict[str, list[SplitWeight]] = {}
    for split in result.plan.splits:
        fused.setdefault(split.source, []).append(split)
    removed = {place: {index for _, index in pairs} for place, pairs in result.plan.slices().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in pruned and name not in folded:
            found[name] = pruned[name].detach()
        elif name in fused:
            found[name] = _joined(pruned, fused[name], removed.get((name, fused[name][0].dim), set()))
        else:
            found[name] = tensor.detach().clone()
    return found


def _joined(pruned: dict[str, nn.Parameter], splits: list[SplitWeight], removed: set[int]) -> Tensor:
    """The parts of a fused weight, each row where it stood among those that stay."""
    dim = splits[0].dim
    rows = [row for split in splits for row in split.rows if row not in removed]
    parts = torch.cat([pruned[split.name].detach() for split in splits], dim)
    return parts.index_select(dim, torch.argsort(torch.tensor(rows, device=parts.device)))
