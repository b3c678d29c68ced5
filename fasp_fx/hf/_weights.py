"""The weights of a pruned program under the names and in the layout of the model it was made from."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from ..pruning._result import Result
from ..pruning._weights import FusedWeights


def smaller_weights(model: nn.Module, result: Result) -> dict[str, Tensor]:
    """The smaller parameters of ``model`` and its persistent buffers, under all their names; none shares
    storage with ``model``.

    A fused weight that the program holds in parts is put together again. A parameter that the program does
    not use is as it was.

    Raises:
        ArgumentError: the program lost rows or columns of a weight that the model computes from others.
    """
    folded = {weight.name: weight for weight in result.plan.folds}
    lost = next((folded[name] for name, _ in result.plan.slices() if name in folded), None)
    if lost is not None:
        raise ArgumentError(
            f"the model computes {lost} in every call, so that no checkpoint of its class can hold it"
            " smaller; prune it without plain"
        )
    pruned = dict(result.module.named_parameters(remove_duplicate=False))
    fused = FusedWeights(result.plan)
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in pruned and name not in folded:
            found[name] = pruned[name].detach()
        elif name in fused:
            found[name] = fused.joined(name, pruned)
        else:
            found[name] = tensor.detach().clone()
    return found
