"""Copy a module with other tensors in the place of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.plan import PruningPlan
from ...base._tolerable import tolerable
from ...base._warn import quiet
from ...capturing._fx import attribute
from ...capturing._program import SplitWeight
from ...capturing._transformers import is_transformers
from ...errors import EagerError, first_line


def copied(model: nn.Module, pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    """Copy a model with the weights that the module of a result has now; no storage is shared with either,
    and all attributes but tensors are those of the model.

    Each tensor that the copy holds in several places is one tensor there as well, and a parameter is trained
    if it is in the model. What the program does not use (a branch that was not captured, the count of batches
    of a norm) is as in the model.

    Raises:
        EagerError: a weight cannot be had in the form that the model holds it in, or the model cannot be
            copied.
    """
    lost = {name for name, _ in plan.slices()}
    for weight in plan.folds:
        if weight.name in lost:
            raise EagerError(
                f"the model computes '{weight.name}' from '{weight.sources[0]}' in every call, which"
                " cannot be made to give the smaller weight; use result.module, or remove the"
                " parametrisation before pruning"
            )
    computed = {source for weight in plan.folds for source in weight.sources}
    device = next((tensor.device for tensor in [*pruned.parameters(), *pruned.buffers()]), None)
    parameters, fused = dict(pruned.named_parameters(remove_duplicate=False)), FusedWeights(plan)
    memo: dict[int, Any] = {}
    made: dict[
        int, tuple[Tensor, Tensor]
    ] = {}  # with what it was made of, whose id is given to no other then
    for name, tensor in tensors(model):
        if id(tensor) not in memo:
            value = tensor if name in computed else _smaller(name, tensor, pruned, parameters, fused)
            if id(value) not in made:
                made[id(value)] = value, _own(value, tensor, device)
            memo[id(tensor)] = made[id(value)][1]
    try:
        module = copy.deepcopy(model, memo)
    except tolerable(Exception) as error:  # a module copies itself as it likes
        raise EagerError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}); use"
            " result.module"
        ) from error
    for path, inner in model.named_modules():
        module.get_submodule(path).training = inner.training  # some are built anew by their class
    return module


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for _, tensor in tensors(model)})


def cuts(model: nn.Module, module: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """For each submodule that holds tensors which have become smaller in a copy, how long their dimensions
    were and are.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for (name, dense), (_, now) in zip(tensors(model), tensors(module), strict=True):
        lost = [pair for pair in zip(dense.shape, now.shape) if pair[0] != pair[1]]
        if lost:
            found.setdefault(name.rpartition(".")[0], []).extend(lost)
    return found


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, and every tensor that is a plain attribute; those held in several
    places under each of their names.
    """
    for path, inner in module.named_modules(remove_duplicate=False):
        if not isinstance(inner, torch.jit.ScriptModule):
            prefix = f"{path}." if path else ""
            for name, value in {**vars(inner), **inner._buffers, **inner._parameters}.items():
                if isinstance(value, Tensor):
                    yield prefix + name, value


def _smaller(
    name: str, tensor: Tensor, pruned: nn.Module, parameters: dict[str, nn.Parameter], fused: FusedWeights
) -> Tensor:
    """The tensor of a result by its name in the model, put together of its parts if need be; that of the
    model where the program does not use it.
    """
    if name in fused:
        try:
            return fused.joined(name, parameters)
        except tolerable(RuntimeError) as error:
            raise EagerError(
                f"the parts of '{name}' have lost different positions, so that no single weight holds them;"
                " use result.module, or prune whole heads"
            ) from error
    try:
        found = attribute(pruned, name)
    except AttributeError:
        return tensor
    return found if isinstance(found, Tensor) else tensor


def _own(value: Tensor, like: Tensor, device: torch.device | None) -> Tensor:
    """A copy of a value, on the device of the result; of the class of ``like``, with what that has for
    attributes.
    """
    value = value.detach().to(device if device is not None else value.device, copy=True)
    made = value.as_subclass(type(like)).requires_grad_(like.requires_grad and value.is_floating_point())
    vars(made).update(copy.copy(vars(like)))
    return made


def keep_from_saving(module: nn.Module) -> None:
    """Have ``save_pretrained`` of a copy refuse, where a model that is built of its configuration has other
    sizes: nobody could load what it wrote.
    """
    if is_transformers(module) and not _says_sizes(module):
        module.save_pretrained = functools.partial(_refuse, type(module).__name__)  # type: ignore[assignment]


def _says_sizes(module: Any) -> bool:
    try:
        with quiet(), torch.device("meta"):
            built = type(module)(copy.deepcopy(module.config))
    except tolerable(Exception):  # a class refuses what it likes
        return False
    ours, its = ({name: tensor.shape for name, tensor in one.named_parameters()} for one in (module, built))
    return ours == its


def _refuse(name: str, *args: Any, **kwargs: Any) -> None:
    raise EagerError(
        f"the configuration of {name} does not say the sizes that its layers have now, and nobody could load"
        " the folder; save state_dict(), or prune with fasp_fx.hf.prune(..., plain=True), whose result is an"
        " ordinary checkpoint"
    )


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


__all__ = ["FusedWeights", "copied", "cuts", "keep_from_saving", "tensors", "twin"]
